"The panel that makes a data file: what it writes, without a browser."
import json, time
from io import BytesIO
from datetime import datetime
from threading import Thread

import pytest
from PIL import Image

from minicpmv_nb.annotate_panel import Album, AnnotatePanel, add_picture, chosen, image_of, read_guide, rounds_of, small
from minicpmv_nb.data_panel import jpeg
from minicpmv_nb.samples import check
from support import QUESTION, entry, talk


def album_of(folder, n=4):
    for i in range(n): Image.new('RGB', (40 + i, 30), (i*40, 0, 0)).save(folder/f'{i}.png')
    return folder

def answer(panel, text, question=None, row=0):
    if question is not None: panel.rows[row][0].value = question
    panel.rows[row][1].value = text

def saved(folder, name='train'): return json.loads((folder/f'{name}.json').read_text(encoding='utf-8'))


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
    from minicpmv_nb import annotate_panel
    album = Album(album_of(tmp_path, 8))
    for name in album.pictures(): album.write(name, [('Which?', 'This.')])
    real, calls = annotate_panel.write_json, []
    def breaks(path, value):
        if path in album.files.values() and calls: raise OSError('No space left on device')
        if path in album.files.values(): calls.append(path)
        real(path, value)
    monkeypatch.setattr(annotate_panel, 'write_json', breaks)
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
    from minicpmv_nb import annotate_panel
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', 'Which colour?')
    real = annotate_panel.write_json
    def full(path, value):
        if path.name == 'train.json': raise OSError('No space left on device')
        real(path, value)
    monkeypatch.setattr(annotate_panel, 'write_json', full)
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

def test_what_is_half_typed_outlives_uploads_and_opening(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path)))
    answer(panel, 'Black.', '')
    content = jpeg(Image.new('RGB', (9, 9)))
    panel.upload.value = (dict(name='new.jpg', type='image/jpeg', size=len(content), content=memoryview(content), last_modified=datetime(2026, 1, 1)),)
    assert panel.rows[0][1].value == 'Black.' and panel.said == 'The pictures were added. The entry is not written yet. Round 1 has no question.'
    assert panel.names.options[-1][1] == 'new.jpg' and panel.picture == '0.png'
    for folder in (tmp_path, tmp_path.parent):
        panel.folder.value = str(folder)
        panel.go.click()
        assert panel.said.startswith('Not opened, since that would lose what is typed. Round 1 has no question.') and panel.rows[0][1].value == 'Black.'
    panel.rows[0][0].value = 'Which colour?'
    assert rounds_of(saved(tmp_path)[0]) == [('Which colour?', 'Black.')]
    panel.folder.value = str(tmp_path)
    panel.go.click()
    assert panel.picture == '1.png'

def test_a_share_that_cannot_be_written_is_not_claimed(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path, 20)))
    for name in panel.album.pictures(): panel.album.write(name, [('Which?', 'This.')])
    (tmp_path/'train.json').write_text(json.dumps(saved(tmp_path)))
    panel.share.value = .3
    assert 'changed by somebody else' in panel.said and not (tmp_path/'eval.json').exists()
    values = panel.values()
    assert (values['eval_file'], values['held_out'], values['share'], panel.share.value) == (None, 0, 0, 0) and Album(tmp_path).share == 0

def test_files_beyond_the_limit_are_said(tmp_path, monkeypatch):
    album = Album(album_of(tmp_path))
    monkeypatch.setattr('minicpmv_nb.annotate_panel.MOST_FILES', 4)
    assert album.passed_over() == ''
    (tmp_path/'z.txt').touch()
    assert album.passed_over().startswith(' Only the first 4 files of the folder are looked at')

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

def test_read_guide_returns_nothing_where_there_is_nothing(tmp_path): assert read_guide(tmp_path/'train.json') == []

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

def test_an_empty_panel_does_not_stumble():
    panel = AnnotatePanel()
    panel.share.value = .2
    assert panel.values()['entries'] == 0 and panel.said == ''

def test_pictures_that_disappear_while_they_are_shown(tmp_path):
    panel = AnnotatePanel(str(album_of(tmp_path, 3)))
    (tmp_path/'0.png').unlink()
    panel.skip.click()
    assert panel.picture == '1.png' and 'not in list' not in panel.said
    answer(panel, 'Black.', 'Which colour?')
    for name in ('1.png', '2.png'): (tmp_path/name).unlink()
    panel.remove.click()
    assert panel.said == f'There is no picture in {tmp_path}: add some.'

def test_a_folder_that_disappears_is_said(tmp_path):
    import shutil
    (tmp_path/'album').mkdir()
    panel = AnnotatePanel(str(album_of(tmp_path/'album')))
    shutil.rmtree(tmp_path/'album')
    answer(panel, 'Black.', 'Which colour?')
    assert panel.said == f'The folder {tmp_path/"album"} is not there any more. Nothing was written.'

def test_transparent_pixels_have_the_colour_that_the_model_sees(tmp_path):
    Image.new('RGBA', (1000, 800), (255, 250, 255, 0)).save(tmp_path/'logo.png')
    with Image.open(BytesIO(small(tmp_path/'logo.png'))) as im: assert min(im.convert('RGB').getpixel((40, 30))) > 240

def test_a_rotation_that_is_not_applied_is_said(tmp_path):
    im = Image.new('RGB', (60, 30))
    exif = im.getexif(); exif[0x0112] = 6
    im.save(tmp_path/'phone.jpg', exif=exif)
    assert 'its EXIF rotation is not applied' in AnnotatePanel(str(tmp_path)).view.value

def test_pictures_of_other_kinds_are_named(tmp_path):
    (tmp_path/'IMG_1.HEIC').write_bytes(b'x')
    assert AnnotatePanel(str(tmp_path)).said == f'There is no picture in {tmp_path}: add some. Not shown, since such files cannot be read: IMG_1.HEIC. Save them as JPG or PNG.'
    assert AnnotatePanel(str(album_of(tmp_path))).said.endswith('cannot be read: IMG_1.HEIC. Save them as JPG or PNG.')

def test_a_folder_must_be_named():
    panel = AnnotatePanel()
    panel.go.click()
    assert panel.said == 'Type a folder of pictures, or choose one.'
