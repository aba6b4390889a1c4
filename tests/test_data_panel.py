"The panel that shows a data file: what it shows, without a browser."
import re, time
from threading import Thread

from PIL import Image

from minicpmv_nb.data_panel import NO_MODEL, DataPanel, check_file, find_albums, find_checkpoints, find_data, kind_of, seldom
from minicpmv_nb.samples import check, counted
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

def test_very_thin_pictures_are_shown(tmp_path):
    for n, size in enumerate([(20000, 10), (1, 700)]): Image.new('RGB', size).save(tmp_path/f'{n}.png')
    panel = checked_panel(write_data(tmp_path, [entry(str(n), f'{n}.png') for n in range(2)]))
    assert panel.values()['good'] == 2 and '20000 x 10 pixels' in panel.view.value
    panel.next.click()
    assert '1 x 700 pixels' in panel.view.value

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

def test_a_hub_id_is_looked_up_as_the_command_line_does(tmp_path, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr('minicpmv_nb.data_panel.resolve', lambda name: asked.append(name) or (tiny, 'abc'))
    panel = checked_panel(draw_data(tmp_path, 2), ' openbmb/MiniCPM-V-2_6 ')
    assert asked == ['openbmb/MiniCPM-V-2_6'] and panel.values()['good'] == 2 and panel.values()['tokens']

def test_the_home_is_known(tmp_path, monkeypatch):
    draw_data(tmp_path, 2, 'd.json')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert checked_panel('~/d.json').values()['good'] == 2
    assert checked_panel('~').said == '~ is a folder: choose a data file in it.'

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

def test_progress_is_told_now_and_then():
    said = []
    for _ in counted(range(500), 'checking', seldom(said.append, .01)): time.sleep(.0005)
    assert 2 < len(said) < 60 and all(re.fullmatch(r'checking: \d+ of 500', line) for line in said)

def test_checking_and_measuring_tell_how_far_they_are(tmp_path, tiny):
    seen = []
    check_file(str(draw_data(tmp_path, 4)), str(tiny), watch=lambda *now: seen.append(now))
    assert seen == [(what, i, 4) for what in ('checking train.json', 'measuring') for i in range(4)]

def test_an_empty_panel_does_not_stumble(): assert DataPanel().values()['entries'] == 0

def test_check_file_agrees_with_check(tmp_path, tiny):
    path = faulty(tmp_path)
    checked = check_file(path, tiny)
    assert list(checked.samples) == [0, 2] and sorted(checked.faults) == [1, 3, 4, 5] and len(checked.raw) == 6
