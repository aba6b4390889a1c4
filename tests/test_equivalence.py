"""A step is the same step however its four samples are spread: one batch, four accumulated ones, or two ranks; without DeepSpeed, under ZeRO-2 and ZeRO-3.

Plain SGD with a large rate, so that a wrong scale of the gradient changes the weights (Adam would hide it), and answers of unequal length, so that a mean of
means is not the mean over all tokens.
"""
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from minicpmv_nb.config import read_metrics
from minicpmv_nb.model import tiny_checkpoint
from forked import fork_ranks, train
from support import ANSWERS, QUESTION, draw_mixed, flags

STEPS = 3
SPREADS = {'batch 4': (1, 4, 1), '1 x 4': (1, 1, 4), '2 ranks x 2': (2, 2, 1)}  # ranks, batch, accumulation
REFERENCE = ('batch 4', None)
BEYOND_MAKE_TEST = [('batch 4', 2), ('1 x 4', 2), ('batch 4', 3), ('1 x 4', 3)]
CELLS = [(spread, stage) for stage in (None, 2, 3) for spread in SPREADS if (spread, stage) != REFERENCE]
SETTINGS = dict(use_cpu='true', use_lora='true', tune_vision='true', tune_resampler='true', max_steps=STEPS, optim='sgd', learning_rate=0.1, max_grad_norm=0,
    weight_decay=0, lora_dropout=0, lr_scheduler_type='constant', warmup_ratio=0, save_strategy='no', dataloader_num_workers=0)


@pytest.fixture(scope='session')
def few_pictures(tmp_path_factory):
    "Of ten samples one shows two pictures and one shows one: most steps have a rank without any, and no two ranks have equally many pieces."
    return draw_mixed(tmp_path_factory.mktemp('few'), 20, pictures=[0, 0, 2, 0, 0, 0, 1, 0, 0, 0])

@pytest.fixture(scope='session')
def run(tiny, drawn, few_pictures, tmp_path_factory):
    "Train once per cell; gives losses, gradient norms and the final weights of the adapter. `family`: another one, on samples of which few show pictures."
    @cache
    def cell(spread, stage, work=train, family=None):
        base, data = (tiny_checkpoint(tmp_path_factory.mktemp('base'), [QUESTION, *ANSWERS], family), few_pictures) if family else (tiny, drawn)
        out, (ranks, batch, accumulation) = tmp_path_factory.mktemp('run'), SPREADS[spread]
        more = dict(deepspeed=f'ds_config_zero{stage}.json') if stage else {}
        fork_ranks(work, ranks, out.with_suffix('.log'), flags(model_name_or_path=base, data_path=data, output_dir=out, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            **SETTINGS, **more))
        steps = [m for m in read_metrics(out) if 'loss' in m]
        return [m['loss'] for m in steps], [m['grad_norm'] for m in steps], load_file(out/'final'/'adapter_model.safetensors')
    return cell

def gaps(ours, theirs):
    "Largest differences of loss, gradient norm and weights, relative to the value where it is above one."
    numbers = [max(abs(a-b)/max(1, abs(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(ours[:2], theirs[:2])]
    assert ours[2].keys() == theirs[2].keys()
    weights = max(float(((ours[2][n] - w).abs()/w.abs().clamp(min=1)).max()) for n, w in theirs[2].items())
    return dict(loss=numbers[0], grad_norm=numbers[1], weights=weights)

def name(cell): return f'{cell[0]}, {f"ZeRO-{cell[1]}" if cell[1] else "plain"}'

@pytest.mark.parametrize('cell', [pytest.param(c, id=name(c), marks=[pytest.mark.slow] if c in BEYOND_MAKE_TEST else []) for c in CELLS])
def test_same_steps(run, cell):
    found = gaps(run(*cell), run(*REFERENCE))
    print(name(cell), found)
    assert all(gap < 1e-5 for gap in found.values()), found

@pytest.mark.parametrize('family, stage', [('2.6', 2), ('2.6', 3), ('2.0', 3), pytest.param('4.5', 3, marks=pytest.mark.slow), pytest.param('2.6', None, marks=pytest.mark.slow), pytest.param('4.0', 2, marks=pytest.mark.slow)])
def test_same_steps_where_ranks_have_no_picture(run, family, stage):
    found = gaps(run('2 ranks x 2', stage, family=family), run(*REFERENCE, family=family))
    assert all(gap < 1e-5 for gap in found.values()), found

def test_the_run_learns(run):
    # Equal results would also come from runs that change nothing.
    losses, norms, weights = run(*REFERENCE)
    assert len(losses) == STEPS and losses[-1] < losses[0] and min(norms) > 0.1
    assert all(w.abs().max() > 0 for n, w in weights.items() if 'lora_B' in n)

def train_doubled(argv):
    import doubled_loss
    doubled_loss.training.main(argv)

def test_a_doubled_loss_is_noticed(run):
    found = gaps(run(*REFERENCE, train_doubled), run(*REFERENCE))
    assert all(gap > 1e-3 for gap in found.values()), found
