"""What it costs ZeRO-3 to gather weights module by module, as it does by itself, and layer by layer, as `minicpmv_nb` lets it. README.md tells how to run it."""
import argparse, json, os, shutil, statistics, subprocess, sys, time
from pathlib import Path

from transformers import TrainerCallback

from minicpmv_nb import training
from minicpmv_nb.config import lora, qlora, read_metrics, to_flags
from minicpmv_nb.jobs import _environment
from minicpmv_nb.model import tiny_checkpoint
from gpu_modes import HERE, TEXT, make_data

WAYS = {'no DeepSpeed': None, 'ZeRO-2': 'ds_config_zero2.json', 'ZeRO-3, by module': 'ds_config_zero3.json', 'ZeRO-3, by layer': 'ds_config_zero3.json'}


class Clock(TrainerCallback):
    "Seconds of every step."
    def __init__(self): self.seconds, self.start = [], 0.0
    def on_step_begin(self, args, state, control, **kw): self.start = time.time()
    def on_step_end(self, args, state, control, **kw): self.seconds.append(time.time() - self.start)
    def on_train_end(self, args, state, control, **kw): (Path(args.output_dir)/f'clock-{args.process_index}.json').write_text(json.dumps(self.seconds))

def rank()->None:
    "What torchrun starts."
    if os.environ.get('BY_MODULE'): training.gather_by_layer = lambda model: None
    training.main(callbacks=(Clock,))

def measure(way:str, make, base:Path, data:Path, out:Path, args)->dict:
    "Seconds of the steps of one way, and their losses."
    cfg = make(str(base), str(data), deepspeed=WAYS[way], bf16=True, fp16=False, use_cpu=True, gpus=args.processes, lora_target_modules='llm.attention llm.mlp', lora_dropout=0.0, tune_vision=False, learning_rate=1e-3, max_steps=args.steps,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, dataloader_num_workers=0, save_strategy='no', report_to='none', output_dir=str(out))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc_per_node', str(args.processes), __file__, *to_flags(cfg)]
    with open(out.with_suffix('.log'), 'w') as log: subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=os.environ | _environment(cfg) | dict(OMP_NUM_THREADS='1') | (dict(BY_MODULE='1') if 'module' in way else {}))
    seconds = json.loads((out/'clock-0.json').read_text())
    return dict(way=way, second_step=seconds[1], later_steps=statistics.median(seconds[2:]), losses=[m['loss'] for m in read_metrics(out) if 'loss' in m])

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--layers', type=int, default=28, help='of the language model; 28 has 2.6')
    parser.add_argument('--steps', type=int, default=8)
    parser.add_argument('--work', type=Path, default=Path('benchmark_work'), help='removed at the start')
    args = parser.parse_args()
    work = args.work.absolute()
    shutil.rmtree(work, ignore_errors=True); work.mkdir(parents=True)
    base, data = tiny_checkpoint(work/'base', [TEXT], '2.6', hidden_size=64, intermediate_size=128, num_hidden_layers=args.layers), make_data(work/'data', 20, 100)
    lines = [f'# ZeRO-3 by module and by layer: a toy model with {args.layers} layers, LoRA on all their matrices, {args.processes} process{"es"*(args.processes > 1)} on a CPU', '', '| | second step, s | later steps, s | times ZeRO-2 | loss of the last step |', '|---|---:|---:|---:|---:|']
    for name, make in (('LoRA', lora), ('QLoRA', qlora)):
        found = {way: measure(way, make, base, data, work/f'{name}-{i}', args) for i, way in enumerate(WAYS)}
        for way, r in found.items():
            lines.append(f'| {name}, {way} | {r["second_step"]:.2f} | {r["later_steps"]:.2f} | {r["later_steps"]/found["ZeRO-2"]["later_steps"]:.1f} | {r["losses"][-1]:.4f} |')
            print(lines[-1], flush=True)
    (HERE/'results'/f'cpu-zero3-layers-{args.processes}.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': rank() if 'RANK' in os.environ else main()
