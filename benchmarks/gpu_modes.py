"""Memory and time of each way to train, beside what `estimate` says. README.md tells how to run it."""
import argparse, gc, json, os, shlex, shutil, statistics, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import TrainerCallback

from minicpmv_nb import config, training
from minicpmv_nb.config import deepspeed_json, read_metrics, zero_stage
from minicpmv_nb.estimating import Estimate, estimate
from minicpmv_nb.families import FAMILIES, read_config
from minicpmv_nb.jobs import launch
from minicpmv_nb.model import LEFT_OUT_SIZE, MiniCPMV, processor_settings, tiny_checkpoint

HERE = Path(__file__).resolve().parent
ZERO = {'': {}, 'zero2': dict(deepspeed='ds_config_zero2.json'), 'zero3': dict(deepspeed='ds_config_zero3.json'), 'zero2-offload': dict(deepspeed='ds_config_zero2.json', offload='optimizer'),
    'zero3-offload': dict(deepspeed='ds_config_zero3.json', offload='all')}
MODES = {f'{method}-{zero}'.strip('-'): (method, changes) for method in ('lora', 'qlora', 'full') for zero, changes in ZERO.items()}
TINY = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=4) # weights are most of what a process holds
TEXT = 'What is shown here, and what is written below it? A red dot on white paper, and a line of text that nobody can read.'


# --- what is trained on ----------------------------------------------------------------------------------------------

def make_checkpoint(
    folder:Path, # A new one
    family:str, # A key of `FAMILIES`
    scale:str, # `published`: the published sizes; `tiny`
    layers:int|None=None, # Of the language model; None: all
)->Path: # A checkpoint with random weights
    "Write tokenizer, settings and random weights. Nothing is downloaded."
    tiny_checkpoint(folder, [TEXT], family, **TINY if scale == 'tiny' else {})
    if scale == 'tiny': return folder
    known, official = read_config(folder), FAMILIES[family].official
    sizes = official | {k: known[k] for k in ('bos_token_id', 'eos_token_id')} | (dict(num_hidden_layers=layers) if layers else {})
    (folder/'config.json').write_text(json.dumps(sizes, indent=1))
    if FAMILIES[family].processor_file: (folder/'preprocessor_config.json').write_text(json.dumps(processor_settings(sizes, FAMILIES[family])))
    (folder/'model.safetensors').unlink()
    write_weights(folder, sizes, FAMILIES[family].left_out)
    return folder

def write_weights(
    folder:Path, # Where to
    sizes:dict, # `config.json`
    left_out:tuple, # Beginnings of names of parts that are not used
    at_once:float=2e9, # Numbers in one file
)->None:
    "Random weights in bfloat16, file by file."
    with torch.device('meta'): shapes = {n: p.shape for n, p in MiniCPMV(sizes).state_dict().items()} | {f'{n}weight': torch.Size(LEFT_OUT_SIZE) for n in left_out}
    device, files, room = 'cuda' if torch.cuda.is_available() else 'cpu', [{}], at_once
    for name, shape in shapes.items():
        if shape.numel() > room and files[-1]: files.append({}); room = at_once
        files[-1][name] = shape; room -= shape.numel()
    for i, some in enumerate(files):
        weight = lambda name, shape: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 and 'norm' in name else (torch.randn(shape, dtype=torch.bfloat16, device=device)*.02).cpu()
        save_file({n: weight(n, s) for n, s in some.items()}, folder/f'model-{i}.safetensors', metadata=dict(format='pt'))
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={n: f'model-{i}.safetensors' for i, some in enumerate(files) for n in some})))

