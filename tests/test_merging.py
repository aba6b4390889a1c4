"Adapters become checkpoints: the numbers of the original code, all files, little memory."
import json, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpmv_nb.config import lora
from minicpmv_nb.merging import check_merged, find_folders, merge, read_adapter
from minicpmv_nb.model import aside, load, save, weight_files
from minicpmv_nb.tuning import add_adapter, tune
from parity import batch_of, gap

HERE = Path(__file__).parent


def adapter_of(base, out, **changes):
    "A random adapter."
    torch.manual_seed(1)
    tuned = tune(load(base), lora(str(base), 'train.json', lora_r=4, **changes))
    with torch.no_grad(): [p.add_(torch.randn_like(p)*.05) for p in tuned.parameters() if p.requires_grad]
    tuned.save_pretrained(out, save_embedding_layers=False)
    return out


def test_merged_golden_adapter_has_the_numbers_of_the_original(golden, tmp_path):
    folder, inputs = HERE/'goldens'/'adapter_2.5', dict(np.load(HERE/'goldens'/'2.5'/'inputs.npz'))
    expected, norms = dict(np.load(folder/'expected.npz')), json.loads((folder/'merged_norms.json').read_text())
    base = tmp_path/'float32' # the original merged in float32
    shutil.copytree(golden, base)
    save_file({n: t.float() for n, t in load_file(golden/'model.safetensors').items()}, base/'model.safetensors')
    merged = load(merge(base, folder, tmp_path/'merged'))
    state = merged.state_dict()
    assert state.keys() == norms.keys()
    assert all(abs(float(t.double().norm()) - norms[n]) <= 1e-5*norms[n] for n, t in state.items())
    for key in (k for k in expected if k.startswith('merged/')): assert gap(state[key.removeprefix('merged/')], expected[key]) < 1e-5
    for case in ('single0', 'single1'):
        with torch.no_grad(): logits = merged(**batch_of(inputs, case))['logits']
        assert gap(logits, expected[f'{case}/merged_logits']) < 1e-4

def test_every_file_of_the_base_is_there(tiny, tmp_path):
    base = save(load(tiny).state_dict(), tiny, tmp_path/'base', max_shard='1MB')
    (base/'modeling_minicpmv.py').write_text('raise SystemExit("never run")'); (base/'assets').mkdir(); (base/'assets'/'a.txt').write_text('x'); (base/'README.md').write_text('# base')
    merged = merge(base, adapter_of(tiny, tmp_path/'adapter'), tmp_path/'merged')
    names = lambda f: sorted(str(p.relative_to(f)) for p in f.rglob('*'))
    assert names(merged) == names(base) and len(list(merged.glob('*.safetensors'))) > 1
    assert (merged/'modeling_minicpmv.py').read_text() == (base/'modeling_minicpmv.py').read_text()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rounded_once_to_the_type_of_the_base(tiny, tmp_path, dtype):
    base = save({n: t.to(dtype) for n, t in load(tiny).state_dict().items()}, tiny, tmp_path/'base')
    adapter = adapter_of(tiny, tmp_path/'adapter')
    merged = load_file(merge(base, adapter, tmp_path/'merged')/'model.safetensors')
    exact = add_adapter(load(base), adapter).merge_and_unload().state_dict() # in float32
    assert all(t.dtype == dtype and torch.equal(t, exact[n].to(dtype)) for n, t in merged.items())

@pytest.mark.parametrize('vision', [False, True])
def test_a_base_of_several_types(tiny, tmp_path, monkeypatch, vision):
    # As a run leaves it that trained the resampler alone in full, in float32 beside bf16; or with its norms in float32.
    alone = (lambda n, t: n.startswith('resampler.')) if vision else (lambda n, t: t.dim() == 1)
    base = save({n: t if alone(n, t) else t.bfloat16() for n, t in load(tiny).state_dict().items()}, tiny, tmp_path/'base')
    adapter_of(tiny, tmp_path/'adapter', tune_vision=vision, tune_resampler=vision)
    monkeypatch.setenv('HOME', str(tmp_path))
    merged = load_file(merge(base, '~/adapter', tmp_path/'merged')/'model.safetensors')
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in load_file(base/'model.safetensors').items()}

