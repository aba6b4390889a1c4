"What a configuration comes to, without running it."
import json
from dataclasses import replace

import pytest

from minicpmv_nb.config import full, lora
from minicpmv_nb.diagnosis import Machine
from minicpmv_nb.estimating import estimate
from minicpmv_nb.families import FAMILIES
from minicpmv_nb.jobs import launch
from minicpmv_nb.panels import Given, stamp
from minicpmv_nb.planning import MemoryPanel, batch_line, obstacles, plot_estimate as plot, preview, read_settings, verdict

SMALL = dict(use_cpu=True, gpus=1, fp16=False, deepspeed=None, tune_vision=False, report_to='none', dataloader_num_workers=0, max_steps=2, save_steps=100)


@pytest.fixture
def official(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(FAMILIES['2.6'].official))
    return str(tmp_path)


# --- does it fit? ----------------------------------------------------------------------------------------------------

def test_on_a_cpu_what_is_offloaded_is_in_the_same_memory(official):
    e = estimate(full(official, '', use_cpu=True, fp16=False, bf16=True, offload='optimizer', deepspeed='ds_config_zero2.json'), 2)
    assert e.host > 50 and e.total > e.host and 'what is offloaded' in str(e)
    said, tone = verdict(e, Machine(ram=80.0))
    assert tone == 'wrong' and 'Use fewer processes, or a GPU.' in said and verdict(e, Machine(ram=400.0))[1] == 'done'

def test_beside_a_gpu_what_is_offloaded_needs_the_machine(official):
    e = estimate(full(official, '', fp16=False, bf16=True, offload='optimizer', deepspeed='ds_config_zero2.json'), 2)
    card = lambda ram: Machine(gpus=(('a card', 80.0),)*2, ram=ram)
    assert verdict(e, card(128.0))[1] == 'wrong' and 'this machine has 128 GB' in verdict(e, card(128.0))[0]
    assert [verdict(e, card(ram))[1] for ram in (512.0, 0)] == ['done', 'done'] # 0: not known

def test_one_machine_has_its_own_processes_only(tiny, drawn):
    e = estimate(lora(str(tiny), str(drawn), **SMALL, nnodes=2, master_addr='10.0.0.1'), 1)
    said, tone = verdict(e, Machine(ram=1.8))
    assert (e.gpus, e.here, tone) == (2, 1, 'done') and said.startswith('✓ It fits. 1 process on the CPU needs')
    assert verdict(e, Machine(ram=.5))[0].endswith('Use a GPU.')

def test_half_precision_becomes_float32_on_a_cpu(official):
    half, single = (estimate(lora(official, '', use_cpu=True, fp16=fp16), 1).total for fp16 in (True, False))
    assert half == single

def test_a_gpu_is_not_drawn_beside_a_run_on_the_cpu(tiny, drawn, monkeypatch):
    drawn_with = []
    monkeypatch.setattr('minicpmv_nb.planning.plot_estimate', lambda e, gb=None: drawn_with.append(gb) or plot(e, gb))
    panel = MemoryPanel(Machine(gpus=(('card', 80.0),)))
    for use_cpu in (True, False): panel.reckon(lora(str(tiny), str(drawn), **SMALL | dict(use_cpu=use_cpu)), 1)
    assert drawn_with == [None, 80.0]

def test_gathered_weights_need_somebody_to_gather_from(official):
    cfg = lora(official, '', bf16=True, fp16=False, tune_vision=False, deepspeed='ds_config_zero3.json')
    parts = lambda cfg, gpus: {r['part']: r['training'] for r in estimate(cfg, gpus).rows}['buckets and gathered weights']
    alone = parts(cfg, 1)
    assert parts(cfg, 2) - alone == pytest.approx(2.0) and parts(replace(cfg, offload='all'), 1) - alone > 1.9 # `stage3_max_live_parameters`


