"Merging and asking by clicking: every case is driven as a browser would, by setting fields and clicking."
import json, shutil, time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from minicpmv_nb import answer_panels, merging
from minicpmv_nb.answer_panels import ChatPanel, MergePanel
from minicpmv_nb.chat import Chat, answer_file
from minicpmv_nb.config import lora
from minicpmv_nb.families import read_config
from minicpmv_nb.merging import find_folders, merge, named_base
from minicpmv_nb.model import load, save, tiny_checkpoint
from minicpmv_nb.tuning import tune
from support import QUESTION, draw_data, entry, talk

STEPS = dict(max_new_tokens=6)


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    "A folder of runs with one adapter that changes everything, parts trained in full included."
    folder = tmp_path_factory.mktemp('runs')
    torch.manual_seed(1)
    model = load(tiny)
    model.name_or_path = str(tiny)
    tuned = tune(model, lora(str(tiny), 'train.json', lora_r=4, tune_vision=True, tune_resampler=True, tune_embeddings=True))
    with torch.no_grad(): [p.add_(torch.randn_like(p)*.3) for p in tuned.parameters() if p.requires_grad]
    for name in ('checkpoint-20', 'final'):
        tuned.save_pretrained(folder/'one'/name, save_embedding_layers=False)
        (folder/'one'/name/'minicpmv_nb.json').write_text(json.dumps(dict(max_slice_nums=2)))
    return folder

@pytest.fixture
def data(tmp_path): return draw_data(tmp_path, 6)

@pytest.fixture
def loads(monkeypatch):
    "What was loaded, in order."
    seen, real = [], Chat.load.__func__
    monkeypatch.setattr(Chat, 'load', classmethod(lambda cls, *a, **k: seen.append([Path(p).name for p in a]) or real(cls, *a, **k)))
    return seen

def chat_of(runs, **how):
    panel = ChatPanel(runs=runs, **how)
    panel.max_new_tokens.value = 6
    return panel

def ask(panel, question=QUESTION, path=None):
    panel.question.value = question
    if path is not None: panel.path.value = str(path)
    panel.go.click()
    return panel.join().values()


def test_adapters_and_their_base_are_found(runs, tiny, tmp_path):
    assert [f.name for f in find_folders(runs)] in (['final', 'checkpoint-20'], ['checkpoint-20', 'final']) # written in the same moment
    assert named_base(runs/'one'/'final') == str(tiny) and named_base(tmp_path) == '' == named_base('')
    (tmp_path/'config.json').write_text('{"model_name_or_path": "elsewhere"}'); (tmp_path/'final').mkdir()
    assert named_base(tmp_path/'final') == 'elsewhere' # a full run says it in its settings

def test_merging_by_clicking(runs, tiny, tmp_path):
    panel, merged = MergePanel(runs=runs), []
    panel.on_merge.append(merged.append)
    panel.found.value = str(runs/'one'/'final')
    assert (panel.base.value, panel.out.value) == (str(tiny), str(runs/'one'/'merged')) and panel.values()['needed'] > 1e6
    panel.out.value = str(tmp_path/'mine')
    panel.found.value = str(runs/'one'/'checkpoint-20')
    assert panel.out.value == str(tmp_path/'mine') # what the user wrote stays
    panel.go.click(); panel.join(300)
    assert merged == [tmp_path/'mine'] and panel.values()['confirmed'].startswith('merged checkpoint confirmed: logits differ by') and (tmp_path/'mine'/'model.safetensors').is_file()
    panel.go.click(); panel.join()
    assert 'exists and is not empty' in panel.said and merged == [tmp_path/'mine'] and panel.values()['done'] is None

@pytest.mark.parametrize('check', [True, False])
def test_what_a_merge_found_and_what_it_left_out(check, runs, tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path/'base')
    (base/'config.json').write_text(json.dumps(read_config(tiny) | dict(auto_map=dict(AutoModel='modeling_minicpmv.MiniCPMV'))))
    panel = MergePanel(str(base), str(runs/'one'/'final'), str(tmp_path/'out'), runs)
    panel.check.value = check
    panel.go.click(); panel.join(300)
    assert 'modeling_minicpmv.py' in panel.said and ('the check was left out' in panel.said) != check
    assert panel.values()['confirmed'].startswith('merged checkpoint confirmed' if check else '') and bool(panel.values()['confirmed']) == check and '.py' not in panel.values()['confirmed']

