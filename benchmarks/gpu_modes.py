"""Memory and time of each way to train, beside what `estimate` says. README.md tells how to run it."""
import argparse, gc, json, os, platform, shlex, shutil, statistics, subprocess, sys, time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import psutil, torch
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
MEASURED_WITH = ('torch', 'transformers', 'peft', 'deepspeed', 'bitsandbytes') # What may change memory or time
DATA = dict(published=(500, 1344), tiny=(40, 200)) # Words of an answer, pixels of a picture's side
TEXT = 'What is shown here, and what is written below it? A red dot on white paper, and a line of text that nobody can read.'


# --- what is trained on ----------------------------------------------------------------------------------------------

def make_checkpoint(
    folder:Path, # A new one
    family:str, # A key of `FAMILIES`
    scale:str, # `published`: the published sizes; `tiny`
    layers:int|None=None, # Of the language model; None: all
    weights:bool=True, # False: only what `estimate` reads
)->Path: # A checkpoint with random weights
    "Write tokenizer, settings and random weights. Nothing is downloaded."
    tiny_checkpoint(folder, [TEXT], family, **TINY if scale == 'tiny' else {})
    if scale == 'tiny': return folder
    known, official = read_config(folder), FAMILIES[family].official
    sizes = official | {k: known[k] for k in ('bos_token_id', 'eos_token_id')} | (dict(num_hidden_layers=layers) if layers else {})
    (folder/'config.json').write_text(json.dumps(sizes, indent=1))
    if FAMILIES[family].processor_file: (folder/'preprocessor_config.json').write_text(json.dumps(processor_settings(sizes, FAMILIES[family])))
    (folder/'model.safetensors').unlink()
    if weights: write_weights(folder, sizes, FAMILIES[family].left_out)
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

def machine_memory()->dict:
    "Bytes of the machine's memory: what is page-locked for the GPU, and what else the process has to itself."
    own = psutil.Process().memory_info()
    return dict(locked=torch.cuda.host_memory_stats().get('allocated_bytes.current', 0), pageable=own.rss - own.shared)

class Watch(TrainerCallback):
    "On a GPU the allocator's peaks, and the machine's memory behind a step; on a CPU the bytes of all tensors behind a step, and the size of the process."
    def __init__(self): self.found, self.start = dict(loading=self.peak(), steps=[]), None

    def peak(self)->int: return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else held()

    def on_step_begin(self, args, state, control, **kw):
        if torch.cuda.is_available(): torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        self.start = time.time()

    def on_step_end(self, args, state, control, **kw):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        seconds, reserved = time.time() - self.start, torch.cuda.max_memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        self.found['steps'].append(dict(seconds=seconds, peak=self.peak(), reserved=reserved) | (machine_memory() if torch.cuda.is_available() else {}))

    def on_train_end(self, args, state, control, **kw): (Path(args.output_dir)/f'watched-{args.process_index}.json').write_text(json.dumps(self.found))

def rank()->None:
    "What torchrun starts instead of `minicpmv_nb.training`."
    training.main(callbacks=(Watch,))


# --- a mode ----------------------------------------------------------------------------------------------------------

def configure(mode:str, base:Path, data:Path, out:Path, args)->config.Config:
    "The run of a mode: the guide's numbers, a few steps, nothing saved on the way."
    method, changes = MODES[mode]
    cfg = getattr(config, method)(str(base), str(data), **dict(deepspeed=None) | changes, bf16=True, fp16=False, use_cpu=not args.gpu, gpus=args.gpus, tune_vision=False, max_steps=args.steps,
        gradient_accumulation_steps=1, save_strategy='no', report_to='none', dataloader_num_workers=2 if args.gpu else 0, output_dir=str(out/mode))
    if args.scale != 'tiny' or not cfg.deepspeed: return cfg
    given = deepspeed_json(cfg)
    given['zero_optimization']['reduce_bucket_size'] = 2_000_000 # ours would be all of such a small model
    (out/f'{mode}.json').write_text(json.dumps(given))
    return replace(cfg, deepspeed=str(out/f'{mode}.json'), offload='none')

