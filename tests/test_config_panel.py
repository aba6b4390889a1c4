"The form says what the configuration says, refuses what launch refuses, and starts a run."
import json, threading
from dataclasses import replace
from datetime import datetime, timezone

import pytest

from support import SCRIPTS, entry, write_data
from minicpmv_nb.config import NAMES, PRESETS, _rules, Config, better_values, documented, faults, from_script, full, lora, named_fields, qlora, recommended, save_config
from minicpmv_nb.config_panel import ConfigPanel, make_rows
from minicpmv_nb.panels import Later
from minicpmv_nb.planning import MemoryPanel, as_code, count_steps, read_settings
from minicpmv_nb.diagnosis import Machine
from minicpmv_nb.jobs import launch

SMALL = dict(use_cpu=True, gpus=1, fp16=False, deepspeed=None, tune_vision=False, report_to='none', dataloader_num_workers=0, max_steps=2, save_steps=100)
KINDS = [lora('m', 'd.json'), qlora('m', 'd.json', 'e.json', lora_r=8), full('m', 'd.json', tune_llm=False, bf16=True, fp16=False), Config('m', "it's here.json"), Config('m', 'd', fp16=True, save_total_limit=None, deepspeed='mine.json', offload='optimizer'),
    lora('m', 'd.json', lora_target_modules=r'llm\..*layers\.\d+\.(a|b)', learning_rate=3.3e-5, gradient_checkpointing_vision=False, num_train_epochs=2.5, max_steps=-1, do_eval=False, output_dir='a folder/with spaces', nnodes=2, node_rank=1, master_addr='10.0.0.1')]


@pytest.fixture
def panel(tiny, drawn):
    "A form that could launch two steps on the CPU."
    form = ConfigPanel(lora(str(tiny), str(drawn), **SMALL), machine=Machine(), delay=0)
    yield form
    form.later.join() # a thread that is at work in torch when Python ends takes it down

def executed(code):
    "The configuration that the shown code makes, and the name it launches with."
    asked = []
    source = code.replace('from minicpmv_nb import', '# ')
    exec(source, dict(PRESETS, launch=lambda cfg, name=None: asked.append((cfg, name))))
    return asked[0]

def typed(panel, name, text): panel.rows[name].widgets[0].value = text


# --- the same as Config ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('cfg', KINDS, ids=range(len(KINDS)))
def test_the_form_says_what_it_was_given(cfg):
    form = ConfigPanel(cfg, machine=Machine(), delay=99)
    assert form.config == cfg
    told = form.values()
    assert PRESETS[told.pop('method')](**told) == cfg

@pytest.mark.parametrize('cfg', KINDS, ids=range(len(KINDS)))
def test_the_code_makes_the_same(cfg): assert executed(as_code(cfg, "o'clock")) == (cfg, "o'clock") and executed(as_code(cfg)) == (cfg, None)

def test_code_has_only_what_differs(panel):
    panel.show(lora('m', 'd', learning_rate=3e-5))
    assert panel.code == "from minicpmv_nb import launch, lora\n\ncfg = lora('m', 'd',\n    learning_rate=3e-05)\nrun = launch(cfg)"

def test_every_field_has_a_row_with_its_own_comment():
    rows = make_rows()
    assert tuple(rows) == NAMES == tuple(documented())
    for name, row in rows.items(): assert documented()[name]['meaning'] in row.widgets[0].tooltip and (row.widgets[0].description or 'method' in row.box.children[0].value)

def test_every_row_is_in_the_form_once(panel):
    def leaves(w): return [w] if not getattr(w, 'children', ()) else [x for c in w.children for x in leaves(c)]
    shown = leaves(panel.box)
    for row in panel.each: assert [shown.count(w) for w in row.widgets] == [1]*len(row.widgets)

def test_a_new_form_has_the_recommended_values():
    form = ConfigPanel(machine=Machine(), delay=99)
    assert not better_values(form.config) and form.source.value and form.config.use_lora

def test_every_message_names_a_field():
    for cfg in (lora('m', 'd'), full('m', 'd')):
        assert all(named_fields(message) for _, message in _rules(cfg))


# --- method and values -----------------------------------------------------------------------------------------------

def test_what_was_set_by_hand_outlives_a_change_of_method(panel):
    panel.show(lora('m', 'd')).set(lora_r=8, tune_vision=False)
    panel.set(method='full', tune_vision=True)
    assert panel.config == full('m', 'd', lora_r=8)
    panel.set(method='qlora')
    assert panel.config == qlora('m', 'd', lora_r=8) # a value that is the preset's own follows the preset

