"What the tabs of the workbench hand on: what was done, never over what was typed."
import json, threading

import pytest

from minicpmv_nb.jobs import Run
from minicpmv_nb.workbench import Workbench
from support import draw_data


@pytest.fixture
def bench(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('one.json', 'two.json', 'three.json'): draw_data(tmp_path, 4, name)
    bench = Workbench(model=str(tiny), data='one.json')
    yield bench
    bench.close()

def through(bench, path): # Check another file, and go to the settings; the data they have then
    bench.go_to('data')
    bench.data.path.value = path
    bench.go_to('config')
    return bench.config.values()['data_path']

def test_another_file_reaches_the_settings_unless_one_was_typed(bench, tiny):
    assert bench.step == 'data'
    assert [through(bench, name) for name in ('one.json', 'two.json')] == ['one.json', 'two.json'] and bench.config.values()['model_name_or_path'] == str(tiny)
    bench.config.set(data_path='three.json')
    assert through(bench, 'one.json') == 'three.json'

def finished(folder, tiny): # What a LoRA run leaves, as far as it matters here
    (folder/'final').mkdir(parents=True)
    (folder/'final'/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(tiny))))
    return Run(folder.absolute())

def test_another_run_is_the_one_to_merge_and_ask(bench, tiny, tmp_path):
    for name in ('first', 'second'):
        bench.run.run = finished(tmp_path/'runs'/name, tiny)
        for step, field in (('merge', bench.merge.adapter), ('chat', bench.chat.tuned)):
            bench.go_to(step)
            assert field.value == f'runs/{name}/final'
    bench.merge.adapter.value = 'elsewhere'
    bench.run.run = finished(tmp_path/'runs'/'third', tiny)
    bench.go_to('merge')
    assert bench.merge.adapter.value == 'elsewhere'

def test_merged_is_what_is_asked(bench, tiny, tmp_path):
    bench.run.run = finished(tmp_path/'runs'/'first', tiny)
    bench.go_to('merge')
    bench.merge.done = tmp_path/'runs'/'first'/'merged'
    bench.merged(bench.merge.done)
    bench.go_to('chat')
    assert bench.chat.tuned.value == 'runs/first/merged'

def test_a_merge_leaves_what_was_typed_and_what_is_answering(bench, tiny, tmp_path):
    bench.run.run = finished(tmp_path/'runs'/'first', tiny)
    for step in ('merge', 'chat'): bench.go_to(step)
    assert bench.chat.base.value == str(tiny) # which the adapter says
    bench.merge.done, go_on = tmp_path/'runs'/'first'/'merged', threading.Event()
    bench.chat.start(go_on.wait)
    bench.merged(bench.merge.done)
    assert bench.chat.tuned.value == 'runs/first/final'
    go_on.set(); bench.chat.join()
    bench.merged(bench.merge.done)
    assert (bench.chat.tuned.value, bench.chat.base.value) == ('runs/first/merged', str(tiny))
    bench.chat.base.value = 'my base'
    bench.merged(bench.merge.done)
    assert bench.chat.base.value == 'my base'
    bench.chat.tuned.value = 'my model'
    bench.merged(bench.merge.done)
    assert (bench.chat.tuned.value, bench.chat.base.value) == ('my model', 'my base')

def test_a_run_cuts_pictures_as_the_check_did_unless_something_else_was_typed(bench):
    def checked(slices): # What the settings have after a check with so many
        bench.go_to('data')
        bench.data.slices.value = slices
        bench.data.go.click(); bench.data.join()
        bench.go_to('config')
        return bench.config.config.max_slice_nums
    assert [checked(n) for n in (4, 6)] == [4, 6] and bench.config.config.model_max_length == 2048
    bench.data.pixels.value = True
    assert checked(6) == 6 and bench.config.config.check_pixels
    bench.data.pixels.value = False
    assert checked(6) == 6 and not bench.config.config.check_pixels
    for typed in (2, 9): # 9 is where the form began
        bench.config.set(max_slice_nums=typed)
        assert checked(5) == typed
