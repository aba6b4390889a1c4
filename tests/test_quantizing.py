"Four-bit weights: the bytes of bitsandbytes, the layout of the official int4 folders, training under every ZeRO stage."
import json, shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from safetensors.torch import load_file, save_file

from minicpmv_nb.chat import Chat
from minicpmv_nb.config import Config, full, lora, qlora, read_metrics
from minicpmv_nb.families import FAMILIES
from minicpmv_nb.jobs import launch
from minicpmv_nb.merging import merge
from minicpmv_nb.model import adapter_notes, load, save, tiny_checkpoint
from minicpmv_nb.quantizing import STATE, check_types, load_quantized, packed_tower, quantize, quantized_layers
from minicpmv_nb.training import prepare_model
from minicpmv_nb.tuning import add_adapter, part_table
from forked import fork_ranks, train
from support import ANSWERS, QUESTION, draw_mixed, flags

CPU = dict(use_cpu=True, fp16=False, deepspeed=None, report_to='none', dataloader_num_workers=0, gradient_accumulation_steps=1)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "A tiny bf16 checkpoint of two towers."
    def made(name):
        folder = tiny_checkpoint(tmp_path_factory.mktemp('base')/name, [QUESTION, *ANSWERS], name)
        state = {n: t.to(torch.bfloat16) for n, t in load_file(folder/'model.safetensors').items()}
        save_file(state, folder/'model.safetensors', metadata=dict(format='pt'))
        return folder
    return {name: made(name) for name in ('2.0', '2.6', 'o-2.6')}

@pytest.fixture(scope='module')
def int4(bases, tmp_path_factory): return quantize(bases['2.6'], tmp_path_factory.mktemp('int4')/'2.6')

@pytest.fixture(scope='module')
def mixed(tmp_path_factory): return draw_mixed(tmp_path_factory.mktemp('mixed'), 12)


# --- weights ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('vision', [False, True])
@pytest.mark.parametrize('name', ['2.0', '2.6', 'o-2.6'])
def test_every_weight_is_what_bitsandbytes_makes_of_it(bases, tmp_path, name, vision):
    import bitsandbytes as bnb
    exact, packed = load_file(bases[name]/'model.safetensors'), load_file(quantize(bases[name], tmp_path/'int4', vision)/'model.safetensors')
    names = [n.removesuffix(f'.{STATE}') for n in packed if n.endswith(STATE)]
    linear = {n for n in exact if n.startswith('llm.model.layers') and n.endswith('proj.weight')}
    assert linear <= set(names) and (set(names) == linear) is not vision
    for n in names:
        theirs = bnb.nn.Params4bit(exact[n], requires_grad=False, quant_type='nf4').to('cpu')
        assert torch.equal(packed[n], theirs.data) and tuple(packed[n].shape) == (exact[n].numel()//2, 1) and packed[n].dtype == torch.uint8
        for end, t in theirs.quant_state.as_dict(packed=True).items(): assert torch.equal(packed[f'{n}.{end}'], t), end
    assert all(torch.equal(packed[n], exact[n]) for n in exact.keys() - set(names)) # head, embeddings, norms, resampler, parts not used here

def test_names_are_those_of_the_official_split():
    # The key dump of the official 2.6-int4 and the list of skipped modules: no out_proj, no kv_proj, no lm_head.
    with torch.device('meta'): model = __import__('minicpmv_nb.model', fromlist=['MiniCPMV']).MiniCPMV(FAMILIES['2.6'].official)
    names = quantized_layers(model, vision=True)
    skipped = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - set(names)
    assert len(names) == 28*7 + 27*5
    assert {n.rpartition('.')[2] for n in skipped} == {'out_proj', 'kv_proj', 'lm_head'}

def test_config_says_how(int4):
    how = json.loads((int4/'config.json').read_text())['quantization_config']
    assert how['quant_method'] == 'bitsandbytes' and how['bnb_4bit_quant_type'] == 'nf4' and how['bnb_4bit_use_double_quant'] and how['load_in_4bit']
    assert how['llm_int8_skip_modules'] == ['out_proj', 'kv_proj', 'lm_head', 'vpm'] and how['bnb_4bit_compute_dtype'] == 'bfloat16'

def test_transformers_takes_the_config(int4):
    from transformers import BitsAndBytesConfig
    how = json.loads((int4/'config.json').read_text())['quantization_config']
    read = BitsAndBytesConfig.from_dict({k: v for k, v in how.items() if not k.startswith('_')})
    assert read.to_dict().items() >= {k: v for k, v in how.items() if k != 'quant_method'}.items()

def test_from_a_folder_and_on_the_fly(bases, int4):
    a, b = load_quantized(bases['2.6'], torch.bfloat16), load_quantized(int4, torch.bfloat16)
    for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True): assert torch.equal(x, y), n

