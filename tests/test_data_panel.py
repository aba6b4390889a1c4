"The two panels for data: what they show and write, without a browser."
import json, time
from datetime import datetime
from io import StringIO
from threading import Event, Thread

import pytest
from PIL import Image

from minicpmv_nb.data_panel import NO_MODEL, Album, AnnotatePanel, DataPanel, add_picture, check_file, chosen, find_albums, find_checkpoints, find_data, image_of, jpeg, kind_of, read_guide, rounds_of, told
from minicpmv_nb.samples import check
from support import QUESTION, draw_data, draw_mixed, entry, talk, write_data

BAD = '<script>alert(1)</script>'


def checked_panel(*args, **how):
    panel = DataPanel(*args, **how)
    panel.go.click()
    panel.join()
    return panel

def faulty(folder):
    "Six entries, of which 1, 3, 4 and 5 are bad."
    return write_data(folder, [entry('a'), entry('b', 'nowhere.png'), entry('c'), entry('a'), entry(BAD, BAD), 'no entry'])

def album_of(folder, n=4):
    for i in range(n): Image.new('RGB', (40 + i, 30), (i*40, 0, 0)).save(folder/f'{i}.png')
    return folder

def answer(panel, text, question=None, row=0):
    if question is not None: panel.rows[row][0].value = question
    panel.rows[row][1].value = text

def saved(folder, name='train'): return json.loads((folder/f'{name}.json').read_text(encoding='utf-8'))

# --- DataPanel

def test_counts_are_those_of_check(tmp_path):
    path = faulty(tmp_path)
    values, report = checked_panel(path).values(), check(path)[1]
    assert (values['entries'], values['good'], values['problems']) == (6, 2, report.rows())
    assert values['sample'] == 0 and not values['tokens']

def test_paging_goes_through_the_chosen(tmp_path):
    panel = checked_panel(faulty(tmp_path))
    panel.which.value = 'bad'
    seen = [panel.values()['sample']]
    for _ in range(5): panel.next.click(); seen.append(panel.values()['sample'])
    assert seen == [1, 3, 4, 5, 5, 5]
    panel.which.value = 'good'
    assert panel.values()['sample'] == 2
    panel.previous.click()
    assert panel.values()['sample'] == 0
    panel.entry.value = 3 # whatever is chosen
    assert 'not among those shown' in panel.place.value and 'already used' in panel.view.value

def test_an_id_leads_to_its_first_entry(tmp_path):
    panel = checked_panel(faulty(tmp_path))
    panel.id.value = 'c'
    assert panel.values()['sample'] == 2
    panel.id.value = 'a'
    assert panel.values()['sample'] == 0
    panel.id.value = 'zebra'
    assert panel.said == 'No entry has the id zebra.' and panel.values()['sample'] == 0

def test_problems_are_filtered_by_kind_and_id(tmp_path):
    panel = checked_panel(faulty(tmp_path))
    kinds = [kind for _, kind in panel.kind.options]
    assert kinds[:2] == ['', 'The picture … does not exist.'] and panel.kind.options[1][0].endswith('(2)')
    panel.kind.value = kinds[1]
    assert panel.values()['table'] == 2 and 'already used' not in panel.table.value
    panel.search.value = 'b'
    assert panel.values()['table'] == 1
    panel.look.click()
    assert panel.order == [1] and panel.values()['sample'] == 1 and panel.tabs.selected_index == 0
    panel.search.value = 'nobody'
    assert panel.order == [] and panel.view.value == '' and panel.place.value == 'There is none.'

def test_nothing_from_a_file_becomes_markup(tmp_path, tiny):
    path = write_data(tmp_path, [entry(BAD, 'dot.png', talk(BAD, f'<image>\n{BAD}')), entry('x', 'dot.png', [dict(role=BAD, content=BAD)]), entry('x' + BAD, BAD)])
    panel = checked_panel(path, tiny)
    for i in range(3):
        panel.entry.value = i
        assert '<script' not in panel.view.value + panel.place.value + panel.table.value
    panel.entry.value = 0
    assert '&lt;script&gt;' in panel.view.value

def test_half_characters_do_not_stop_the_page(tmp_path):
    panel = checked_panel(write_data(tmp_path, [entry('\ud800', conversations=talk('\ud800'))]))
    (panel.view.value + panel.place.value + panel.table.value).encode('utf-8')
    assert '\\ud800' in panel.view.value