def test_a_merge_is_stopped_between_two_files(runs, tiny, tmp_path, monkeypatch):
    base = save(load(tiny).state_dict(), tiny, tmp_path/'base', max_shard='1MB')
    panel, real = MergePanel(str(base), str(runs/'one'/'final'), str(tmp_path/'out'), runs), merging.merge_file
    monkeypatch.setattr(merging, 'merge_file', lambda file, *a: (real(file, *a), panel.stop.click()))
    panel.go.click(); panel.join()
    assert panel.said.startswith('The merge was stopped') and not list(tmp_path.glob('out*')) and panel.bar.value == 1 < panel.bar.max-1
    assert panel.stop.disabled and not panel.go.disabled

def test_a_full_disk_is_noticed_before(runs, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(merging.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 90, 10))
    panel = MergePanel(adapter=str(runs/'one'/'final'), out=str(tmp_path/'out'), runs=runs)
    assert '10 bytes are free' in panel.facts.value and answer_panels.TONES['wrong'] in panel.facts.value
    panel.go.click(); panel.join()
    assert 'make room' in panel.said and not list(tmp_path.glob('out*'))

def test_the_base_answers_as_if_there_were_no_adapter(runs, tiny, data, loads):
    wide = data.with_name('3.png') # cut into more pieces by the base than by the adapter
    panel = chat_of(runs, adapter=runs/'one'/'final')
    said = ask(panel, path=wide)
    again = ask(panel, 'And now?')
    assert loads == [[tiny.name, 'final']] # one set of weights
    for role, alone in (('base', Chat.load(tiny)), ('tuned', Chat.load(tiny, runs/'one'/'final'))):
        first, so_far = alone.chat(wide, QUESTION, **STEPS)
        assert said[role] == first and again[role] == alone.chat(None, 'And now?', so_far, **STEPS)[0]
    assert said['base'] != said['tuned'] and panel.chats['base'].processor.sizes != panel.chats['tuned'].processor.sizes

def test_a_second_model_comes_only_when_it_is_asked_for(runs, tiny, data, tmp_path, loads):
    merged = merge(tiny, runs/'one'/'final', tmp_path/'merged', check=False)
    panel = chat_of(runs, tuned=merged, base=tiny)
    ask(panel, path=data.with_name('0.png')); said = ask(panel, 'Why?')
    assert loads == [['merged']] and said['base'] is None and said['exchanges'] == 2
    panel.compare.value = True; panel.join() # catches up with the whole conversation
    assert loads == [['merged'], [tiny.name]] and all(e.replies['base'].done for e in panel.history)
    first, so_far = Chat.load(tiny).chat(data.with_name('0.png'), QUESTION, **STEPS)
    assert [e.replies['base'].text for e in panel.history] == [first, Chat.load(tiny).chat(None, 'Why?', so_far, **STEPS)[0]]
    del loads[:]
    panel.release.click(); ask(panel, 'Sure?')
    assert loads == [['merged'], [tiny.name]] and panel.values()['exchanges'] == 3
    panel.tuned.value = ''
    assert panel.values()['exchanges'] == 0 and panel.chats == {} and ask(panel, path='')['tuned'] is None

def test_pictures_by_folder_and_upload_go_once(runs, tiny, data):
    panel = chat_of(runs, base=tiny)
    panel.path.value = str(data.parent)
    assert panel.files.layout.display == '' and [name for name, _ in panel.files.options] == [f'{i}.png' for i in range(6)]
    panel.files.value = (str(data.with_name('0.png')), str(data.with_name('1.png')))
    content = data.with_name('2.png').read_bytes()
    panel.upload.value = ({'name': '../<u>.png', 'type': 'image/png', 'size': len(content), 'content': memoryview(content), 'last_modified': datetime.now(timezone.utc)},)
    assert panel.preview.value.count('<img') == 3 and '<u>' not in panel.preview.value
    assert [Path(p).name for p in ask(panel)['picture']] == ['0.png', '1.png', '<u>.png'] and panel.preview.value.count('shown before') == 3
    panel.path.value = str(data.with_name('3.png'))
    assert 'New conversation starts over' in panel.preview.value
    panel.path.value = str(data.parent)
    assert 'starts over' not in panel.preview.value
    panel.files.value = (str(data.with_name('0.png')), str(data.with_name('1.png')))
    assert ask(panel, 'And?')['picture'] == [] and [len(e.pictures) for e in panel.history] == [3, 0]
    panel.anew.click()
    assert len(ask(panel)['picture']) == 3
    panel.clear.click()
    assert panel.preview.value == '' and panel.chosen() == []

