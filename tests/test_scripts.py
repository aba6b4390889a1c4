"The guide's three scripts, from the shell to the end: only model, data, port, device, and the numbers of processes and steps are replaced."
import re, subprocess

import pytest
import torch
from safetensors.torch import load_file

from minicpmv_nb.config import from_script, zero_stage
from minicpmv_nb.jobs import launch
from minicpmv_nb.model import load, tiny_checkpoint
from minicpmv_nb.quantizing import load_any
from minicpmv_nb.tuning import add_adapter
from support import ANSWERS, QUESTION, SCRIPTS, draw_data, free_port


@pytest.fixture(scope='session')
def llama3(tmp_path_factory):
    "A tiny checkpoint of the family that the scripts name."
    return tiny_checkpoint(tmp_path_factory.mktemp('llama3')/'tiny', [QUESTION, *ANSWERS], '2.5')

def run_by_hand(script, base, folder, data):
    "Read a script for this machine, write a run folder, and run its run.sh as a user would."
    cfg = from_script(SCRIPTS/script, model_name_or_path=str(base), data_path=str(data), eval_data_path=str(draw_data(folder, 3, 'eval.json')), gpus=2, use_cpu=True, master_port=free_port(),
        max_steps=2, eval_steps=1, save_steps=1)
    assert zero_stage(cfg) == 3 and cfg.do_eval and cfg.report_to == 'tensorboard' and cfg.llm_type == 'llama3'
    run = launch(cfg, start=False)
    done = subprocess.run(['bash', 'run.sh'], cwd=run.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    return run, done.stdout

@pytest.mark.parametrize('script', [pytest.param('finetune_lora.sh', marks=pytest.mark.slow), 'finetune_qlora.sh', pytest.param('finetune_ds.sh', marks=pytest.mark.slow)])
def test_script_of_the_guide_runs_to_its_end(script, llama3, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path) # the scripts write into output/
    run, said = run_by_hand(script, llama3, tmp_path, drawn)
    assert run.folder == tmp_path/'output'/'output_minicpmv2_lora' and run.status()['state'] == 'done' and run.status()['step'] == 2
    assert [m['step'] for m in run.metrics() if 'loss' in m] == [1, 2] == [m['step'] for m in run.metrics() if 'eval_loss' in m]
    assert sorted(re.findall(r'rank (\d) of 2, .*?, ZeRO stage 3', said)) == ['0', '1'] # perhaps behind a progress bar of the other
    assert {p.name for p in run.folder.glob('checkpoint-*')} == {'checkpoint-1', 'checkpoint-2'} and list(run.folder.glob('events.out.tfevents.*'))
    reads(run.final, llama3, script)

def reads(final, base, script):
    "The result can be used; the parts that the script trains are in it."
    model = load(final) if script == 'finetune_ds.sh' else add_adapter(load_any(base, four_bit='qlora' in script), final)
    assert all(p.isfinite().all() for p in model.parameters() if p.is_floating_point())
    held = load_file(next(final.glob('*.safetensors')))
    parts = {'resampler'} | ({'llm'} if 'ds' in script else {'llm.lora'}) | (set() if 'qlora' in script else {'vpm'})
    assert {n.removeprefix('base_model.model.').split('.')[0] + '.lora'*('lora_' in n) for n in held} == parts
    before = {f'base_model.model.{n}'*('ds' not in script) or n: t for n, t in load_file(base/'model.safetensors').items()}
    assert 0 < max(float((held[n] - t).abs().max()) for n, t in before.items() if n in held) < 1e-4 # at the guide's rate of 1e-6