def test_without_a_model_there_are_pictures_and_words(tmp_path):
    panel = checked_panel(draw_data(tmp_path, 2))
    assert NO_MODEL in panel.view.value and QUESTION in panel.view.value and panel.view.value.count('<img') == 1

def test_slices_and_tokens_are_those_of_the_checkpoint(tmp_path, tiny):
    panel = checked_panel(draw_data(tmp_path, 4), str(tiny))
    panel.entry.value = 3 # 300 x 100
    from minicpmv_nb.prompts import Processor, encode, token_costs
    checked = panel.checked
    encoded = encode(checked.samples[3].turns, Processor.from_folder(tiny, 9))
    assert encoded.plans[0].grid and panel.view.value.count('<img') == 1 + encoded.plans[0].pieces
    assert f'{token_costs(encoded)["all"]} of at most 2048 tokens' in panel.view.value
    fewer = checked_panel(panel.path.value, str(tiny), max_slice_nums=1)
    fewer.entry.value = 3
    assert 'not cut' in fewer.view.value and fewer.view.value.count('<img') == 2

def test_several_pictures_and_none(tmp_path, tiny):
    panel = checked_panel(draw_mixed(tmp_path, 3), str(tiny))
    counts = []
    for i in range(3): panel.entry.value = i; counts.append(panel.view.value.count('What the model sees of picture'))
    assert counts == [0, 1, 2] and '[picture 2]' in panel.view.value

def test_too_long_is_counted(tmp_path, tiny):
    panel = checked_panel(draw_data(tmp_path, 4), str(tiny), model_max_length=60)
    assert panel.checked.too_long == panel.values()['entries'] - panel.values()['good'] > 0
    assert any(kind.startswith('… tokens') for _, kind in panel.kind.options)

def test_a_file_without_a_good_entry_is_still_shown(tmp_path, tiny):
    panel = checked_panel(write_data(tmp_path, [entry('a', 'nowhere.png')]), str(tiny))
    assert panel.values()['good'] == 0 and 'nowhere.png' in panel.view.value

def test_a_truncated_picture_is_said(tmp_path):
    path = draw_data(tmp_path, 2)
    Image.effect_noise((200, 200), 90).save(tmp_path/'0.png')
    (tmp_path/'0.png').write_bytes((tmp_path/'0.png').read_bytes()[:9000])
    panel = checked_panel(path)
    assert panel.values()['good'] == 2 and 'cannot be read' in panel.view.value and 'Red.' in panel.view.value
    panel.pixels.value = True
    panel.go.click()
    assert panel.join().values()['good'] == 1

def test_a_mistake_clears_what_was_shown(tmp_path):
    panel = checked_panel(faulty(tmp_path))
    panel.path.value = str(tmp_path/'nowhere.json')
    panel.go.click()
    values = panel.join().values()
    assert values['message'].startswith('There is no data file') and values['entries'] == 0 and values['sample'] is None and panel.view.value == ''
    for button in (panel.next, panel.previous, panel.look): button.click()
    assert panel.values()['sample'] is None

def test_only_the_shown_sample_is_opened(tmp_path, tiny, monkeypatch):
    from minicpmv_nb import data_panel
    opened = []
    real = data_panel.open_all
    monkeypatch.setattr(data_panel, 'open_all', lambda sample: opened.append(sample.id) or real(sample))
    panel = checked_panel(draw_data(tmp_path, 40), str(tiny))
    assert opened == ['s0']
    panel.entry.value = 39
    assert opened == ['s0', 's39']

def test_a_large_file_pages_at_once(tmp_path):
    panel = checked_panel(write_data(tmp_path, [dict(id=str(i), conversations=talk(question='?')) for i in range(20_000)]))
    start = time.thread_time()
    for _ in range(20): panel.next.click()
    panel.id.value = '19999'
    assert panel.values()['sample'] == 19_999 and time.thread_time()-start < 2

def test_progress_is_told():
    from tqdm import tqdm
    said, heard = [], Event()
    with told(lambda text: (said.append(text), heard.set()), .01):
        bar = tqdm(total=2000, desc='checking', file=StringIO())
        assert heard.wait(5)
        bar.close()
    count = len(said)
    time.sleep(.05)
    assert said[0] == 'checking: 0 of 2,000' and len(said) == count

