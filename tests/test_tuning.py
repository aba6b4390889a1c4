"Which parameters train, at which rate, and what that costs."
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpmv_nb.config import full, lora, qlora
from minicpmv_nb.families import FAMILIES
from minicpmv_nb.merging import merge
from minicpmv_nb.model import MiniCPMV, load, tiny_checkpoint
from minicpmv_nb.tuning import GROUPS, add_adapter, lora_targets, memory, parameter_groups, part_table, target_pattern, tune
from support import QUESTION


@pytest.fixture(scope='module')
def bases(tmp_path_factory): return {name: tiny_checkpoint(tmp_path_factory.mktemp('base')/name, [QUESTION], name) for name in ('2.0', '2.6')}

def cfg(base, method=lora, **changes): return method(str(base), 'train.json', **dict(lora_r=4, tune_vision=False, fp16=False) | changes)

def adapter_of(base, out, **changes):
    "A random adapter."
    torch.manual_seed(1)
    tuned = tune(load(base), cfg(base, **changes))
    with torch.no_grad(): [p.add_(torch.randn_like(p)*.05) for p in tuned.parameters() if p.requires_grad]
    tuned.save_pretrained(out, save_embedding_layers=False)
    return out


# --- which layers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, targets, count', [('2.6', 'llm.attention', 12), ('2.6', 'llm.attention llm.mlp', 21), ('2.6', 'llm.mlp,vision', 21), ('2.0', 'vision', 8), ('2.6', 'resampler', 2), ('2.6', r'llm\..*q_proj', 3)])
def test_groups_of_layers(bases, name, targets, count): assert len(lora_targets(load(bases[name]), targets)) == count

def test_the_guides_expression_is_a_group():
    assert GROUPS['llm.attention'] == lora('m', 'd').lora_target_modules and target_pattern('llm.attention') == f"({GROUPS['llm.attention']})"

def test_unknown_group(bases):
    with pytest.raises(ValueError, match='Or name groups: llm.attention, llm.mlp, vision, resampler.'): lora_targets(load(bases['2.6']), 'llm.atention')

@pytest.mark.parametrize('targets, said', [(r'llm\..*', 'llm.model, a Qwen2Model'), (r'.*resampler.*', 'resampler, a Resampler'), (r'llm\.model\.layers\.0\..*|vpm\..*', 'llm.model.layers.0.self_attn, a'), ('.*', 'the model itself, a MiniCPMV')])
def test_what_is_not_linear_is_refused_with_an_expression_that_works(bases, targets, said):
    model = load(bases['2.6'])
    with pytest.raises(ValueError, match='linear layers only') as e: lora_targets(model, targets)
    assert f'also matches {said}' in str(e.value)
    better = str(e.value).split('For those it matches write ')[1]
    names = lora_targets(model, better)
    assert names == [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(targets, n)]
    tuned = tune(model, cfg(bases['2.6'], lora_target_modules=better, tune_resampler=False))
    assert sum('lora_A' in n for n, _ in tuned.named_parameters()) == len(names)

@pytest.mark.parametrize('targets, flag', [('vision', 'tune_vision'), ('llm.mlp resampler', 'tune_resampler')])
def test_in_full_and_by_lora(bases, targets, flag):
    with pytest.raises(ValueError, match=f'{flag} trains it in full: set {flag}=False'): tune(load(bases['2.6']), cfg(bases['2.6'], lora_target_modules=targets, **{flag: True}))

@pytest.mark.parametrize('name', ['2.0', '2.6'])
def test_lora_everywhere_gets_gradients(bases, name):
    tuned = tune(load(bases[name]), cfg(bases[name], lora_target_modules='llm.attention llm.mlp vision resampler', tune_resampler=False)).train()
    batch = dict(input_ids=torch.arange(40)[None], pixel_values=torch.randint(0, 256, (1, 3, 14, 84), dtype=torch.uint8), target_sizes=torch.tensor([[2, 3]]), image_bound=torch.tensor([[5, 21]]), slices_per_sample=torch.tensor([1]))
    tuned(**batch, labels=batch['input_ids'])['loss'].backward()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert all('lora_' in n and p.grad is not None for n, p in trained.items()) and any('vpm' in n for n in trained) and any('resampler' in n for n in trained)


# --- kinds of LoRA ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [dict(use_rslora=True), dict(use_dora=True), dict(use_dora=True, lora_target_modules='llm.mlp vision resampler', tune_resampler=False)])
def test_merged_as_peft_merges(bases, tmp_path, changes):
    adapter = adapter_of(bases['2.6'], tmp_path/'adapter', **changes)
    theirs = add_adapter(load(bases['2.6']), adapter).merge_and_unload().state_dict()
    ours = load(merge(bases['2.6'], adapter, tmp_path/'merged')).state_dict()
    assert theirs.keys() == ours.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


# --- an adapter that does not fit ------------------------------------------------------------------------------------