def test_settings_reach_the_model(runs, tiny, monkeypatch):
    seen, real = [], Chat.answer
    monkeypatch.setattr(Chat, 'answer', lambda self, turns, pictures, **how: seen.append((turns, how)) or real(self, turns, pictures, **how))
    panel = chat_of(runs, base=tiny)
    panel.system.value, panel.temperature.value = 'Be brief.', .5
    ask(panel)
    assert seen[0][0][0].role == 'system' and seen[0][1]['temperature'] == .5 and seen[0][1]['max_new_tokens'] == 6 and panel.system.disabled and panel.thinking.disabled
    ask(panel, 'More?')
    assert [t.role for t in seen[1][0]] == ['system', 'user', 'assistant', 'user'] # once
    panel.anew.click()
    assert not panel.system.disabled

def test_thinking_where_the_family_can(tmp_path):
    folder = tiny_checkpoint(tmp_path/'4.5', [QUESTION], '4.5')
    panel = chat_of(tmp_path, base=folder)
    assert not panel.thinking.disabled
    panel.thinking.value = True
    assert ask(panel)['base'] == '' and panel.history[0].replies['base'].text.startswith('<think>') # it did not come to an end

def test_what_is_written_is_escaped(runs, tiny, monkeypatch):
    monkeypatch.setattr(Chat, 'answer', lambda self, turns, pictures, watch, **how: (watch('<script>x'), '<script>x')[1])
    panel = chat_of(runs, base=tiny)
    ask(panel, '<b>bold</b>')
    assert '<script>' not in panel.talk.value and '<b>' not in panel.talk.value and '&lt;script&gt;' in panel.talk.value

def test_an_answer_is_stopped_and_drawn_while_it_grows(runs, tiny, monkeypatch):
    def answer(self, turns, pictures, watch, **how):
        said = 'a'
        while not watch(said): said += 'a'; time.sleep(.03)
        return said
    monkeypatch.setattr(Chat, 'answer', answer)
    panel, drawn = chat_of(runs, base=tiny), []
    panel.talk.observe(lambda change: 'aaaaa' in change.new and 'writing' in change.new and (drawn.append(change.new), panel.stop.click()), 'value')
    assert ask(panel)['message'] == 'Stopped.' and len(drawn) == 1 and 'writing' not in panel.talk.value
    assert panel.values()['base'] == 'a'*panel.history[0].replies['base'].tokens and panel.stop.disabled and not panel.go.disabled

def test_generation_ends_when_it_is_told_to(tiny):
    seen = []
    said = Chat.load(tiny).chat(None, QUESTION, max_new_tokens=50, watch=lambda text: seen.append(text) or len(seen) == 2)[0]
    assert seen[-1] == said and len(seen) == 2 and said.startswith(seen[0])

def test_entries_of_a_file(runs, tiny, data):
    entries = json.loads(data.read_text())
    entries[1] = entry('two', {'<image_00>': '0.png', '<image_01>': '1.png'}, [dict(role='system', content='Be brief.'), *talk('Both.', 'First <image_00> then <image_01> compare.')])
    data.write_text(json.dumps(entries))
    panel = chat_of(runs, base=tiny)
    panel.data.value = str(data)
    panel.open.click(); panel.join()
    assert panel.question.value == QUESTION and panel.entry.max == 5
    panel.next.click()
    assert panel.system.value == 'Be brief.' and 'Both.' in panel.expected.value
    panel.go.click(); said = panel.join().values()
    want = answer_file(Chat.load(tiny), data, **STEPS)
    assert said['expected'] == 'Both.' and said['base'].strip() == want[1]['answer'].strip() and 'not as expected' in panel.talk.value # pictures stand inside the text
    ask(panel, 'Something else?')
    assert panel.values()['expected'] is None
    for _ in range(9): panel.next.click()
    assert panel.entry.value == 5
    panel.examine_all.click(); panel.join()
    assert panel.answers['base'] == want and panel.values()['scores']['base']['entries'] == 6