@pytest.mark.parametrize('name, text', [('num_train_epochs', '1.50'), ('num_train_epochs', '10'), ('weight_decay', '0.01'), ('learning_rate', '1e-05'), ('max_steps', '1000'), ('data_path', '/data/my pictures/d.json')])
def test_nothing_is_rewritten_while_it_is_typed(name, text):
    form = ConfigPanel(machine=Machine(), delay=99)
    for n in range(1, len(text)+1):
        typed(form, name, text[:n])
        assert form.rows[name].widgets[0].value == text[:n]

def test_recommended_and_back(panel):
    panel.show(lora('m', 'd', lora_r=8))
    before = panel.config
    panel.source.value = True
    assert panel.config.bf16 and not panel.config.fp16 and panel.config.learning_rate == 1e-4 and panel.config.lora_r == 8
    assert 'the guide has 1e-6: at 1e-6 an update' in panel.rows['learning_rate'].note.value and 'bf16: the guide has False' in panel.rows['bf16'].note.value
    panel.source.value = False
    assert panel.config == before and '0.0001 is recommended' in panel.rows['learning_rate'].note.value

def test_an_evaluation_file_switches_evaluation_on(panel):
    panel.show(lora('m', 'd'))
    typed(panel, 'eval_data_path', 'e.json')
    assert panel.config == lora('m', 'd', 'e.json')
    typed(panel, 'eval_data_path', '')
    assert panel.config == lora('m', 'd')

def test_unknown_names_and_impossible_pairs(panel):
    with pytest.raises(TypeError, match='no setting .lr.. Did you mean learning_rate'): panel.set(lr=1)
    with pytest.raises(ValueError, match='use_lora and q_lora cannot be False and True together'): panel.set(use_lora=False, q_lora=True)
    panel.set(max_steps=5)
    assert panel.config.max_steps == 5 # nothing is stuck


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, text, said', [('learning_rate', '1e-', "learning_rate is '1e-': expected float."), ('lora_r', '0', 'lora_r is 0: it must be positive.'), ('lora_r', '', 'lora_r is None: expected int.'),
    ('max_steps', '1.5', "max_steps is '1.5': expected int."), ('weight_decay', 'nan', 'weight_decay is nan: it must be a finite number.'), ('data_path', 'gone.json', 'There is no file gone.json.'), ('lr_scheduler_type', 'cosin', 'Did you mean cosine?'),
    ('model_name_or_path', './gone', 'There is no folder gone.'), ('lora_target_modules', 'llm(', 'lora_target_modules is no regular expression'), ('gpus', '2', None), ('llm_type', 'qwen', "whose llm_type is 'llama3'"), ('warmup_ratio', '3', 'warmup_ratio is 3.0')])
def test_beside_the_field_while_typing(panel, name, text, said):
    assert not panel.go.disabled and panel.wrong == {}
    typed(panel, name, text)
    if said is None: assert panel.wrong == {}; return # two processes on the CPU are fine
    assert list(panel.wrong) == [name] and said in panel.rows[name].wrong
    assert '✗' in panel.rows[name].note.value and 'role="alert"' in panel.rows[name].note.value
    assert panel.go.disabled and 'Launch is off: ' in panel.why.value and panel.script == ''
    panel.go.click(); panel.join()
    assert panel.run is None and panel.said.startswith('Nothing was launched. ')

def test_two_wrong_fields_are_both_told(panel):
    typed(panel, 'learning_rate', '1e-'); typed(panel, 'data_path', 'gone.json'); panel.set(tune_llm=True)
    assert set(panel.wrong) == {'learning_rate', 'data_path', 'tune_llm'} and '2 more' in panel.why.value
    with pytest.raises(ValueError, match='learning_rate'): panel.config
    assert panel.values()['learning_rate'] == '1e-' and panel.code == ''

def test_a_fold_says_that_something_in_it_is_wrong(panel):
    typed(panel, 'adam_beta1', 'x')
    assert panel.more.titles == tuple('optimiser: ✗ 1 to mend' if s == 'optimiser' else s for s, _ in panel.sections)
    typed(panel, 'adam_beta1', '0.9')
    assert panel.more.titles == tuple(s for s, _ in panel.sections) and not panel.go.disabled

def test_more_gpus_than_there_are(panel, monkeypatch):
    monkeypatch.setattr('minicpmv_nb.jobs._gpus', lambda cfg: 1)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda **kw: True)
    panel.set(use_cpu=False, gpus=2)
    assert '2 GPUs are asked for and this machine has 1' in panel.wrong['gpus']

def test_text_of_files_is_escaped(panel):
    typed(panel, 'data_path', '<img src=x>.json')
    html = panel.rows['data_path'].note.value + panel.why.value + panel.code_view.value
    assert '<img' not in html and '&lt;img' in html

def test_broken_data_file_is_told_beside_it(panel, tmp_path):
    (tmp_path/'broken.json').write_text('[1,')
    typed(panel, 'data_path', str(tmp_path/'broken.json')); panel.later.join()
    assert 'is not valid JSON' in panel.wrong['data_path'] and panel.go.disabled

