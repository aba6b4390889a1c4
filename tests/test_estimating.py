"What `estimate` says against what real runs hold."
import json, os, subprocess, sys
from dataclasses import replace

import pytest

from forked import fork_ranks
from minicpmv_nb.config import deepspeed_json
from support import ANSWERS, QUESTION, TESTS, draw_data, draw_mixed

METHODS = ('lora', 'qlora', 'full')
MODES = [(0, 'none'), (2, 'none'), (3, 'none'), (2, 'optimizer'), (3, 'optimizer'), (3, 'all')] # stage of ZeRO, and what is offloaded
QUICK = {('lora', 2, 'none'), ('qlora', 3, 'none'), ('full', 0, 'none')}


@pytest.fixture(scope='module')
def larger(tmp_path_factory):
    "A checkpoint in which weights are most of what a process holds."
    from minicpmv_nb.model import tiny_checkpoint
    return tiny_checkpoint(tmp_path_factory.mktemp('model')/'larger', [QUESTION, *ANSWERS], '2.6', hidden_size=512, intermediate_size=2048, num_hidden_layers=4)

def zero_file(folder, stage, offload, bucket=2_000_000): # larger than any weight
    "Our own DeepSpeed configuration with a bucket that does not outweigh everything else at this size."
    from minicpmv_nb.config import deepspeed_json, lora
    given = deepspeed_json(lora('', '', deepspeed=f'ds_config_zero{stage}.json', offload=offload, use_cpu=True, bf16=True, fp16=False, per_device_train_batch_size=1, gradient_accumulation_steps=1))
    given['zero_optimization']['reduce_bucket_size'] = bucket
    (folder/'zero.json').write_text(json.dumps(given))
    return str(folder/'zero.json')

def counted(argv):
    "To be called on a rank: train, and count."
    import count_bytes
    count_bytes.main(argv)

def parts(e, moment, names): return sum(r[moment] for r in e.rows if r['part'] in names)*1e9

OTHERS = [('full', 0, 'none', 'ademamix'), ('full', 3, 'none', 'ademamix'), ('full', 0, 'none', 'rmsprop_bnb_8bit'), ('full', 2, 'none', 'adafactor'), ('full', 3, 'none', 'adafactor'), ('lora', 2, 'none', 'adafactor')]

@pytest.mark.parametrize('method, stage, offload, optim', [pytest.param(m, *mode, 'adamw_torch', marks=() if (m, *mode) in QUICK else pytest.mark.slow) for m in METHODS for mode in MODES] + [pytest.param(*how, marks=pytest.mark.slow) for how in OTHERS])
def test_bytes_of_a_real_run(method, stage, offload, optim, larger, tmp_path):
    # On a CPU what is offloaded lies in the same memory as everything else.
    from minicpmv_nb import config, estimate
    from minicpmv_nb.config import to_flags
    data = draw_data(tmp_path, 8)
    cfg = getattr(config, method)(str(larger), str(data), deepspeed=zero_file(tmp_path, stage, offload) if stage else None, bf16=True, fp16=False, use_cpu=True, gpus=2, max_steps=3, tune_vision=False, optim=optim,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, dataloader_num_workers=0, save_strategy='no', report_to='none', output_dir=str(tmp_path/'run'))
    fork_ranks(counted, 2, tmp_path/'log', to_flags(replace(cfg, gpus=None)))
    e = estimate(cfg, gpus=2)
    for rank in (0, 1):
        held = json.loads((tmp_path/'run'/f'held-{rank}.json').read_text())
        kept = {'weights', 'optimizer'} | ({'gradients'} if stage == 3 else set()) # all the time
        own = parts(e, 'step', {'buckets and gathered weights'}) if stage else 0 # ZeRO-3's bucket, the way out of offloading; those of DDP are held by C++, where they cannot be counted
        gathered = parts(e, 'training', {'buckets and gathered weights'}) - own if stage == 3 else 0 # at most
        own += e.host*1e9
        after, before = parts(e, 'step', kept) + own, parts(e, 'step', kept | {'gradients'}) + own
        print(method, stage, offload, rank, {k: round(v/1e6, 2) for k, v in dict(held, after=after, before=before, gathered=gathered).items()})
        assert held['step'] == pytest.approx(after, rel=.025, abs=4e5), 'behind the step'
        assert .96*before - 4e5 < held['training'] < 1.04*(before + gathered) + 4e5, 'behind the backward pass'
        if stage and offload == 'none' and optim == 'adamw_torch': # a gradient copy in float32; Adam's intermediate values, as large again, come and go within the step
            assert held['stepping'] - held['training'] == pytest.approx(parts(e, 'step', {'copies while stepping'})/2, rel=.05, abs=4e5), 'before the largest group is stepped'