def too_much(
    e:Estimate, # Of the mode
    gpu_gb:float|None, # A GPU's memory; None: there is no GPU
    ram_gb:float, # The machine's memory
)->str|None:
    "Why a mode is not tried here."
    if gpu_gb and e.total + 1 > gpu_gb: return f'not run: needs {e.total+1:.0f} GB with CUDA\'s own on a GPU that has {gpu_gb:.0f}'
    if e.host*e.gpus > ram_gb: return f'not run: needs {e.host*e.gpus:.0f} GB of the machine\'s memory, of which {ram_gb:.0f} can be had'

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
    if why := too_much(e, args.gpu_gb, args.ram_gb): return row | dict(failed=why)
    run = launch(cfg, start=False)
    script = run.file('run.sh')
    script.write_text(script.read_text().replace('-m minicpmv_nb.training', shlex.quote(str(HERE/'gpu_modes.py'))))
    start = time.time()
    with open(run.file('log.txt'), 'w') as log: code = subprocess.run(['bash', str(script)], stdout=log, stderr=subprocess.STDOUT).returncode
    row |= dict(seconds=time.time() - start)
    if not cfg.use_lora: shutil.rmtree(run.final, ignore_errors=True) # as large as the model
    if code:
        print(run.log(60), flush=True) # not into the result: it is about this machine
        return row | dict(failed=run.cause().splitlines()[0])
    row |= summary([json.loads(f.read_text()) for f in sorted(run.folder.glob('watched-*.json'))])
    return row | beside(row, expected(e, zero_stage(cfg), args.gpu)) | dict(losses=[m['loss'] for m in read_metrics(run.folder) if 'loss' in m])

def summary(watched:list[dict])->dict:
    "The worst rank's memory; the median time of a step, without the first; on a GPU what each rank has of the machine's memory, page-locked and else."
    have = dict(loading=max(w['loading'] for w in watched)/1e9, training=max(s['peak'] for w in watched for s in w['steps'])/1e9)
    steps = [s['seconds'] for s in watched[0]['steps'][1:]]
    machine = {k: max(s[k] for w in watched for s in w['steps'])/1e9 for k in ('locked', 'pageable') if k in watched[0]['steps'][0]}
    return (dict(machine=machine) if machine else {}) | dict(seconds_per_step=statistics.median(steps), measured=have, reserved=max(s['reserved'] for w in watched for s in w['steps'])/1e9)

def beside(row:dict, want:dict)->dict:
    "What was expected, and how far it is from what was measured."
    return dict(expected=want, difference=want['training']/row['measured']['training']-1)

def estimates(found:dict, work:Path)->list[dict]:
    "The rows of a result, with what `estimate` says of them today. No GPU is needed."
    args = argparse.Namespace(**{k: found[k] for k in ('gpu', 'gpus', 'scale', 'steps', 'gpu_gb', 'ram_gb')})
    base, data = make_checkpoint(work/'base', found['family'], found['scale'], found['layers'], weights=False), make_data(work/'data', *DATA[found['scale']])
    rows = []
    for row in found['rows']:
        cfg = configure(row['mode'], base, data, work, args)
        e = estimate(cfg)
        again = beside(row, expected(e, zero_stage(cfg), args.gpu)) if 'measured' in row else {} if 'seconds' in row else dict(failed=too_much(e, args.gpu_gb, args.ram_gb) or 'not run: today it would be tried')
        rows.append(row | dict(estimate=e.together, host=e.host) | again)
    return rows


# --- the result ------------------------------------------------------------------------------------------------------

def table(rows:list[dict], gpu:bool)->str:
    "Markdown."
    what = ('GB at most', 'estimated') if gpu else ('MB of tensors behind a step', 'estimated')
    number = (lambda v: f'{v:.2f}') if gpu else (lambda v: f'{1000*v:.1f}')
    away = ('offloaded GB, page-locked and else', 'estimated') if gpu else ()
    lines = [('mode', 'processes', 'seconds a step', *what, 'difference', 'reserved GB' if gpu else 'process, GB', *away), ('---',)*(7+len(away))]
    for r in rows:
        if 'failed' in r: lines.append((r['mode'], str(r['gpus']), ' '.join(r['failed'].split())[:160].replace('|', ' '), *['']*(4+len(away)))); continue
        offloaded = (f'{r["machine"]["locked"]:.1f} + {r["machine"]["pageable"]:.1f}' if 'machine' in r else '', number(r['host'])) if r['host'] else ('', '')
        lines.append((r['mode'], str(r['gpus']), f'{r["seconds_per_step"]:.2f}', number(r['measured']['training']), number(r['expected']['training']), f'{r["difference"]:+.1%}', f'{r["reserved"]:.2f}', *offloaded[:len(away)]))
    return '\n'.join('| ' + ' | '.join(l) + ' |' for l in lines)

def described(args)->dict:
    "Where and how it was measured."
    return dict(device=torch.cuda.get_device_name() if args.gpu else 'CPU', gpu=args.gpu, gpus=args.gpus, family=args.family, scale=args.scale, layers=args.layers, steps=args.steps,
        gpu_gb=args.gpu_gb, ram_gb=args.ram_gb, versions=versions())