def test_sharded(bases, tmp_path):
    sharded = save(load_file(bases['2.6']/'model.safetensors'), bases['2.6'], tmp_path/'base', max_shard='500KB')
    packed = quantize(sharded, tmp_path/'int4')
    assert len(list(packed.glob('*.safetensors'))) == len(list(sharded.glob('*.safetensors'))) > 2
    whole, parts = load_quantized(bases['2.6']).state_dict(), load_quantized(packed).state_dict()
    assert all(torch.equal(whole[n], parts[n]) for n in whole)

def test_types_and_bytes(tmp_path):
    # Wide enough that the quantised scales do not count.
    base = tiny_checkpoint(tmp_path/'wide', [QUESTION], '2.6', hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    model = load_quantized(base, torch.bfloat16)
    sizes = check_types(model, torch.bfloat16)
    assert sizes['four_bit'] <= 0.30*sizes['in_bfloat16']
    assert all(p.dtype == torch.bfloat16 for part in (model.vpm, model.resampler, model.llm.lm_head, model.llm.model.embed_tokens, model.llm.model.norm) for p in part.parameters())
    with pytest.raises(TypeError, match='vpm.encoder.layers.0.self_attn.q_proj.weight is torch.bfloat16, expected four bits'): check_types(model, torch.bfloat16, vision=True)
    with pytest.raises(TypeError, match='expected torch.float32'): check_types(model, torch.float32)


# --- what cannot work ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change, said', [(dict(use_lora=False, tune_llm=True), 'q_lora trains LoRA on four-bit weights: set use_lora=True as well.'),
    (dict(quantize_vision=True, tune_vision=True), 'quantize_vision and tune_vision exclude each other'), (dict(q_lora=False, quantize_vision=True), 'quantize_vision belongs to QLoRA')])
def test_settings_that_exclude_each_other(change, said):
    with pytest.raises(ValueError, match=said): qlora('model', 'train.json', **change)

def test_one_file_with_an_index(bases, tmp_path):
    base = Path(shutil.copytree(bases['2.6'], tmp_path/'base')); name = 'model-00001-of-00001.safetensors'
    (base/'model.safetensors').rename(base/name)
    (base/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict.fromkeys(load_file(base/name), name))))
    assert quantize(base, tmp_path/'int4') and load_quantized(tmp_path/'int4')

def test_what_a_quantised_folder_rules_out(bases, int4, mixed, tmp_path):
    for cfg in (full(str(int4), str(mixed), **CPU), lora(str(int4), str(mixed), **CPU)):
        with pytest.raises(ValueError, match='is quantised: it can only be trained with use_lora=True, q_lora=True'): launch(replace(cfg, output_dir=str(tmp_path/'run')))
    tower = quantize(bases['2.6'], tmp_path/'tower', vision=True)
    assert packed_tower(tower) and not packed_tower(int4)
    with pytest.raises(ValueError, match='The vision tower of .* is quantised and cannot be trained'): launch(qlora(str(tower), str(mixed), output_dir=str(tmp_path/'run'), tune_vision=True, **CPU))
    with pytest.raises(ValueError, match='is quantised already'): quantize(int4, tmp_path/'twice')
    with pytest.raises(ValueError, match='is a quantised checkpoint. It can be used for QLoRA'): load(int4)
    with pytest.raises(ValueError, match='is quantised, and a sum of four-bit weights and an adapter'): merge(int4, _adapter(bases['2.6'], tmp_path/'adapter'), tmp_path/'merged')
    assert not (tmp_path/'run').exists()

def _adapter(base, out):
    prepare_model(qlora(str(base), 'train.json', lora_r=2, **CPU), base).save_pretrained(out, save_embedding_layers=False)
    return out

def test_a_config_that_does_not_fit_is_refused_first(bases, tmp_path, monkeypatch):
    from minicpmv_nb import quantizing
    monkeypatch.setattr(quantizing, '_pack_file', lambda *a: pytest.fail('quantised'))
    odd = shutil.copytree(bases['2.6'], tmp_path/'odd')
    (odd/'config.json').write_text(json.dumps(json.loads((odd/'config.json').read_text()) | dict(num_hidden_layers=4)))
    with pytest.raises(ValueError, match='odd does not hold the weights its config.json describes.*missing: llm.model.layers.3'): quantize(odd, tmp_path/'int4')
    assert [p.name for p in tmp_path.iterdir()] == ['odd']

def test_after_a_failure_nothing_is_left(bases, tmp_path, monkeypatch):
    from minicpmv_nb import quantizing
    def full_disk(*a): raise OSError('No space left on device')
    monkeypatch.setattr(quantizing, '_pack_file', full_disk)
    with pytest.raises(OSError, match='No space'): quantize(bases['2.6'], tmp_path/'int4')
    assert not list(tmp_path.iterdir())