def test_a_file_is_stopped_and_limited(runs, data):
    panel = chat_of(runs, adapter=runs/'one'/'final')
    panel.data.value, panel.limit.value = str(data), 4
    panel.bar.observe(lambda change: panel.stop.click() if change.new == 2 else None, 'value')
    panel.examine_all.click(); panel.join()
    assert panel.said.startswith('Stopped. Exact match: tuned 0.000 of 2') and panel.values()['scores'].keys() == {'tuned'} and panel.bar.max == 4

def test_an_answer_that_is_being_written_does_not_enter_the_next_conversation(runs, tiny, tmp_path, monkeypatch):
    other, seen = shutil.copytree(tiny, tmp_path/'other'), []
    def answer(self, turns, pictures, watch, **how):
        seen.append([t.parts[-1] for t in turns])
        if len(seen) == 1: panel.base.value = str(other) # meanwhile
        return 'ended' if watch('so far') else 'whole'
    monkeypatch.setattr(Chat, 'answer', answer)
    panel = chat_of(runs, base=tiny)
    left = ask(panel, 'Old?')
    assert left['exchanges'] == 0 and left['message'] == 'The conversation was left while base was answering: that answer is dropped.' and panel.talks == {} == panel.chats
    assert ask(panel, 'New?')['base'] == 'whole' and seen == [['Old?'], ['New?']]

def test_a_tilde_is_the_home(runs, tiny, data, monkeypatch):
    monkeypatch.setenv('HOME', str(tiny.parent))
    merging_panel = MergePanel(f' ~/{tiny.name}', str(runs/'one'/'final'), '~/out', runs)
    assert merging_panel.facts.value.startswith('<span') and merging_panel.needed > 1e6
    monkeypatch.setenv('HOME', str(data.parent))
    panel = chat_of(runs, base=tiny)
    panel.path.value = '~/0.png '
    assert panel.chosen() == [data.with_name('0.png')] and panel.preview.value.count('<img') == 1
    panel.path.value = '~'
    assert len(panel.files.options) == 6
    panel.data.value = f'~/{data.name}'
    panel.open.click(); panel.join()
    assert len(panel.samples) == 6

def test_tags_that_are_text(runs, tiny, data):
    entries = json.loads(data.read_text())
    entries[1]['conversations'][1]['content'] = 'An <image> tag.'
    data.write_text(json.dumps(entries))
    panel = chat_of(runs, base=tiny)
    panel.data.value, panel.limit.value = str(data), 2
    panel.open.click(); panel.join()
    assert len(panel.samples) == 5 and "panel.extra_image_tags = 'literal'" in panel.said
    panel.examine_all.click(); panel.join()
    assert "panel.extra_image_tags = 'literal'" in panel.said and 'take them out' in panel.said and panel.chats == {} # no model is loaded for this
    panel = chat_of(runs, base=tiny, extra_image_tags='literal')
    panel.data.value, panel.limit.value = str(data), 2
    panel.open.click(); panel.join()
    assert len(panel.samples) == 6 and 'literal' not in panel.said
    panel.examine_all.click(); panel.join()
    assert [a['expected'] for a in panel.answers['base']][1] == 'An <image> tag.'

@pytest.mark.parametrize('fields, words', [(dict(), 'Name a model first'), (dict(tuned='nowhere'), 'There is no folder nowhere'), (dict(base='base', question=' '), 'Write a question'),
    (dict(base='base', path='nowhere.png'), 'nowhere.png does not exist'), (dict(tuned='adapter', base='other'), 'trained on other weights'), (dict(base='base', compare=True, tuned='base'), '')])
def test_errors_are_sentences(runs, tiny, tmp_path, fields, words):
    adapter = shutil.copytree(runs/'one'/'final', tmp_path/'adapter')
    (adapter/'minicpmv_nb.json').write_text(json.dumps(dict(base=merging.fingerprint(tiny))))
    places = dict(base=str(tiny), adapter=str(adapter), other=str(tiny_checkpoint(tmp_path/'other', [QUESTION], seed=5)))
    panel = chat_of(runs)
    panel.question.value = QUESTION
    for name, value in fields.items(): getattr(panel, name).value = places.get(value, value)
    panel.go.click(); panel.join()
    assert panel.said.startswith(words) or words in panel.said
    assert bool(panel.values()['exchanges']) == (not words)