def test_other_bars_are_not_told():
    from tqdm import tqdm
    other, said = tqdm(total=5, desc='other', file=StringIO()), []
    with told(said.append, .01): time.sleep(.05)
    other.close()
    assert said == []

def test_finds_what_is_there(tmp_path, tiny):
    (tmp_path/'a').mkdir(); (tmp_path/'.hidden').mkdir()
    for at in ('a', '.hidden'): write_data(tmp_path/at, [entry()])
    (tmp_path/'a'/'other.json').write_text('{"conversations": []}')
    assert find_data(tmp_path) == [str(tmp_path/'a'/'data.json')] and find_albums(tmp_path) == [str(tmp_path/'a')]
    assert find_checkpoints(tiny.parent) == [str(tiny)] and find_checkpoints(tmp_path) == []

def test_kinds_do_not_depend_on_the_entry(tmp_path):
    kinds = {kind_of(p.reason) for p in check(write_data(tmp_path, [entry(str(i), f'{i} <b>.png') for i in range(9)]))[1].problems}
    assert kinds == {'The picture … does not exist.'}

def test_clicks_in_two_threads_show_the_entry_that_is_named(tmp_path):
    panel = checked_panel(draw_data(tmp_path, 30))
    threads = [Thread(target=button.click) for button in (panel.next, panel.next, panel.previous, panel.next)*5]
    for t in threads: t.start()
    for t in threads: t.join()
    assert f'{panel.values()["sample"] % 30}.png' in panel.view.value and f'entry {panel.values()["sample"]},' in panel.place.value

# --- AnnotatePanel

