"Training that counts the bytes of all tensors of its process: behind the second backward pass, before ZeRO steps its largest group, and behind the step; and the most that the forward and backward pass had beside what was there. They end up in held-RANK.json of the run folder."
import gc, json, os
from pathlib import Path

import deepspeed, torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers import TrainerCallback

from minicpmv_nb import training
from minicpmv_nb.estimating import Ledger

held = {}

def alive()->list[torch.Tensor]:
    "All tensors of this process, gradients included."
    gc.collect() # what nobody can reach any more is freed some time or other
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None]

def count()->int:
    "Bytes of all blocks of memory that some tensor uses."
    tensors = alive()
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided and not t.is_meta}
    return sum(n for p, n in blocks.items() if p)

class Count(TrainerCallback):
    def on_step_begin(self, args, state, control, **kw):
        if args.deepspeed: held['ledger'] = Ledger([t for t in alive() if t.layout == torch.strided]).__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kw): held.setdefault('training', []).append(count()) # under DeepSpeed behind the step
    def on_step_end(self, args, state, control, **kw): held.setdefault('step', []).append(count())
    def on_train_end(self, args, state, control, **kw):
        if 'engine' in held: held['training'] = held.pop('engine')
        if 'group' in held: held['stepping'] = [max(v for n, v in held['group'] if n == i) for i in range(state.global_step)]; del held['group']
        (Path(args.output_dir)/f'held-{os.environ["RANK"]}.json').write_text(json.dumps({k: v[1] for k, v in held.items()}))

step = deepspeed.DeepSpeedEngine.step
def counted_step(self, *args, **kwargs):
    ledger = held.pop('ledger')
    ledger.__exit__(None, None, None)
    held.setdefault('passes', []).append(ledger.peak)
    held.setdefault('engine', []).append(count())
    return step(self, *args, **kwargs)
deepspeed.DeepSpeedEngine.step = counted_step

for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
    def counted_group(self, group, plain=optimizer._optimizer_step): # one group of the optimiser after the other
        held.setdefault('group', []).append((len(held.get('step', [])), count()))
        return plain(self, group)
    optimizer._optimizer_step = counted_group

def main(argv:list[str])->None: training.main(argv, callbacks=(Count,))