def test_code_that_the_base_lacks_is_named(golden, tmp_path):
    said = []
    merge(golden, adapter_of(golden, tmp_path/'adapter'), tmp_path/'merged', check=False, tell=said.append)
    assert len(said) == 1 and 'modeling_minicpmv.py' in said[0] and f"--include '*.py' --local-dir {tmp_path/'merged'}" in said[0]

def test_merged_again_can_be_tuned_again(tiny, tmp_path):
    merged = merge(tiny, adapter_of(tiny, tmp_path/'adapter'), tmp_path/'merged')
    again = merge(merged, adapter_of(merged, tmp_path/'second'), tmp_path/'again')
    assert weight_files(again).keys() == weight_files(tiny).keys()

@pytest.mark.parametrize('setting', [dict(bias='all'), dict(rank_pattern={'q_proj': 2})])
def test_what_is_not_plain_lora_is_refused(tiny, tmp_path, setting):
    adapter = adapter_of(tiny, tmp_path/'adapter')
    config = json.loads((adapter/'adapter_config.json').read_text()) | setting
    (adapter/'adapter_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='not plain LoRA'): merge(tiny, adapter, tmp_path/'merged')

def test_a_result_that_differs_is_not_put_in_place(tiny, tmp_path, monkeypatch):
    from minicpmv_nb import merging
    adapter = adapter_of(tiny, tmp_path/'adapter')
    read = merging.read_adapter
    monkeypatch.setattr(merging, 'read_adapter', lambda folder: replace(read(folder), scale=2*read(folder).scale)) # a wrong formula
    with pytest.raises(ValueError, match='not confirmed(.|\n)*differ by'): merge(tiny, adapter, tmp_path/'merged')
    assert not (tmp_path/'merged').exists()

def sized(adapter, out, scale):
    "The adapter with another alpha, so with a change of another size."
    shutil.copytree(adapter, out)
    config = json.loads((out/'adapter_config.json').read_text())
    (out/'adapter_config.json').write_text(json.dumps(config | dict(lora_alpha=config['lora_alpha']*scale)))
    return out

@pytest.mark.parametrize('changes', [{}, dict(use_dora=True)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_in_16_bits_a_merge_that_did_nothing_is_noticed(tiny, tmp_path, dtype, changes):
    base = save({n: t.to(dtype) for n, t in load(tiny).state_dict().items()}, tiny, tmp_path/'base')
    small = sized(adapter_of(tiny, tmp_path/'adapter', tune_vision=False, tune_resampler=False, **changes), tmp_path/'small', .05)
    with pytest.raises(ValueError, match=r'q_proj.weight of .* and of base \+ adapter differ by .*: it is not merged'): check_merged(str(base), str(small), str(base))
    merged = merge(base, small, tmp_path/'merged', check=False)
    said = check_merged(str(base), str(small), str(merged))
    assert 'confirmed' in said and 'Note' not in said

def test_a_change_that_16_bits_cannot_show_is_a_note(tiny, tmp_path):
    base = save({n: t.to(torch.bfloat16) for n, t in load(tiny).state_dict().items()}, tiny, tmp_path/'base')
    nothing = sized(adapter_of(tiny, tmp_path/'adapter', tune_vision=False, tune_resampler=False), tmp_path/'nothing', 1e-12)
    assert 'Note: the adapter changes no weight by as much as bfloat16 can show' in check_merged(str(base), str(nothing), str(base))

@pytest.mark.parametrize('name', ['llm.model.embed_tokens.lora_embedding_A', 'llm.model.layers.0.self_attn.q_proj.lora_B.bias', 'llm.model.layers.0.mlp.up_proj.lora_A.weight'])
def test_tensors_it_does_not_know_are_refused(tiny, tmp_path, name):
    adapter = adapter_of(tiny, tmp_path/'adapter')
    state = load_file(adapter/'adapter_model.safetensors') | {f'base_model.model.{name}': torch.zeros(4, 4)}
    save_file(state, adapter/'adapter_model.safetensors')
    with pytest.raises(ValueError, match=f'not plain LoRA and cannot be merged here: {name}'): read_adapter(adapter)

def test_another_kind_of_adapter_is_refused(tmp_path):
    (tmp_path/'adapter_config.json').write_text(json.dumps(dict(peft_type='IA3')))
    save_file(dict(a=torch.zeros(1)), tmp_path/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='an adapter of the kind IA3, and only LoRA can be merged'): read_adapter(tmp_path)

def test_remains_make_room_and_a_refusal_leaves_nothing(tiny, tmp_path, monkeypatch):
    from collections import namedtuple
    adapter, out, size = adapter_of(tiny, tmp_path/'adapter'), tmp_path/'merged', (tiny/'model.safetensors').stat().st_size
    part = aside(out); (part/'model.safetensors').write_bytes(bytes(size))
    used = lambda: sum(f.stat().st_size for f in part.rglob('*')) if part.exists() else 0
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: namedtuple('usage', 'free')(size-used())) # room for one
    assert (merge(tiny, adapter, out, check=False)/'config.json').is_file()
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: namedtuple('usage', 'free')(size-1))
    with pytest.raises(OSError, match=r'again needs \d\.\d MB, and \d\.\d MB are free there'): merge(tiny, adapter, tmp_path/'again', check=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['adapter', 'merged']

def test_a_truncated_shard_of_the_base_is_named(tiny, tmp_path):
    base = save(load(tiny).state_dict(), tiny, tmp_path/'base', max_shard='1MB')
    shard = sorted(base.glob('*.safetensors'))[1]; shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f'{shard.name} is not a complete safetensors file'): merge(base, adapter_of(tiny, tmp_path/'adapter'), tmp_path/'merged', check=False)

def test_folders_that_are_being_written_are_not_found(tmp_path):
    for name in ('first/final', 'first/.final-1', 'first/.deleting', '.first/final', 'alone', '.alone.minicpmv_nb.part'):
        (tmp_path/name).mkdir(parents=True); (tmp_path/name/'adapter_config.json').write_text('{}')
    assert {str(f.relative_to(tmp_path)) for f in find_folders(tmp_path)} == {'first/final', 'alone'}

MEASURE = '''
import resource, sys
from minicpmv_nb.merging import merge
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
merge(*sys.argv[1:4], check=False)
print((peak() - before)*1024)
'''

def test_memory_does_not_grow_with_the_model(tiny, tmp_path):
    base = tmp_path/'base'
    big = {f'layer{i}.weight': torch.zeros(8192, 4096, dtype=torch.bfloat16) for i in range(16)} # 1 GB, 64 MB each
    shutil.copytree(tiny, base, ignore=shutil.ignore_patterns('*.safetensors'))
    names = [f'model-{i+1:05}-of-00004.safetensors' for i in range(4)]
    for i, name in enumerate(names): save_file({n: big[n] for n in list(big)[4*i:4*i+4]}, base/name)
    (base/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={n: names[i//4] for i, n in enumerate(big)})))
    adapter = tmp_path/'adapter'; adapter.mkdir()
    (adapter/'adapter_config.json').write_text(json.dumps(dict(r=4, lora_alpha=8)))
    pairs = {f'base_model.model.layer{i}.lora_{k}.weight': torch.ones(shape) for i in range(0, 16, 2) for k, shape in (('A', (4, 4096)), ('B', (8192, 4)))}
    save_file(pairs | {'base_model.model.layer1.weight': torch.ones(8192, 4096)}, adapter/'adapter_model.safetensors')
    done = subprocess.run([sys.executable, '-c', MEASURE, str(base), str(adapter), str(tmp_path/'merged')], capture_output=True, text=True, check=True)
    grown, largest = float(done.stdout.splitlines()[-1]), 8192*4096*2
    assert grown <= 2*largest + 200e6, f'{grown/1e6:.0f} MB'
    merged = load_file(tmp_path/'merged'/names[0])
    assert merged['layer0.weight'].unique().item() == 8 and merged['layer1.weight'].unique().item() == 1 and merged['layer3.weight'].any().item() is False