def test_learning_by_heart_is_said():
    cfg = lora('m', 'd', gpus=1, use_cpu=True, gradient_accumulation_steps=1, per_device_train_batch_size=5, max_steps=51)
    assert batch_line(cfg, 5).endswith('More than 50 passes learn a file by heart: lower max_steps unless that is wanted.') and 'x 1 pass x' in batch_line(cfg)
    assert 'by heart' not in batch_line(replace(cfg, max_steps=50), 5)


# --- run.sh and settings ---------------------------------------------------------------------------------------------

def test_the_second_machine_has_files_of_its_own(tiny, drawn, tmp_path):
    cfg = lora(str(tiny), str(drawn), **SMALL | dict(deepspeed='ds_config_zero2.json'), nnodes=2, node_rank=1, master_addr='127.0.0.1', master_port=29917)
    text = preview(replace(cfg, output_dir=str(tmp_path/'other')), None, json.loads((tiny/'config.json').read_text()))[1]
    run = launch(cfg, output_dir=str(tmp_path/'run'), start=False)
    assert text.replace(str(tmp_path/'other'), str(tmp_path/'run')) == run.file('run.sh').read_text() and 'deepspeed-1.json' in text

@pytest.mark.parametrize('content', ['3', '"data_path"', '["data_path"]', '{"data_path": "x"}', '{}'])
def test_what_is_no_config_of_a_run(tmp_path, content):
    (tmp_path/'config.json').write_text(content)
    with pytest.raises(ValueError, match='is no config.json of a run'): read_settings(tmp_path)

@pytest.mark.parametrize('name, content, said', [('config.json', b'{"a": 1,\n', 'is not valid JSON (line 2'), ('config.json', b'{"a": "\xff"}', 'is no text in UTF-8 (byte 7)'), ('finetune.sh', b'\xff\xfe', 'is no text in UTF-8 (byte 0)')])
def test_what_cannot_be_read_is_named(tmp_path, name, content, said):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError) as e: read_settings(tmp_path/name)
    assert str(e.value).startswith(f'{tmp_path/name} {said}') and type(e.value) is ValueError

def test_no_path_is_no_working_folder():
    for empty in ('', '  '):
        with pytest.raises(ValueError, match='Give the path of a script'): read_settings(empty)

def test_a_checkpoint_to_go_on_from_must_be_there(tmp_path):
    said = lambda start: obstacles(lora('', '', resume_from_checkpoint=start), None, None).get('resume_from_checkpoint')
    assert said('nowhere').startswith('resume_from_checkpoint is nowhere, which is no checkpoint of a run.') and said(str(tmp_path))
    (tmp_path/'trainer_state.json').write_text('{}')
    assert [said(start) for start in (None, 'auto', str(tmp_path))] == [None]*3

def test_the_memory_of_data_in_the_home(tiny, drawn, monkeypatch):
    monkeypatch.setenv('HOME', str(drawn.parent))
    panel = MemoryPanel(Machine())
    panel.reckon(lora(str(tiny), f'~/{drawn.name}', **SMALL), 1)
    assert 'the heaviest of the 24 samples' in panel.estimate.work.source

def test_an_optimiser_is_not_a_setting():
    said = obstacles(lora('', '', optim='lr', lr_scheduler_type='steps'), None, None)
    assert obstacles(lora('', '', optim='adam'), None, None)['optim'].endswith('Did you mean adamw_torch?')
    assert 'learning_rate' not in said['optim'] and 'max_steps' not in said['lr_scheduler_type']


# --- what panels share -----------------------------------------------------------------------------------------------

def test_a_stamp_changes_with_the_file(tmp_path):
    file = tmp_path/'a.txt'
    file.write_text('1'); first = stamp(file)
    file.write_text('22')
    assert first and stamp(str(file)) != first and [stamp(x) for x in (None, '', tmp_path, tmp_path/'no', '~nobodyhere/x', 'a'*300, 'a\0')] == [None]*7

def test_what_was_typed_stays():
    given = Given()
    assert given.may('f', None, 'a') and given.may('f', 'a', 'b') and not given.may('f', 'b', 'b') and not given.may('f', 'typed', 'c') and given.may('f', '', 'c')