def test_the_file_is_written_as_soon_as_an_answer_is_there(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    panel.rows[0][0].value = 'Which colour?'
    assert not (tmp_path/'train.json').exists() and panel.said == 'Not written yet. Round 1 has no answer.'
    panel.rows[0][1].value = 'Black.'
    assert saved(tmp_path) == [dict(id='0.png', image='0.png', conversations=talk('Black.', '<image>\nWhich colour?'))]
    assert not [f for f in tmp_path.iterdir() if f.name.endswith('.part') or f.name.startswith('.annotating-')]

def test_a_folder_from_beginning_to_end(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?'); panel.next.click()
    assert [q.value for q, _ in panel.rows] == ['Which colour?'] and panel.values()['rounds'] == []
    panel.skip.click()
    answer(panel, 'Red.'); panel.more.click(); answer(panel, 'A square.', 'Which shape?', row=1); panel.next.click()
    assert [q.value for q, _ in panel.rows] == ['Which colour?', 'Which shape?']
    answer(panel, 'Bright red.'); panel.next.click() # the second round stays a suggestion
    assert [rounds_of(e) for e in saved(tmp_path)] == [[('Which colour?', 'Black.')], [('Which colour?', 'Red.'), ('Which shape?', 'A square.')], [('Which colour?', 'Bright red.')]]
    values = panel.values()
    assert (values['done'], values['pictures'], values['skipped'], values['entries']) == (3, 4, ['1.png'], 3)
    assert check(tmp_path/'train.json')[1].problems == []

def test_reopening_goes_on(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?'); panel.next.click(); panel.skip.click()
    again = AnnotatePanel(str(tmp_path))
    assert again.picture == '2.png' and again.rows[0][0].value == 'Which colour?' and again.values()['skipped'] == ['1.png']

def test_going_back_and_changing(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?'); panel.next.click(); panel.back.click()
    answer(panel, 'Dark.')
    assert len(saved(tmp_path)) == 1 and rounds_of(saved(tmp_path)[0]) == [('Which colour?', 'Dark.')]
    panel.remove.click()
    assert not (tmp_path/'train.json').exists() and panel.values()['entries'] == 0

def test_half_an_entry_is_not_left(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', '')
    panel.next.click()
    assert panel.picture == '0.png' and panel.said == 'Round 1 has no question.'
    panel.names.value = '2.png'
    assert panel.picture == panel.names.value == '0.png' and panel.rows[0][1].value == 'Black.'

def test_a_tag_in_a_text_is_refused(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'What is <image>?')
    assert panel.said.startswith('<image> inside turn 0.') and not (tmp_path/'train.json').exists()

def test_a_file_of_something_else_is_left_alone(tmp_path):
    album_of(tmp_path)
    for text in ('{"a": 1}', '[1, 2]', '[]', 'no json', '{"id": 1}\n{"id": 2}', '[{"id": "0", "conversations": [{"role": "user"}]}]'):
        (tmp_path/'train.json').write_text(text)
        panel = AnnotatePanel(str(tmp_path))
        assert panel.album is None and str(tmp_path/'train.json') in panel.message.value and panel.values()['entries'] == 0, text
        assert (tmp_path/'train.json').read_text() == text

def test_a_file_in_the_format_is_continued(tmp_path):
    album_of(tmp_path)
    old = [entry('mine', '0.png', [dict(role='system', content='Be short.'), *talk('Black.'), dict(role='user', content='Sure?'), dict(role='assistant', content='Yes.', score=3)], source='scan', weight=2),
        dict(id='two', image={'<image_00>': '0.png', '<image_01>': '1.png'}, conversations=talk('Yes.', '<image_00>\n<image_01>\nAlike?')), dict(id='1.png', conversations=talk('Hello.', 'Hi.'))]
    (tmp_path/'train.json').write_text(json.dumps(old))
    panel = AnnotatePanel(str(tmp_path))
    assert panel.picture == '1.png' and panel.values()['done'] == 1
    answer(panel, 'Red.', 'Which colour?'); panel.back.click()
    assert [(q.value, a.value) for q, a in panel.rows] == [(QUESTION, 'Black.'), ('Sure?', 'Yes.')]
    answer(panel, 'Very dark.')
    first, *others = saved(tmp_path)
    assert first == old[0] | dict(conversations=[old[0]['conversations'][0], dict(role='user', content=f'<image>\n{QUESTION}'), dict(role='assistant', content='Very dark.'), *old[0]['conversations'][3:]])
    assert others[:2] == old[1:] and others[2]['id'] == '1.png-2' and check(tmp_path/'train.json')[1].problems == []

def test_opening_changes_no_file(tmp_path):
    (album_of(tmp_path)/'train.json').write_text(json.dumps([entry('mine', './0.png', talk('Black.', QUESTION))]))
    before = (tmp_path/'train.json').read_bytes()
    panel = AnnotatePanel(str(tmp_path))
    for button in (panel.back, panel.skip, panel.back, panel.back, panel.next): button.click()
    assert (tmp_path/'train.json').read_bytes() == before and image_of(saved(tmp_path)[0], tmp_path) == '0.png'

def test_a_change_from_outside_is_not_overwritten(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?'); panel.next.click()
    (tmp_path/'train.json').write_text(json.dumps([entry('other', '3.png')]))
    answer(panel, 'Red.')
    assert 'changed by somebody else' in panel.said and saved(tmp_path)[0]['id'] == 'other' and panel.values()['entries'] == 1
    panel.go.click()
    assert panel.album.done() == {'3.png'}

def test_held_out_entries_go_to_their_own_file(tmp_path):
    album = Album(album_of(tmp_path, 20))
    for name in album.pictures(): album.write(name, [('Which?', 'This.')])
    album.hold_out(.3)
    names = lambda part: [e['image'] for e in saved(tmp_path, part)]
    assert names('eval') == [n for n in album.pictures() if chosen(n, .3)] and sorted(names('train') + names('eval')) == album.pictures()
    assert not any(check(f)[1].problems for f in album.files.values())
    held = names('eval')
    again = Album(tmp_path)
    again.write(held[0], [('Which?', 'That.')])
    assert names('eval') == held and again.share == .3
    again.hold_out(0)
    assert not (tmp_path/'eval.json').exists() and len(saved(tmp_path)) == 20

def test_a_split_made_elsewhere_stays(tmp_path):
    album_of(tmp_path, 6)
    for part, numbers in (('train', (0, 1)), ('eval', (2, 3))): (tmp_path/f'{part}.json').write_text(json.dumps([entry(str(n), f'{n}.png') for n in numbers]))
    album = Album(tmp_path)
    album.write('4.png', [('Which?', 'This.')])
    assert [e['id'] for e in saved(tmp_path, 'eval')] == ['2', '3'] and [e['id'] for e in saved(tmp_path)] == ['0', '1', '4.png']
    album.hold_out(.5); album.hold_out(0)
    assert [e['id'] for e in saved(tmp_path, 'eval')] == ['2', '3']

def test_nothing_is_lost_between_the_two_files(tmp_path, monkeypatch):
    from minicpmv_nb import data_panel
    album = Album(album_of(tmp_path, 8))
    for name in album.pictures(): album.write(name, [('Which?', 'This.')])
    real, calls = data_panel.write_json, []
    def breaks(path, value):
        if path in album.files.values() and calls: raise OSError('No space left on device')
        if path in album.files.values(): calls.append(path)
        real(path, value)
    monkeypatch.setattr(data_panel, 'write_json', breaks)
    with pytest.raises(OSError): album.hold_out(.5)
    monkeypatch.undo()
    assert calls == [tmp_path/'eval.json'] and len(saved(tmp_path)) == 8 # written twice rather than never
    again = Album(tmp_path)
    assert len(again.entries) == 8 and sorted(again.done()) == again.pictures()
    again.save()
    assert len(saved(tmp_path)) + len(saved(tmp_path, 'eval')) == 8

def test_two_different_entries_with_one_id_are_refused(tmp_path):
    album_of(tmp_path)
    for part, answer_ in (('train', 'A.'), ('eval', 'B.')): (tmp_path/f'{part}.json').write_text(json.dumps([entry('x', '0.png', talk(answer_))]))
    with pytest.raises(ValueError, match='both have an entry with the id x'): Album(tmp_path)

def test_a_failed_write_leaves_the_old_entry(tmp_path, monkeypatch):
    from minicpmv_nb import data_panel
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?')
    real = data_panel.write_json
    def full(path, value):
        if path.name == 'train.json': raise OSError('No space left on device')
        real(path, value)
    monkeypatch.setattr(data_panel, 'write_json', full)
    answer(panel, 'Dark.')
    assert 'No space left' in panel.said and rounds_of(saved(tmp_path)[0]) == [('Which colour?', 'Black.')]
    monkeypatch.undo()
    panel.next.click()
    assert rounds_of(saved(tmp_path)[0]) == [('Which colour?', 'Dark.')]

def test_an_entry_whose_picture_is_gone_can_be_removed(tmp_path):
    album_of(tmp_path)
    (tmp_path/'train.json').write_text(json.dumps([entry('gone', 'gone.png'), entry('there', '0.png')]))
    panel = AnnotatePanel(str(tmp_path))
    panel.names.value = 'gone.png'
    assert 'does not exist' in panel.view.value
    panel.remove.click()
    assert [e['id'] for e in saved(tmp_path)] == ['there'] and check(tmp_path/'train.json')[1].problems == []

def test_uploads_are_saved_and_opened(tmp_path):
    panel = AnnotatePanel()
    file = lambda name, content: dict(name=name, type='image/jpeg', size=len(content), content=memoryview(content), last_modified=datetime(2026, 1, 1))
    panel.upload.value = (file('a.jpg', jpeg(Image.new('RGB', (9, 9)))),)
    assert panel.said == 'Type the name of a folder first: the pictures are saved there.'
    panel.folder.value = str(tmp_path/'new')
    panel.upload.value = (file('../a.jpg', jpeg(Image.new('RGB', (9, 9)))), file('b.jpg', jpeg(Image.new('RGB', (5, 5)))))
    assert panel.values()['pictures'] == 2 and panel.picture == 'a.jpg' and panel.upload.value == ()
    panel.upload.value = (file('c.jpg', b'Dear Sir'),)
    assert panel.said.startswith('c.jpg is not a picture') and sorted(f.name for f in (tmp_path/'new').iterdir()) == ['.annotating.json', 'a.jpg', 'b.jpg']

def test_an_upload_replaces_nothing(tmp_path):
    one, two = (jpeg(Image.new('RGB', (9, n))) for n in (9, 8))
    assert [add_picture(tmp_path, 'a.jpg', c) for c in (one, two, one, two)] == ['a.jpg', 'a-2.jpg', 'a.jpg', 'a-2.jpg']
    with pytest.raises(ValueError, match='must end in'): add_picture(tmp_path, 'train.json', b'[]')

def test_pictures_in_folders_below_and_names_of_any_kind(tmp_path):
    (tmp_path/'scans').mkdir()
    for name in ('scans/ä <b> 1.png', 'scans/%20.png', 'x.PNG'): Image.new('RGB', (9, 9)).save(tmp_path/name)
    panel = AnnotatePanel(str(tmp_path))
    for _ in range(3): answer(panel, 'Black.', 'Which colour?'); panel.next.click()
    assert [e['image'] for e in saved(tmp_path)] == sorted(['scans/%20.png', 'scans/ä <b> 1.png', 'x.PNG']) and check(tmp_path/'train.json')[1].problems == []
    panel.names.value = 'scans/ä <b> 1.png'
    assert '<b>' not in panel.view.value

def test_one_round_less(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?'); panel.more.click(); answer(panel, 'Yes.', 'Sure?', row=1)
    assert len(rounds_of(saved(tmp_path)[0])) == 2
    panel.fewer.click(); panel.fewer.click()
    assert rounds_of(saved(tmp_path)[0]) == [('Which colour?', 'Black.')] and len(panel.rounds.children) == 2

def test_what_cannot_be_opened_is_said(tmp_path):
    assert AnnotatePanel(str(tmp_path/'nowhere')).said.startswith('There is no folder')
    assert AnnotatePanel(str(tmp_path)).said.startswith('There is no picture in')
    (tmp_path/'.annotating.json').write_text('[]')
    assert 'not a note of this panel' in AnnotatePanel(str(tmp_path)).said

def test_nothing_left_to_train_on_is_said(tmp_path):
    album = Album(album_of(tmp_path, 1))
    name, = album.pictures()
    album.write(name, [('What?', 'A thing.')])
    panel = AnnotatePanel(str(tmp_path))
    assert panel.said == '1 of 1 pictures have an entry. Check the file next.'
    panel.share.value = .9
    assert chosen(name, .9) and panel.said.startswith('All entries are held out: nothing is left in train.json')
    panel.share.value = 0
    assert 'Check the file next' in panel.said and len(saved(tmp_path)) == 1

def test_a_tall_picture_does_not_push_the_buttons_away(tmp_path):
    Image.new('RGB', (100, 900)).save(album_of(tmp_path, 1)/'tall.png')
    panel = AnnotatePanel(str(tmp_path))
    panel.names.value = 'tall.png'
    assert 'width:39px' in panel.view.value # 71 x 640 stored small, shown 360 high

def test_neither_panel_stumbles_over_its_buttons_when_empty():
    panel = AnnotatePanel()
    panel.share.value = .2
    assert panel.values()['entries'] == 0 and panel.said == '' and DataPanel().values()['entries'] == 0

def test_read_guide_returns_nothing_where_there_is_nothing(tmp_path): assert read_guide(tmp_path/'train.json') == []

def test_check_file_agrees_with_check(tmp_path, tiny):
    path = faulty(tmp_path)
    checked = check_file(path, tiny)
    assert list(checked.samples) == [0, 2] and sorted(checked.faults) == [1, 3, 4, 5] and len(checked.raw) == 6

def test_an_answer_that_comes_after_the_click_goes_to_its_picture(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?'); panel.next.click()
    late = panel.rows[0][1]
    panel.back.click() # JupyterLab may bring the click first
    late.value = 'Red.'
    assert [(e['id'], rounds_of(e)) for e in saved(tmp_path)] == [('0.png', [('Which colour?', 'Black.')]), ('1.png', [('Which colour?', 'Red.')])]
    assert panel.picture == '0.png' and panel.rows[0][1].value == 'Black.'

def test_an_answer_that_comes_a_little_late_is_waited_for(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    panel.rows[0][0].value = 'Which colour?'
    late = Thread(target=lambda field: (time.sleep(.1), setattr(field, 'value', 'Black.')), args=(panel.rows[0][1],))
    late.start()
    panel.next.click()
    late.join()
    assert panel.picture == '1.png' and rounds_of(saved(tmp_path)[0]) == [('Which colour?', 'Black.')]

def test_a_new_round_keeps_what_is_typed(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    field = panel.rows[0][1]
    panel.more.click()
    field.value = 'Black.' # comes after the click
    assert panel.rows[0][1] is field and len(panel.rounds.children) == 4 and field in panel.rounds.children