def versions()->dict[str,str]:
    "What it ran with."
    return dict(Python=platform.python_version()) | {p: version(p) for p in MEASURED_WITH}

def named(facts:dict)->str:
    "What a result is called."
    return (facts['device'].replace(' ', '-') if facts['gpu'] else 'cpu') + ('' if facts['scale'] == 'published' else '-tiny') + (f'-{facts["layers"]}-layers' if facts['layers'] else '')

def others(facts:dict, modes:list[str], folder:Path)->list[dict]:
    "Rows of the result that is there, of modes that are not measured now. Raises `SystemExit` when they were measured otherwise."
    file = folder/f'{named(facts)}.json'
    if not file.is_file(): return []
    there = json.loads(file.read_text())
    same = lambda f: {k: f[k] for k in ('device', 'gpus', 'family', 'scale', 'layers', 'steps')} | {p: f['versions'][p] for p in MEASURED_WITH}
    if differ := [k for k, v in same(facts).items() if v != same(there)[k]]: raise SystemExit(f'{file} differs in {", ".join(differ)}: move it, or leave --add out.')
    return [r for r in there['rows'] if r['mode'] not in modes]

def write(rows:list[dict], facts:dict, folder:Path)->Path:
    "A JSON file and a markdown table, named after the device."
    name = named(facts)
    said = '' if facts['gpu'] else 'Made without a GPU, on a checkpoint of toy size: it shows that the script and the estimate agree on what a process holds. It says nothing about the memory or speed of a GPU.\n\n'
    sizes = f'{facts["scale"]} sizes' + (f', {facts["layers"]} layers of the language model' if facts['layers'] else '')
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{name}.json').write_text(json.dumps(facts | dict(rows=rows), indent=1) + '\n')
    (folder/f'{name}.md').write_text(f'# {facts["device"]}, MiniCPM-V {facts["family"]}, {sizes}\n\n{said}{table(rows, facts["gpu"])}\n\n' + ', '.join(f'{k} {v}' for k, v in facts['versions'].items()) + '\n')
    return folder/f'{name}.md'

def arguments()->argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=f'Modes: {", ".join(MODES)}')
    parser.add_argument('--family', default='2.6', choices=FAMILIES)
    parser.add_argument('--modes', nargs='+', default=list(MODES), choices=MODES, metavar='MODE')
    parser.add_argument('--scale', default='published', choices=['published', 'tiny'], help='sizes of the checkpoint')
    parser.add_argument('--layers', type=int, help='of the language model, where all are too many')
    parser.add_argument('--gpus', type=int, default=1, help='processes; on a CPU as well')
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--ram', type=float, metavar='GB', help='memory of the machine, where less is shown until it is used')
    parser.add_argument('--work', type=Path, default=Path('benchmark_work'), help='for checkpoint and runs; removed at the start')
    parser.add_argument('--out', type=Path, default=HERE/'results')
    parser.add_argument('--add', action='store_true', help='keep the rows of other modes that are in the result already')
    parser.add_argument('--again', type=Path, metavar='RESULT', help='measure nothing: put what `estimate` says today into this result (.json)')
    return parser.parse_args()

def renew(args, work:Path)->Path:
    "The estimates of a result, as they are today."
    return write(estimates(args.result, work), {k: v for k, v in args.result.items() if k != 'rows'}, args.out)

def measure_all(args, work:Path)->Path:
    "Every mode; what is there survives the rest."
    facts = described(args)
    rows = others(facts, args.modes, args.out) if args.add else []
    base, data = make_checkpoint(work/'base', args.family, args.scale, args.layers), make_data(work/'data', *DATA[args.scale])
    for mode in args.modes:
        rows.append(measure(mode, base, data, work, args))
        print(table(rows[-1:], args.gpu).splitlines()[-1], flush=True)
        file = write(sorted(rows, key=lambda r: list(MODES).index(r['mode'])), facts, args.out)
    return file

def main()->None:
    args = arguments()
    args.gpu, work = torch.cuda.is_available(), args.work.absolute()
    args.gpu_gb = torch.cuda.get_device_properties(0).total_memory/1e9 if args.gpu else None
    args.ram_gb = args.ram or psutil.virtual_memory().available/1e9
    if args.again: args.result, args.out = json.loads(args.again.read_text()), args.again.absolute().parent
    shutil.rmtree(work, ignore_errors=True); work.mkdir(parents=True)
    file = (renew if args.again else measure_all)(args, work)
    print(file)
    sys.exit(any('failed' in r and 'seconds' in r for r in json.loads(file.with_suffix('.json').read_text())['rows']))


if __name__ == '__main__': rank() if 'RANK' in os.environ else main()
