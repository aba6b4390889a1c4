"""Time and memory of what follows training: merging, quantising, answering. README.md tells how to run it."""
import argparse, json, multiprocessing, resource, shutil, sys, time
from pathlib import Path

import torch
from PIL import Image

from minicpmv_nb.chat import Chat
from minicpmv_nb.merging import merge
from minicpmv_nb.quantizing import quantize
from gpu_modes import versions

HERE = Path(__file__).resolve().parent
TOKENS = 64 # of each answer


# A step gets the base, an adapter of it and a folder to write to, and gives what it found beside time and memory.

def merging(base:Path, adapter:Path, work:Path)->dict:
    "Write base and adapter as one checkpoint."
    merge(base, adapter, work/'merged', check=False) # the check loads the model, which is measured below
    return {}

def quantizing(base:Path, adapter:Path, work:Path)->dict:
    "Write the base with four-bit layers."
    quantize(base, work/'int4')
    return {}

def answering(folder:Path)->dict:
    "Load a checkpoint and answer about a picture in ten pieces, twice; the second answer counts."
    start = time.time()
    chat, times = Chat.load(folder), []
    loaded = time.time() - start
    for _ in range(2):
        times = [time.time()]
        chat.chat(Image.new('RGB', (1344, 1344), 'white'), 'What is shown here?', watch=lambda text: times.append(time.time()), max_new_tokens=TOKENS)
    return dict(loading=loaded, first_token=times[1] - times[0], tokens_per_second=(len(times) - 2)/(times[-1] - times[1]) if len(times) > 2 else None)

STEPS = dict(merge=merging, quantize=quantizing, chat=lambda base, adapter, work: answering(base), chat_int4=lambda base, adapter, work: answering(work/'int4'))

def process(step:str, base:Path, adapter:Path, work:Path, send)->None:
    "What a process of its own does and finds."
    start = time.time()
    found = STEPS[step](base, adapter, work)
    gpu = torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else None
    send.send(dict(step=step, seconds=time.time() - start, gpu_gb=gpu, process_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9) | found)

def run(step:str, *args)->dict:
    "One step; its error where it fails."
    spawn = multiprocessing.get_context('spawn')
    get, send = spawn.Pipe(duplex=False)
    worker = spawn.Process(target=process, args=(step, *args, send))
    worker.start(); send.close()
    try: found = get.recv()
    except EOFError: found = None # it ended without a word here; its error is in the terminal
    worker.join()
    return found or dict(step=step, failed=f'exit code {worker.exitcode}')

def table(rows:list[dict])->str:
    "Markdown."
    number = lambda v: '' if v is None else f'{v:.2f}'
    keys = dict(seconds='seconds in all', gpu_gb='GPU, GB at most', process_gb='process with files it maps, GB at most', loading='seconds to load', first_token='seconds to the first token', tokens_per_second='tokens a second')
    lines = [('', *keys.values()), ('---',)*(len(keys)+1)] + [(r['step'].replace('_', ', '), *(number(r.get(k)) for k in keys)) if 'failed' not in r else (r['step'], r['failed'], *['']*(len(keys)-1)) for r in rows]
    return '\n'.join('| ' + ' | '.join(l) + ' |' for l in lines)

def write(rows:list[dict], base:Path, folder:Path)->None:
    "A JSON file and a markdown table, named after the device."
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    size = sum(f.stat().st_size for f in base.glob('*.safetensors'))/1e9
    folder.mkdir(parents=True, exist_ok=True)
    name = folder/f'after-training-{device.replace(" ", "-")}'
    name.with_suffix('.json').write_text(json.dumps(dict(device=device, checkpoint_gb=size, versions=versions(), rows=rows), indent=1) + '\n')
    name.with_suffix('.md').write_text(f'# {device}: after training, a checkpoint of {size:.2f} GB\n\n{table(rows)}\n\n' + ', '.join(f'{k} {v}' for k, v in versions().items()) + '\n')

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('base', type=Path, help='a bf16 checkpoint, for example benchmark_work/base of gpu_modes.py')
    parser.add_argument('adapter', type=Path, help='for example benchmark_work/lora/final')
    parser.add_argument('--work', type=Path, default=Path('benchmark_after'), help='for what is written; removed at the start')
    parser.add_argument('--out', type=Path, default=HERE/'results')
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True); args.work.mkdir(parents=True)
    rows = []
    for step in STEPS:
        rows.append(run(step, args.base, args.adapter, args.work))
        print(json.dumps(rows[-1]), flush=True)
        write(rows, args.base, args.out)
    sys.exit(any('failed' in r for r in rows))


if __name__ == '__main__': main()