@pytest.mark.slow
@pytest.mark.parametrize('stage, ranks', [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_a_gradient_on_its_way_out(stage, ranks, tmp_path):
    "DeepSpeed turns what it offloads to float64, for its norm: with a head that is large beside the rest, that is most of what a step takes."
    from minicpmv_nb import config, estimate
    from minicpmv_nb.config import to_flags
    from minicpmv_nb.model import tiny_checkpoint
    base = tiny_checkpoint(tmp_path/'base', [QUESTION, *ANSWERS], '2.6', hidden_size=512, intermediate_size=1024, num_hidden_layers=2, vocab_size=20_000)
    zero = zero_file(tmp_path, max(stage, 2), 'optimizer', bucket=1_000_000)
    if stage == 1: (tmp_path/'zero.json').write_text((tmp_path/'zero.json').read_text().replace('"stage": 2', '"stage": 1'))
    cfg = config.full(str(base), str(draw_data(tmp_path, 8)), deepspeed=zero, bf16=True, fp16=False, use_cpu=True, max_steps=3, tune_vision=False,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, dataloader_num_workers=0, save_strategy='no', report_to='none', output_dir=str(tmp_path/'run'))
    fork_ranks(counted, ranks, tmp_path/'log', to_flags(cfg))
    e = estimate(cfg, ranks)
    want = parts(e, 'training', {r['part'] for r in e.rows if 'backward pass' in r['part'] or 'at work' in r['part']} | {'gradients'})
    gathered = (parts(e, 'training', {'buckets and gathered weights'}) - parts(e, 'step', {'buckets and gathered weights'}))*(stage == 3) # at most
    held = max(json.loads((tmp_path/'run'/f'held-{r}.json').read_text())['passes'] for r in range(ranks))
    assert want*(.8 if stage == 1 else .95) < held < 1.05*(want + gathered) # ZeRO-1 does it behind the backward pass, without activations

def test_remedies_of_real_size(tmp_path):
    "What helps, helps; GB for the published sizes, in the order that everybody expects."
    from minicpmv_nb import estimate
    from minicpmv_nb.config import full, lora
    from minicpmv_nb.families import FAMILIES
    (tmp_path/'config.json').write_text(json.dumps(FAMILIES['2.6'].official))
    base = lora(str(tmp_path), '', bf16=True, fp16=False, tune_vision=False, deepspeed='ds_config_zero2.json')
    total = lambda cfg, gpus=1: estimate(cfg, gpus).total
    plain = total(base)
    assert total(replace(base, per_device_train_batch_size=1)) < plain < total(replace(base, gradient_checkpointing=False))
    assert total(replace(base, q_lora=True)) < .7*plain
    whole = full(str(tmp_path), '', bf16=True, fp16=False)
    assert total(replace(whole, offload='all'), 8) < total(whole, 8) < total(replace(whole, deepspeed='ds_config_zero2.json'), 8)

@pytest.fixture
def asked(tmp_path):
    "An estimate for all of 2.6 in full on one GPU, with fields of our own DeepSpeed configuration changed."
    from minicpmv_nb import estimate
    from minicpmv_nb.config import full
    from minicpmv_nb.families import FAMILIES
    (tmp_path/'config.json').write_text(json.dumps(FAMILIES['2.6'].official))
    cfg = full(str(tmp_path), '', bf16=True, fp16=False, tune_vision=False, gradient_accumulation_steps=1)
    def ask(stage, gpus=1, **zero):
        given = deepspeed_json(replace(cfg, deepspeed=f'ds_config_zero{max(stage, 2)}.json'))
        given['zero_optimization'] |= dict(stage=stage) | zero
        (tmp_path/'zero.json').write_text(json.dumps(given))
        return estimate(replace(cfg, deepspeed=str(tmp_path/'zero.json')), gpus)
    return ask

def test_locked_memory_is_rounded_up(asked):
    "torch takes a power of two for each page-locked block: float32 weights, gradients and the 16-bit copy of each group, and a way out for one gradient."
    pageable = asked(2, offload_optimizer=dict(device='cpu', pin_memory=False)).host
    assert pageable == pytest.approx(18*7.68 + 2*.5436, rel=.002) # bytes times thousand millions
    assert asked(2, offload_optimizer=dict(device='cpu')).host == pytest.approx(172.3, abs=.1) # DeepSpeed's default

def test_a_deepspeed_file_may_offload_one_without_the_other(asked):
    weights, none, both = (asked(3, **{f'offload_{k}': dict(device='cpu') for k in what}) for what in (('param',), (), ('param', 'optimizer')))
    part = lambda e, name, moment: next(r[moment] for r in e.rows if r['part'] == name)
    assert part(weights, 'weights', 'step') == 0 and part(weights, 'optimizer', 'step') == part(none, 'optimizer', 'step') > 90
    assert part(both, 'optimizer', 'step') == 0 and both.host > weights.host > 16
    assert weights.total < none.total

def test_nvme_is_not_the_memory_of_the_machine(asked):
    e = asked(3, offload_optimizer=dict(device='nvme', nvme_path='/x'), offload_param=dict(device='nvme', nvme_path='/x'))
    assert e.host == 0 and 'What goes to NVMe is not reckoned' in str(e)

def test_a_bucket_that_transformers_sizes(asked):
    # The official ds_config_zero3.json has "auto" there.
    bucket = lambda stage, size: next(r['training'] for r in asked(stage, reduce_bucket_size=size).rows if r['part'] == 'buckets and gathered weights')
    from minicpmv_nb.families import FAMILIES
    hidden = FAMILIES['2.6'].official['hidden_size']
    assert all(bucket(stage, 'auto') == bucket(stage, hidden**2) != bucket(stage, 5e8) for stage in (2, 3))

def test_zero_1_offloads_no_gradient_before_the_end(asked):
    gradients = lambda stage: next(r['training'] for r in asked(stage, offload_optimizer=dict(device='cpu')).rows if r['part'] == 'gradients')
    assert gradients(2) == 0 and gradients(1) == pytest.approx(2*7.68, rel=.01)

def test_overlapping_takes_a_second_bucket(asked):
    bucket = lambda **zero: next(r['training'] for r in asked(2, reduce_bucket_size=5e8, **zero).rows if r['part'] == 'buckets and gathered weights')
    assert bucket(overlap_comm=True) == 2*bucket() == 2.0

def test_gpus_share_the_norm_of_what_is_offloaded(asked):
    away = dict(offload_optimizer=dict(device='cpu'))
    one, two, eight = (asked(2, gpus=gpus, **away).total for gpus in (1, 2, 8))
    assert one - two == pytest.approx(8*.5436/2, rel=.01) and two > eight # the head's, of which each has half

def test_zero_3_copies_a_gradient_to_the_gpu_once_more(asked):
    work = lambda *what: next(r['training'] for r in asked(3, **{f'offload_{k}': dict(device='cpu') for k in what}).rows if 'at work' in r['part'])
    assert work('optimizer') - work('optimizer', 'param') == pytest.approx(2*.5436, rel=.01) # where weights are gathered, it takes the room of one

def test_zero_3_steps_as_many_parameters_as_it_was_told(asked):
    copies = lambda **zero: next(r['step'] for r in asked(3, **zero).rows if r['part'] == 'copies while stepping')
    assert copies(sub_group_size='auto') == copies() == pytest.approx(8) and copies(sub_group_size=1e8) == pytest.approx(.8) and copies(sub_group_size=1e12) == pytest.approx(8*6.53, rel=.01)

@pytest.mark.parametrize('family', ['2.0', '2.5', '2.6', 'o-2.6', '4.0', '4.5'])
def test_every_family_can_be_estimated(family, tmp_path):
    from minicpmv_nb import estimate
    from minicpmv_nb.config import qlora
    from minicpmv_nb.model import tiny_checkpoint
    folder = tiny_checkpoint(tmp_path/'tiny', [QUESTION], family)
    e = estimate(qlora(str(folder), str(draw_data(tmp_path, 4))), gpus=2)
    assert 0 < e.total < .5 and 'the heaviest of the 4 samples' in str(e) and str(e.work.tokens).isdigit()
    activations = [r for r in e.rows if 'backward' in r['part']]
    assert all(r['training'] > 0 for r in activations)

def test_text_without_pictures_can_be_estimated(bases, tmp_path):
    from minicpmv_nb import estimate
    from minicpmv_nb.config import lora
    text, some = (str(draw_mixed(tmp_path, 6, name, pictures=shown)) for name, shown in (('text.json', [0]), ('some.json', [0, 1])))
    for folder in bases.values():
        without, with_pictures = (estimate(lora(str(folder), data), 1) for data in (text, some))
        assert not any(without.work.pieces) and 0 < parts(without, 'training', {'tower, for the backward pass'}) < parts(with_pictures, 'training', {'tower, for the backward pass'})

def test_a_tower_in_four_bits_is_counted_so(tmp_path):
    from minicpmv_nb import estimate
    from minicpmv_nb.config import lora, qlora
    from minicpmv_nb.families import FAMILIES
    weights = lambda **how: estimate(qlora(str(tmp_path), '', deepspeed=None, tune_vision=False, **how), 1).rows[0]['training']
    def stored(**how): (tmp_path/'config.json').write_text(json.dumps(FAMILIES['2.6'].official | how))
    stored(); plain, asked = weights(), weights(quantize_vision=True)
    four_bit = dict(quant_method='bitsandbytes', load_in_4bit=True, bnb_4bit_quant_type='nf4')
    stored(quantization_config=four_bit | dict(llm_int8_skip_modules=['out_proj', 'kv_proj', 'lm_head'])); assert weights() == asked < plain
    stored(quantization_config=four_bit | dict(llm_int8_skip_modules=['out_proj', 'kv_proj', 'lm_head', 'vpm'])); assert weights() == plain
    with pytest.raises(ValueError, match='is quantised: it can only be trained with use_lora=True, q_lora=True'): estimate(lora(str(tmp_path), ''))

@pytest.mark.parametrize('method', ['lora', 'qlora'])
def test_fp16_needs_what_bf16_needs(method, tmp_path):
    "Without DeepSpeed a step on paper runs under autocast, of which a CPU has bfloat16 only."
    from minicpmv_nb import config, estimate
    from minicpmv_nb.families import FAMILIES
    (tmp_path/'config.json').write_text(json.dumps(FAMILIES['2.0'].official))
    total = lambda **precision: estimate(getattr(config, method)(str(tmp_path), '', deepspeed=None, **precision), 1).total
    assert total() == total(fp16=False, bf16=True)

@pytest.mark.parametrize('gpus', [0, -1])
def test_no_gpu_at_all(gpus, tiny):
    from minicpmv_nb import estimate
    from minicpmv_nb.config import lora
    with pytest.raises(ValueError, match=f'gpus is {gpus}: give the number of GPUs, at least 1, or None.'): estimate(lora(str(tiny), ''), gpus)

def test_a_data_file_that_is_not_there(tiny, drawn, tmp_path, monkeypatch):
    from minicpmv_nb import estimate
    from minicpmv_nb.config import lora
    with pytest.raises(FileNotFoundError, match='There is no data file trian.json. Correct data_path, or leave it empty'): estimate(lora(str(tiny), 'trian.json'))
    monkeypatch.setenv('HOME', str(drawn.parent))
    assert estimate(lora(str(tiny), f'~/{drawn.name}')).work == estimate(lora(str(tiny), str(drawn))).work

def test_of_an_unknown_model_on_a_hub_no_weights_are_fetched(tiny, monkeypatch):
    import huggingface_hub
    from minicpmv_nb import estimate
    from minicpmv_nb.config import lora
    asked = []
    def fetch(name, revision, allow_patterns, local_files_only): asked.append((name, allow_patterns)); return str(tiny)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
    assert estimate(lora('somebody/a-model-of-theirs', '')).total > 0 and asked == [('somebody/a-model-of-theirs', ['*.json'])]

@pytest.mark.parametrize('file', sorted((TESTS.parent/'benchmarks'/'results').glob('NVIDIA-*.json')), ids=lambda f: f.stem)
def test_the_allocator_of_a_gpu(file, tmp_path, monkeypatch):
    "What `estimate` says today is within 10 % of what a GPU once held, while loading and at the peak."
    monkeypatch.syspath_prepend(str(TESTS.parent/'benchmarks'))
    import gpu_modes
    rows = gpu_modes.estimates(json.loads(file.read_text()), tmp_path)
    measured = [r for r in rows if 'measured' in r]
    assert len(measured) >= 2
    for r in measured:
        for moment, gb in r['measured'].items(): assert r['expected'][moment] == pytest.approx(gb, rel=.1), (r['mode'], moment)
    peak = {r['mode']: r['measured']['training'] for r in measured}
    assert all(gb < .6*peak[mode.removeprefix('q')] for mode, gb in peak.items() if mode.startswith('qlora'))

def test_a_result_gets_more_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS.parent/'benchmarks'))
    import gpu_modes
    facts = json.loads((TESTS.parent/'benchmarks'/'results'/'NVIDIA-H200.json').read_text())
    rows = facts.pop('rows')
    assert gpu_modes.others(facts, ['lora'], tmp_path) == []
    gpu_modes.write(rows, facts, tmp_path)
    assert [r['mode'] for r in gpu_modes.others(facts, ['lora'], tmp_path)] == [r['mode'] for r in rows if r['mode'] != 'lora']
    with pytest.raises(SystemExit, match='differs in steps'): gpu_modes.others(facts | dict(steps=9), [], tmp_path)
    with pytest.raises(SystemExit, match='differs in torch'): gpu_modes.others(facts | dict(versions=facts['versions'] | dict(torch='9')), [], tmp_path)

@pytest.mark.slow
def test_the_benchmark_at_toy_size(tmp_path):
    said = subprocess.run([sys.executable, TESTS.parent/'benchmarks'/'gpu_modes.py', *'--scale tiny --gpus 2 --steps 2 --modes qlora-zero2-offload --work'.split(), tmp_path/'work', '--out', tmp_path/'results'],
        env=os.environ | dict(CUDA_VISIBLE_DEVICES=''), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert said.returncode == 0, said.stdout[-4000:]
    row = json.loads((tmp_path/'results'/'cpu-tiny.json').read_text())['rows'][0]
    assert abs(row['difference']) < .03 and row['seconds_per_step'] > 0 and len(row['losses']) == 2
    assert '| qlora-zero2-offload | 2 |' in (tmp_path/'results'/'cpu-tiny.md').read_text()
