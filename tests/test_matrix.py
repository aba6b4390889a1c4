"""Every way to train: three methods x four ways to share the work x one and two ranks, on two families.

A cell trains three steps with a checkpoint after the second, saves, and is resumed from that checkpoint by new processes, which must come to the same step, the same weights
and the same logits. What is saved must then read as what the trainer had: trained tensors have moved, frozen ones have not.
"""
import json, math, shutil
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from forked import fork_ranks
from minicpmv_nb import training
from minicpmv_nb.batches import collate
from minicpmv_nb.config import Config, read_metrics, read_status
from minicpmv_nb.model import load, tiny_checkpoint
from minicpmv_nb.quantizing import keep_layout, load_any
from minicpmv_nb.tuning import add_adapter
from support import ANSWERS, QUESTION, draw_data, flags

# Some of each model stays frozen. The tower is trained beside LoRA, as the guide's script does it.
METHODS = dict(lora=dict(use_lora='true', lora_r=8, tune_vision='true'), qlora=dict(use_lora='true', q_lora='true', lora_r=8), full=dict(tune_llm='true'))
SHARDINGS = {'plain': {}, 'ZeRO-2': dict(deepspeed='ds_config_zero2.json'), 'ZeRO-3': dict(deepspeed='ds_config_zero3.json'), 'offload': dict(deepspeed='ds_config_zero2.json', offload='optimizer')}
RANKS, FAMILIES = (1, 2), ('2.5', '2.6')
CELLS = list(product(METHODS, SHARDINGS, RANKS, FAMILIES))
# Ten cells can hold ten of the twelve pairs of method and sharding. The two left out, LoRA without DeepSpeed and under ZeRO-2, are trained all over these tests.
# Their ranks and families cover all other pairs; found by trying all 4^10, and taking one with five of each. Full training under ZeRO-3 by one process had a fault of its own.
TEN = [('lora', 'ZeRO-3', 1, '2.5'), ('lora', 'offload', 2, '2.6'), ('qlora', 'plain', 1, '2.5'), ('qlora', 'ZeRO-2', 1, '2.5'), ('qlora', 'ZeRO-3', 2, '2.5'), ('qlora', 'offload', 1, '2.6'),
    ('full', 'plain', 2, '2.6'), ('full', 'ZeRO-2', 2, '2.6'), ('full', 'ZeRO-3', 1, '2.6'), ('full', 'offload', 2, '2.5')]
# The other families, where ranks share the work.
OTHERS = list(product(METHODS, SHARDINGS, (2,), ('2.0', 'o-2.6', '4.0', '4.5')))
# LoRA in every group of layers, so that nothing below a layer has a gradient but another LoRA.
METHODS['groups'] = dict(use_lora='true', lora_r=8, tune_resampler='false', lora_target_modules='llm.attention llm.mlp vision resampler')
METHODS['attention'] = dict(use_lora='true', lora_r=8, tune_resampler='false')
GROUPS = list(product(('groups', 'attention'), SHARDINGS, (2,), FAMILIES)) + list(product(('groups',), ('ZeRO-3',), (2,), ('2.0', 'o-2.6', '4.0', '4.5')))
TOWER_LORA = ('groups', 'ZeRO-3', 2, '2.6') # failed in the first backward pass once
SETTINGS = dict(max_steps=3, save_steps=2, gradient_accumulation_steps=2, learning_rate=1e-3, lora_dropout=0.05, use_cpu='true', dataloader_num_workers=0)


def pairs(cells): return {((i, c[i]), (j, c[j])) for c in cells for i, j in combinations(range(4), 2)}

def test_ten_cells_cover_what_ten_can():
    assert len(pairs(CELLS)) == 44
    assert pairs(CELLS) - pairs(TEN) == {((0, 'lora'), (1, 'plain')), ((0, 'lora'), (1, 'ZeRO-2'))}


# --- what happens on a rank ------------------------------------------------------------------------------------------

class Witness(TrainerCallback):
    "At the end of training, writes down what trains, and the logits of two samples."
    def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kw):
        batch = collate([train_dataloader.dataset[i] for i in range(2)])
        with torch.no_grad(): logits = model.eval()(**{k: v for k, v in batch.items() if k not in ('labels', 'ids')})['logits'] # on every rank: ZeRO-3 gathers the weights
        if args.process_index == 0: torch.save(dict(batch=batch, logits=logits, trained=[n for n, p in model.named_parameters() if p.requires_grad]), f'{args.output_dir}/witness.pt')

def train_with_witness(argv):
    "To be called on a rank."
    training.main(argv, callbacks=(Witness,))


# --- a cell ----------------------------------------------------------------------------------------------------------

def rows(folder): return [{k: m[k] for k in ('step', 'loss', 'grad_norm', 'learning_rate')} for m in read_metrics(folder) if 'loss' in m]

@pytest.fixture(scope='session')
def base(tmp_path_factory):
    "A tiny checkpoint of a family."
    return cache(lambda family: tiny_checkpoint(tmp_path_factory.mktemp('base'), [QUESTION, *ANSWERS], family))