def test_what_the_model_has_against_it_comes_with_the_estimate(panel):
    typed(panel, 'lora_target_modules', 'llm.nothing'); panel.later.join()
    assert 'matches no linear layer' in panel.wrong['lora_target_modules'] and panel.go.disabled
    typed(panel, 'lora_target_modules', 'llm.mlp'); panel.later.join()
    assert panel.wrong == {} and panel.memory.estimate.total > 0


# --- steps and memory ------------------------------------------------------------------------------------------------

def test_the_estimate_follows_the_form(panel):
    from minicpmv_nb import estimate
    panel.later.join()
    assert panel.memory.estimate.rows == estimate(panel.config, 1).rows and 'heaviest of the 24 samples' in panel.memory.table.value and '<img' in panel.memory.picture.value
    first = panel.memory.estimate
    panel.set(learning_rate=3e-5); panel.later.join()
    assert panel.memory.estimate is first # it does not depend on that
    panel.set(per_device_train_batch_size=4); panel.later.join()
    assert panel.memory.estimate.total > first.total

def test_typing_is_not_estimated(panel, monkeypatch):
    asked = []
    panel.later.join()
    panel.later.delay = 99
    monkeypatch.setattr(panel.memory, 'reckon', lambda cfg, gpus: asked.append(cfg.lora_r))
    for r in (1, 12): panel.set(lora_r=r)
    assert 'estimating' in panel.memory.said and asked == []
    panel.later.delay = 0
    panel.set(lora_r=128); panel.later.join()
    assert asked == [128]

def test_a_failed_request_takes_none_with_it(caplog):
    begun, go, seen = threading.Event(), threading.Event(), []
    def work(x): begun.set(); go.wait(10); seen.append(1/x)
    later = Later(work, 0)
    later.ask(0); begun.wait(10)
    later.ask(1); go.set(); later.join() # asked for while the other one is at work
    assert seen == [1] and 'ZeroDivisionError' in caplog.text

@pytest.mark.parametrize('name', ['data_path', 'eval_data_path', 'model_name_or_path', 'output_dir'])
@pytest.mark.parametrize('path', ['~nobodyhere/x.json', 'a'*300])
def test_an_impossible_path_is_told(panel, name, path):
    panel.set(**{name: path}, **(dict(do_eval=True) if name == 'eval_data_path' else {}))
    panel.later.join()
    assert panel.wrong and panel.go.disabled

def test_a_file_that_only_looks_like_one(panel, tmp_path):
    (tmp_path/'deep.json').write_text('['*200_000)
    panel.set(data_path=str(tmp_path/'deep.json')); panel.later.join()
    assert 'data_path' in panel.wrong and 'estimating' not in panel.memory.said

def test_the_estimate_follows_from_the_cpu_to_the_gpu(panel):
    panel.later.join()
    panel.memory.machine = replace(panel.memory.machine, gpus=(('card', 80.0),))
    panel.set(use_cpu=False); panel.later.join()
    assert panel.memory.said.startswith('✓ It fits. Each GPU needs')
    panel.set(use_cpu=True); panel.later.join()
    assert 'on the CPU needs' in panel.memory.said

def test_without_a_gpu_the_form_reckons_with_the_cpu(panel):
    panel.set(use_cpu=False, gpus=None); panel.later.join()
    assert 'CPU process' in panel.steps and panel.memory.said.startswith('✓ It fits. 1 process on the CPU needs')

def test_a_model_of_a_hub_is_not_downloaded(monkeypatch):
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda *a, **kw: pytest.fail('downloads'))
    memory = MemoryPanel(Machine(gpus=(('card', 10.0),)))
    memory.reckon(lora('openbmb/MiniCPM-V-4', 'd', bf16=True, fp16=False, tune_vision=False, per_device_train_batch_size=1, max_slice_nums=1, model_max_length=128, deepspeed=None), 1)
    assert memory.said.startswith('✗ It does not fit.') and 8 < memory.values()['total'] < 40
    memory.reckon(lora('somebody/else', 'd'), 1)
    assert 'is not on this machine' in memory.said and memory.values()['total'] is None and memory.fault == ''


# --- scripts and earlier runs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('file', ['finetune_lora.sh', 'finetune_qlora.sh', 'finetune_ds.sh'])
def test_script_of_the_guide(panel, file):
    panel.path.value = str(SCRIPTS/file); panel.load_path.click()
    assert panel.config == from_script(SCRIPTS/file) and 'gpus=8' in panel.said and '--label_names has no effect' in panel.said