def test_home_folder(bases, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    assert quantize(bases['2.6'], '~/int4') == tmp_path/'int4' and [p.name for p in tmp_path.iterdir()] == ['int4']

def test_what_load_says_of_a_family_is_said(bases, tmp_path, capsys):
    said = lambda folder: (capsys.readouterr(), load_quantized(folder), capsys.readouterr().out)[2]
    packed = quantize(bases['o-2.6'], tmp_path/'int4')
    for folder in (bases['o-2.6'], packed):
        text = said(folder)
        assert '3 tensors of apm, audio_projection_layer, tts are left out here' in text and FAMILIES['o-2.6'].unconfirmed in text

def test_quantised_by_something_else(int4, tmp_path):
    other = tmp_path/'gptq'; other.mkdir()
    (other/'config.json').write_text(json.dumps(json.loads((int4/'config.json').read_text()) | dict(quantization_config=dict(quant_method='gptq'))))
    (other/'model.safetensors').symlink_to(int4/'model.safetensors')
    with pytest.raises(ValueError, match="is quantised by 'gptq', not with nf4 by bitsandbytes"): load_quantized(other)

def test_without_bitsandbytes(bases, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    with pytest.raises(ImportError, match=r"QLoRA needs bitsandbytes: pip install 'minicpmv_nb\[qlora\]'"): load_quantized(bases['2.6'])


# --- training --------------------------------------------------------------------------------------------------------

def test_preset_has_the_guides_values():
    ours, theirs = qlora('m', 'd'), lora('m', 'd')
    assert {k for k in vars(ours) if vars(ours)[k] != vars(theirs)[k]} == {'q_lora', 'tune_vision'} and ours.q_lora and not ours.tune_vision

def test_layers_are_those_of_peft(bases):
    model = prepare_model(qlora(str(bases['2.6']), 'train.json', bf16=True, **CPU), bases['2.6'])
    layer = model.base_model.model.llm.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraLinear4bit) and layer.base_layer.weight.dtype == torch.uint8
    table = {r['part']: r for r in part_table(model)}
    assert table['language model']['parameters'] == sum(p.numel() for n, p in load(bases['2.6']).llm.named_parameters() if 'embed_tokens' not in n and 'lm_head' not in n)

SETTINGS = dict(use_cpu='true', use_lora='true', q_lora='true', tune_vision='false', max_steps=3, optim='sgd', learning_rate=0.1, max_grad_norm=0, weight_decay=0, lora_dropout=0,
    lr_scheduler_type='constant', warmup_ratio=0, save_strategy='no', dataloader_num_workers=0)

@pytest.fixture(scope='module')
def run(bases, int4, mixed, tmp_path_factory):
    def steps(ranks, batch, base=None, **more):
        out = tmp_path_factory.mktemp('run')
        fork_ranks(train, ranks, out.with_suffix('.log'), flags(model_name_or_path=base or bases['2.6'], data_path=mixed, output_dir=out, per_device_train_batch_size=batch, **SETTINGS | more))
        return [(m['loss'], m['grad_norm']) for m in read_metrics(out) if 'loss' in m], load_file(out/'final'/'adapter_model.safetensors'), out/'final'
    return steps

@pytest.mark.parametrize('stage', [pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_gives_the_same_steps(run, int4, stage):
    # The guide's script asks for ZeRO-3. One of the two starts from the quantised folder.
    (one, weights, _), (two, theirs, _) = run(1, 4), run(2, 2, base=int4, deepspeed=f'ds_config_zero{stage}.json')
    assert len(one) == 3 and one[-1][0] < one[0][0]
    for a, b in zip(one, two, strict=True): assert a == pytest.approx(b, rel=1e-5)
    assert weights.keys() == theirs.keys() and all(torch.allclose(weights[n], theirs[n], atol=1e-5) for n in weights)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['2.0', 'o-2.6'])
def test_other_towers_under_zero3(bases, run, name):
    (one, _, _), (two, _, _) = run(1, 4, base=bases[name], quantize_vision='true'), run(2, 2, base=bases[name], quantize_vision='true', deepspeed='ds_config_zero3.json')
    for a, b in zip(one, two, strict=True): assert a == pytest.approx(b, rel=1e-5)

def test_merged_into_the_bf16_base(bases, run, tmp_path):
    _, _, adapter = run(1, 4, save_strategy='steps')
    assert adapter_notes(adapter)['base']
    merged = merge(bases['2.6'], adapter, tmp_path/'merged')
    want = add_adapter(load(bases['2.6']), adapter).merge_and_unload().state_dict()
    have = load_file(merged/'model.safetensors')
    assert all(torch.equal(want[n].to(torch.bfloat16), t) for n, t in have.items())

def test_an_adapter_of_a_quantised_folder_is_merged_without_its_name(int4, bases, run, tmp_path):
    _, _, adapter = run(1, 4, base=int4)
    assert 'base' not in adapter_notes(adapter)
    assert merge(bases['2.6'], adapter, tmp_path/'merged', check=False).is_dir()

def test_asking_a_quantised_checkpoint(int4):
    said, _ = Chat.load(int4).chat(None, 'Hello?', max_new_tokens=4)
    assert isinstance(said, str)