@pytest.fixture(scope='session')
def cell(base, drawn, tmp_path_factory):
    "The folders of a run that nothing disturbed, and of one that died after its second step and was resumed."
    @cache
    def run(method, sharding, ranks, family):
        root = tmp_path_factory.mktemp('cell')
        argv = lambda out, **also: flags(model_name_or_path=base(family), data_path=drawn, output_dir=out, **SETTINGS, **METHODS[method], **SHARDINGS[sharding], **also)
        fork_ranks(train_with_witness, ranks, root/'whole.log', argv(root/'whole'))
        shutil.copytree(root/'whole', root/'again', ignore=shutil.ignore_patterns('checkpoint-3', 'final', 'witness.pt'))
        (root/'again'/'status.json').write_text(json.dumps(dict(state='failed')))
        fork_ranks(train_with_witness, ranks, root/'again.log', argv(root/'again', resume_from_checkpoint='auto'))
        return root/'whole', root/'again'
    return run

def name(cell): return '-'.join(map(str, cell))

def final(folder): return load_file(next((folder/'final').glob('*.safetensors')))

def inputs(batch): return {k: v for k, v in batch.items() if k not in ('labels', 'ids')}

@torch.no_grad()
def logits(model, batch): return model(**inputs(batch))['logits']

@pytest.mark.parametrize('which', [pytest.param(c, id=name(c), marks=() if c in (*TEN, TOWER_LORA) else pytest.mark.slow) for c in CELLS + OTHERS + GROUPS])
def test_cell(which, cell, base):
    method, folder = which[0], base(which[3])
    whole, again = cell(*which)
    assert [r['step'] for r in rows(whole)] == [1, 2, 3] and all(math.isfinite(r['loss']) for r in rows(whole)) and read_status(whole)['state'] == 'done'
    same_end(whole, again)
    seen, model = torch.load(whole/'witness.pt'), load_any(folder, four_bit=method == 'qlora')
    keep_layout(model)
    before = logits(model, seen['batch'])
    reloaded = logits(load(whole/'final') if method == 'full' else add_adapter(model, whole/'final'), seen['batch'])
    torch.testing.assert_close(reloaded, seen['logits'], rtol=0, atol=1e-5) # with frozen weights from the base: they are unchanged
    assert (reloaded - before).abs().max() > .1
    (check_full if method == 'full' else check_adapter)(final(whole), load_file(folder/'model.safetensors'), seen['trained'])

def same_end(whole, again):
    "The resumed run went on from the second step, and came to the very same end."
    assert f'resuming from {again}/checkpoint-2' in again.with_suffix('.log').read_text() and read_status(again)['state'] == 'done'
    assert rows(again) == rows(whole)
    ours, theirs = final(again), final(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert torch.equal(*(torch.load(f/'witness.pt')['logits'] for f in (again, whole)))

def check_full(after, before, trained):
    moved = {n for n in before if not torch.equal(after[n], before[n])}
    assert after.keys() == before.keys() and moved == set(trained) and 0 < len(moved) < len(before)

TABLE = 'base_model.model.resampler.pos_embed' # of 2.0: it never trains, and is saved with the resampler

def check_adapter(after, before, trained):
    "Holds what trains, and nothing else but the table; what trains in full has moved from where it was, B of LoRA from zero."
    names = {n.replace('.modules_to_save.default', '').replace('.default', '') for n in trained}
    base = lambda n: before[n.removeprefix('base_model.model.')]
    assert names <= after.keys() and after.keys() - names <= {TABLE} and all(torch.equal(after[n], base(n)) for n in after.keys() - names)
    for n in names: assert after[n].count_nonzero() if 'lora_' in n else not torch.equal(after[n], base(n)), n


# --- cells beside each other -----------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('which', [pytest.param(c, id=name(c)) for c in CELLS + GROUPS if c[1] != 'plain'])
def test_sharing_the_work_changes_nothing(which, cell):
    method, _, ranks, family = which
    ours, theirs = cell(*which)[0], cell(method, 'plain', ranks, family)[0]
    for a, b in zip(rows(ours), rows(theirs), strict=True): assert a == pytest.approx(b, rel=1e-4)


# --- evaluating in between -------------------------------------------------------------------------------------------

def test_evaluating_leaves_training_in_four_bits_alone(base, drawn, tmp_path):
    # Some CPUs would lay the weights out anew, for a product without a gradient.
    cfg = Config(str(base('2.6')), str(drawn), use_lora=True, q_lora=True, lora_dropout=0., use_cpu=True, max_steps=3, learning_rate=1e-3, save_strategy='no', dataloader_num_workers=0, output_dir=str(tmp_path/'quiet'))
    for also in (dict(), dict(do_eval=True, eval_data_path=str(draw_data(tmp_path, 2, 'eval.json')), eval_steps=1, output_dir=str(tmp_path/'asked'))): training.train(replace(cfg, **also))
    assert rows(tmp_path/'asked') == rows(tmp_path/'quiet') and len(rows(tmp_path/'quiet')) == 3