def make_data(
    folder:Path, # A new one
    words:int, # Of each answer
    side:int, # Pixels of each picture
)->Path: # A data file of equal samples
    "Write a data file whose samples cost the same."
    folder.mkdir(parents=True)
    Image.new('RGB', (side, side), 'white').save(folder/'picture.png')
    answer = ' '.join((TEXT.split()*(words//20 + 1))[:words])
    talk = [dict(role='user', content='<image>\nWhat is shown here?'), dict(role='assistant', content=answer)]
    (folder/'train.json').write_text(json.dumps([dict(id=str(i), image='picture.png', conversations=talk) for i in range(64)]))
    return folder/'train.json'


# --- what a rank measures --------------------------------------------------------------------------------------------

def held()->int:
    "Bytes of all tensors of this process."
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided and not t.is_meta}.values())

class Watch(TrainerCallback):
    "On a GPU the allocator's peaks; on a CPU the bytes of all tensors behind a step, and the size of the process."
    def __init__(self): self.found, self.start = dict(loading=self.peak(), steps=[]), None

    def peak(self)->int: return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else held()

    def on_step_begin(self, args, state, control, **kw):
        if torch.cuda.is_available(): torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        self.start = time.time()

    def on_step_end(self, args, state, control, **kw):
        import psutil
        if torch.cuda.is_available(): torch.cuda.synchronize()
        seconds, reserved = time.time() - self.start, torch.cuda.max_memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        self.found['steps'].append(dict(seconds=seconds, peak=self.peak(), reserved=reserved))

    def on_train_end(self, args, state, control, **kw): (Path(args.output_dir)/f'watched-{args.process_index}.json').write_text(json.dumps(self.found))

def rank()->None:
    "What torchrun starts instead of `minicpmv_nb.training`."
    make = training.make_trainer
    def make_trainer(cfg):
        trainer = make(cfg)
        trainer.add_callback(Watch())
        return trainer
    training.make_trainer = make_trainer
    training.main()


# --- a mode ----------------------------------------------------------------------------------------------------------

def configure(mode:str, base:Path, data:Path, out:Path, args)->config.Config:
    "The run of a mode: the guide's numbers, a few steps, nothing saved on the way."
    method, changes = MODES[mode]
    cfg = getattr(config, method)(str(base), str(data), **dict(deepspeed=None) | changes, bf16=True, fp16=False, use_cpu=not torch.cuda.is_available(), gpus=args.gpus, tune_vision=False, max_steps=args.steps,
        gradient_accumulation_steps=1, save_strategy='no', report_to='none', dataloader_num_workers=2 if torch.cuda.is_available() else 0, output_dir=str(out/mode))
    if args.scale != 'tiny' or not cfg.deepspeed: return cfg
    given = deepspeed_json(cfg)
    given['zero_optimization']['reduce_bucket_size'] = 2_000_000 # ours would be all of such a small model
    (out/f'{mode}.json').write_text(json.dumps(given))
    return replace(cfg, deepspeed=str(out/f'{mode}.json'), offload='none')

def too_much(e:Estimate)->str|None:
    "Why a mode is not tried here."
    import psutil
    there = torch.cuda.get_device_properties(0).total_memory/1e9 if torch.cuda.is_available() else float('inf')
    if e.total + 1 > there: return f'needs {e.total:.0f} GB on a GPU that has {there:.0f}'
    if e.host*e.gpus > psutil.virtual_memory().available/1e9: return f'needs {e.host*e.gpus:.0f} GB of the machine\'s memory'

def expected(e:Estimate, stage:int, gpu:bool)->dict:
    "GB: the peak of loading and of training; on a CPU what is there behind a step, with what is offloaded. The buckets of DDP are held by C++, which `held` cannot see."
    if gpu: return dict(loading=e.together['loading'], training=max(e.together['training'], e.together['step']))
    kept = ('weights', 'optimizer') + (('buckets and gathered weights',) if stage else ()) + (('gradients',) if stage == 3 else ())
    return dict(loading=e.together['loading'], training=e.host + sum(r['step'] for r in e.rows if r['part'] in kept))

def measure(mode:str, base:Path, data:Path, out:Path, args)->dict:
    "Run a mode, and say what it took; or why it was not run, or failed."
    cfg = configure(mode, base, data, out, args)
    e = estimate(cfg)
    row = dict(mode=mode, gpus=args.gpus, estimate=e.together, host=e.host)
    if why := too_much(e): return row | dict(failed=f'not run: {why}')
    run = launch(cfg, start=False)
    script = run.file('run.sh')
    script.write_text(script.read_text().replace('-m minicpmv_nb.training', shlex.quote(str(HERE/'gpu_modes.py'))))
    with open(run.file('log.txt'), 'w') as log: code = subprocess.run(['bash', str(script)], stdout=log, stderr=subprocess.STDOUT).returncode
    if code: return row | dict(failed=run.status().get('error') or run.log(3))
    return row | summary([json.loads(f.read_text()) for f in sorted(run.folder.glob('watched-*.json'))], expected(e, zero_stage(cfg), torch.cuda.is_available()), read_metrics(run.folder))

def summary(watched:list[dict], want:dict, metrics:list[dict])->dict:
    "The worst rank's memory, beside what was expected; the median time of a step, without the first."
    have = dict(loading=max(w['loading'] for w in watched)/1e9, training=max(s['peak'] for w in watched for s in w['steps'])/1e9)
    steps = [s['seconds'] for s in watched[0]['steps'][1:]]
    return dict(seconds_per_step=statistics.median(steps), measured=have, expected=want, difference=want['training']/have['training']-1, reserved=max(s['reserved'] for w in watched for s in w['steps'])/1e9,
        losses=[m['loss'] for m in metrics if 'loss' in m])


# --- the result ------------------------------------------------------------------------------------------------------

def table(rows:list[dict], gpu:bool)->str:
    "Markdown."
    what = ('GB at most', 'estimated') if gpu else ('MB of tensors behind a step', 'estimated')
    number = (lambda v: f'{v:.2f}') if gpu else (lambda v: f'{1000*v:.1f}')
    lines = [('mode', 'processes', 'seconds a step', *what, 'difference', 'reserved GB' if gpu else 'process, GB'), ('---',)*7]
    for r in rows:
        if 'failed' in r: lines.append((r['mode'], str(r['gpus']), ' '.join(r['failed'].split())[:160].replace('|', ' '), '', '', '', '')); continue
        lines.append((r['mode'], str(r['gpus']), f'{r["seconds_per_step"]:.2f}', number(r['measured']['training']), number(r['expected']['training']), f'{r["difference"]:+.1%}', f'{r["reserved"]:.2f}'))
    return '\n'.join('| ' + ' | '.join(l) + ' |' for l in lines)

def write(rows:list[dict], args, folder:Path)->Path:
    "A JSON file and a markdown table, named after the device."
    from importlib.metadata import version
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else 'CPU'
    name = (device.replace(' ', '-') if gpu else 'cpu') + ('' if args.scale == 'published' else '-tiny') + (f'-{args.layers}-layers' if args.layers else '')
    facts = dict(device=device, family=args.family, scale=args.scale, layers=args.layers, steps=args.steps, versions={p: version(p) for p in ('torch', 'transformers', 'peft', 'deepspeed', 'bitsandbytes')})
    said = '' if gpu else 'Made without a GPU, on a checkpoint of toy size: it shows that the script and the estimate agree on what a process holds. It says nothing about the memory or speed of a GPU.\n\n'
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{name}.json').write_text(json.dumps(facts | dict(rows=rows), indent=1) + '\n')
    (folder/f'{name}.md').write_text(f'# {device}, MiniCPM-V {args.family}, {args.scale} sizes\n\n{said}{table(rows, gpu)}\n\n' + ', '.join(f'{k} {v}' for k, v in facts['versions'].items()) + '\n')
    return folder/f'{name}.md'

def arguments()->argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=f'Modes: {", ".join(MODES)}')
    parser.add_argument('--family', default='2.6', choices=FAMILIES)
    parser.add_argument('--modes', nargs='+', default=list(MODES), choices=MODES, metavar='MODE')
    parser.add_argument('--scale', default='published', choices=['published', 'tiny'], help='sizes of the checkpoint')
    parser.add_argument('--layers', type=int, help='of the language model, where all are too many')
    parser.add_argument('--gpus', type=int, default=1, help='processes; on a CPU as well')
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--work', type=Path, default=Path('benchmark_work'), help='for checkpoint and runs; removed at the start')
    parser.add_argument('--out', type=Path, default=HERE/'results')
    return parser.parse_args()

def main()->None:
    args = arguments()
    work = args.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    base = make_checkpoint(work/'base', args.family, args.scale, args.layers)
    data = make_data(work/'data', *((500, 1344) if args.scale == 'published' else (40, 200)))
    rows = []
    for mode in args.modes:
        rows.append(measure(mode, base, data, work, args))
        print(table(rows[-1:], torch.cuda.is_available()).splitlines()[-1], flush=True)
        write(rows, args, args.out) # what is there survives the rest
    print(write(rows, args, args.out))


if __name__ == '__main__': rank() if 'RANK' in os.environ else main()