def test_uploaded(panel, tmp_path):
    save_config(lora('m', 'd', lora_r=3), tmp_path/'config.json', versions={})
    content = (tmp_path/'config.json').read_bytes()
    panel.upload.value = (dict(name='../config.json', type='', size=len(content), content=memoryview(content), last_modified=datetime.now(timezone.utc)),)
    assert panel.config == lora('m', 'd', lora_r=3) and panel.said.startswith('config.json was read: lora. It differs from the preset in: lora_r=3.')

def test_what_cannot_be_loaded_is_told_and_changes_nothing(panel, tiny):
    before = panel.config
    for path, said in ((tiny/'config.json', 'is no config.json of a run'), ('gone.sh', 'There is no file gone.sh')):
        panel.path.value = str(path); panel.load_path.click()
        assert said in panel.said and panel.config == before

@pytest.mark.parametrize('stage', [2, 3])
def test_an_earlier_run_again(tiny, drawn, tmp_path, stage):
    asked = lora(str(tiny), str(drawn), **SMALL | dict(deepspeed=f'ds_config_zero{stage}.json'), output_dir=str(tmp_path/'old run'))
    run = launch(asked, start=False)
    assert read_settings(run.folder)[0] == replace(asked, output_dir=None)
    form = ConfigPanel(read_settings(run.folder)[0], machine=Machine(), delay=99).set(per_device_train_batch_size=5)
    assert form.wrong == {} # our DeepSpeed file follows the batch

def test_a_deepspeed_file_of_ones_own_is_kept(tiny, drawn, tmp_path):
    (tmp_path/'mine.json').write_text(json.dumps(dict(zero_optimization=dict(stage=2, overlap_comm=True))))
    run = launch(lora(str(tiny), str(drawn), **SMALL | dict(deepspeed=str(tmp_path/'mine.json')), output_dir=str(tmp_path/'run')), start=False)
    assert read_settings(run.folder)[0].deepspeed == str(run.folder/'deepspeed.json')


# --- the button ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [{}, dict(deepspeed='ds_config_zero2.json', gpus=2, nccl_ib_disable=True)])
def test_run_sh_is_the_one_that_launch_writes(panel, tmp_path, changes):
    panel.set(output_dir=str(tmp_path/"it's a run"), **changes)
    shown = panel.script
    run = launch(panel.config, start=False)
    assert shown == run.file('run.sh').read_text() and 'torch.distributed.run' in shown

def test_bad_entries_are_a_table(panel, tmp_path):
    data = write_data(tmp_path, [entry('0'), entry('<b>', image='gone.png'), entry('0')])
    panel.set(data_path=str(data), output_dir=str(tmp_path/'run'))
    panel.go.click(); panel.join()
    assert panel.run is None and '2 of 3 entries of data.json cannot be used' in panel.said and 'gone.png' in panel.problems.value and '<b></td>' not in panel.problems.value
    assert not (tmp_path/'run').exists() and not panel.go.disabled

def test_taken_name_is_told_beside_the_name(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel.name.value = 'mine'
    assert 'runs/mine' in panel.script and panel.code.endswith("run = launch(cfg, name='mine')")
    launch(panel.config, name='mine', start=False)
    panel.refresh()
    assert 'holds a run already' in panel.wrong['name'] and '✗' in panel.name_note.value and panel.go.disabled

@pytest.mark.slow
def test_launched_by_the_button(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heard = []
    panel.on_launch.append(heard.append)
    panel.set(max_steps=-1, num_train_epochs=1.5, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    panel.name.value = 'first'
    panel.go.click(); panel.join(120)
    assert heard == [panel.run] and panel.run.folder == tmp_path/'runs'/'first' and str(panel.run.folder) in panel.said
    panel.run.wait(300)
    assert panel.run.status()['steps'] == count_steps(panel.run.config, 24, 1)[1] == 5 # 24 entries, 5 batches, 3 steps a pass
    assert panel.run.config.num_train_epochs == 1.5 and (panel.run.final/'adapter_model.safetensors').is_file()

def test_the_recommended_alpha_follows_the_rank(tiny):
    panel = ConfigPanel(delay=0)
    alpha = lambda: panel.config.lora_alpha
    panel.rows['lora_r'].widgets[0].value = '8'
    assert (panel.config.lora_r, alpha()) == (8, 16)
    panel.rows['lora_r'].widgets[0].value = 'eight'
    panel.rows['lora_r'].widgets[0].value = '32'
    assert alpha() == 64
    panel.set(lora_r=16, lora_alpha=7)
    assert (panel.config.lora_r, alpha()) == (16, 7)
    panel.set(lora_r=4)
    assert alpha() == 7 # chosen by hand
    panel.show(recommended(lora('', '', lora_r=8)))
    assert panel.source.value and (panel.config.lora_r, alpha()) == (8, 16)
    panel.source.value = False
    assert (panel.config.lora_r, alpha()) == (8, 64) and panel.values()['lora_r'] == 8