RENAMED = lambda state: {n.replace('model.llm.', 'model.'): t for n, t in state.items()}
@pytest.mark.parametrize('change, said', [(RENAMED, 'missing: base_model.model.llm.model.layers.0.self_attn.k_proj.lora_A.weight.* unexpected: base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight'),
    (lambda state: {n: t for n, t in state.items() if 'resampler' not in n}, 'missing: base_model.model.resampler.attn.in_proj_bias'),
    (lambda state: {n: t[:2].contiguous() if n.endswith('0.self_attn.q_proj.lora_A.weight') else t for n, t in state.items()}, r'of another shape: .*0.self_attn.q_proj.lora_A.weight \(2, 128\) instead of \(4, 128\)')])
def test_adapter_whose_tensors_do_not_fit(bases, tmp_path, change, said):
    adapter = adapter_of(bases['2.6'], tmp_path/'adapter')
    save_file(change(load_file(adapter/'adapter_model.safetensors')), adapter/'adapter_model.safetensors')
    with pytest.raises(ValueError, match=f'do not fit the model with its adapter_config.json: .*{said}'): add_adapter(load(bases['2.6']), adapter)

def test_embeddings_beside_an_adapter_are_welcome(bases, tmp_path):
    # PEFT writes them when it takes the vocabulary for a new one.
    adapter = adapter_of(bases['2.6'], tmp_path/'adapter')
    state = load_file(adapter/'adapter_model.safetensors')
    save_file(state | {'base_model.model.llm.lm_head.weight': load(bases['2.6']).llm.lm_head.weight.detach()*2}, adapter/'adapter_model.safetensors')
    tuned = add_adapter(load(bases['2.6']), adapter, trainable=True)
    assert torch.equal(tuned.base_model.model.llm.lm_head.weight, load(bases['2.6']).llm.lm_head.weight*2)
    assert any(p.requires_grad for p in tuned.parameters()) and not any(p.requires_grad for n, p in add_adapter(load(bases['2.6']), adapter).named_parameters() if 'lora_' in n)


# --- rates -----------------------------------------------------------------------------------------------------------

def test_groups_hold_every_trained_parameter_once(bases):
    for method, changes in ((lora, dict(tune_vision=True, tune_embeddings=True, loraplus_ratio=8.0)), (full, dict(tune_vision=True))):
        c = cfg(bases['2.6'], method, **changes)
        tuned = tune(load(bases['2.6']), c)
        sorted_ = [id(p) for g in parameter_groups(tuned, c) for p in g['params']]
        assert len(sorted_) == len(set(sorted_)) and set(sorted_) == {id(p) for p in tuned.parameters() if p.requires_grad}

def test_without_rates_of_its_own_every_part_decays_as_in_transformers(bases):
    from transformers import Trainer
    c = cfg(bases['2.6'], full, tune_vision=True)
    tuned = tune(load(bases['2.6']), c)
    ours = {id(p) for g in parameter_groups(tuned, c) if g['weight_decay'] for p in g['params']}
    names = Trainer.get_decay_parameter_names(None, tuned)
    assert ours == {id(p) for n, p in tuned.named_parameters() if n in names}
    assert {g['lr'] for g in parameter_groups(tuned, c)} == {c.learning_rate}

def test_rates_of_their_own(bases):
    c = cfg(bases['2.6'], tune_vision=True, tune_embeddings=True, learning_rate=1e-4, weight_decay=0.1, vision_learning_rate=2e-6, vision_weight_decay=0.0, resampler_learning_rate=1e-5, embeddings_learning_rate=3e-6, loraplus_ratio=16.0)
    found = {g['name']: (g['lr'], g['weight_decay']) for g in parameter_groups(tune(load(bases['2.6']), c), c)}
    assert found == {'language model': (1e-4, .1), 'language model, B': (1e-4*16, .1), 'token embeddings': (3e-6, .1), 'vision tower': (2e-6, 0), 'vision tower, no decay': (2e-6, 0),
        'resampler': (1e-5, .1), 'resampler, no decay': (1e-5, 0)}


# --- what it costs ---------------------------------------------------------------------------------------------------

def counted(model):
    "Bytes of weights, gradients and AdamW's moments of a step without DeepSpeed."
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained: p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained)
    for p in trained: p.grad = torch.zeros_like(p)
    optimizer.step()
    size = lambda tensors: sum(t.numel()*t.itemsize for t in tensors)
    return [size(model.parameters()), size(p.grad for p in trained), size(s[k] for s in optimizer.state.values() for k in ('exp_avg', 'exp_avg_sq'))]

@pytest.mark.parametrize('method', [lora, full])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_table_counts_the_bytes_there_are(bases, method, dtype):
    c = cfg(bases['2.0'], method, tune_vision=True, deepspeed=None, bf16=dtype == torch.bfloat16)
    tuned = tune(load(bases['2.0'], dtype), c)
    total = part_table(tuned, c)[-1]
    assert [round(total[k]*1e9) for k in ('weights', 'gradients', 'optimizer')] == counted(tuned)

def test_packed_layers_are_counted_whole_and_cost_little():
    c = qlora('m', 'd', bf16=True, fp16=False, deepspeed='ds_config_zero2.json')
    with torch.device('meta'): model = tune(MiniCPMV(FAMILIES['2.6'].official), c)
    table = part_table(model, c, gpus=8)
    assert table[0]['learning_rate'] == 1e-6 and table[3]['learning_rate'] == '' and 'GB' in str(table)
    assert memory(0, 8*10**9, packed=8*10**9)['weights'] == pytest.approx(4.13)
