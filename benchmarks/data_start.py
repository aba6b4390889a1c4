"""What a data file costs before the first step: at the launch, and on each rank. README.md tells how to run it."""
import argparse, json, random, shutil, time, tracemalloc
from dataclasses import replace
from pathlib import Path

from PIL import Image

from minicpmv_nb.batches import SampleDataset, load_data
from minicpmv_nb.model import tiny_checkpoint
from minicpmv_nb.prompts import Processor
from minicpmv_nb.samples import check

HERE = Path(__file__).resolve().parent
WORDS = [a + b for a in ('bar', 'con', 'den', 'fil', 'gor', 'mer', 'pal', 'sun', 'tin', 'vor') for b in ('ata', 'ent', 'ing', 'omb', 'ull', 'eri', 'ost', 'ami')]
SIZES = dict(query_num=64, scale=448) # of 2.6


def draw(folder:Path, count:int, pictures:int=500)->Path:
    "A data file: an answer of 50 to 250 words about a picture of 300 to 1400 pixels a side."
    rng = random.Random(0)
    for i in range(pictures): Image.new('RGB', (rng.randint(300, 1400), rng.randint(300, 1400)), 'white').save(folder/f'{i}.jpg')
    talk = lambda: [dict(role='user', content='<image>\nWhat is shown?'), dict(role='assistant', content=' '.join(rng.choices(WORDS, k=rng.randint(50, 250))))]
    (folder/'train.json').write_text(json.dumps([dict(id=str(i), image=f'{i % pictures}.jpg', conversations=talk()) for i in range(count)]))
    return folder/'train.json'

def timed(what)->tuple[float,object]:
    start = time.perf_counter()
    found = what()
    return time.perf_counter() - start, found

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--samples', type=int, default=20_000)
    parser.add_argument('--work', type=Path, default=Path('benchmark_data'), help='for pictures and file; removed at the start')
    parser.add_argument('--out', type=Path, default=HERE/'results')
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True); args.work.mkdir(parents=True)
    file = draw(args.work, args.samples)
    processor = Processor.from_folder(tiny_checkpoint(args.work/'tiny', [' '.join(WORDS)]*3, '2.6'))
    processor.sizes = replace(processor.sizes, **SIZES)
    load = lambda **how: load_data(file, processor, 8192, **how)
    checking, _ = timed(lambda: check(file))
    launch, (samples, report) = timed(load)
    rank, _ = timed(lambda: load(known=report))
    data = SampleDataset(samples, processor)
    one, _ = timed(lambda: [data[i] for i in range(200)])
    encoding, _ = timed(lambda: [data.encoded(i) for i in range(2000)])
    tracemalloc.start()
    kept = [data.encoded(i) for i in range(500)]
    tokens = tracemalloc.get_traced_memory()[0]/len(kept)
    rows = [('checking entries and headers of pictures', checking, 1e3*checking/args.samples), ('`launch`: checking and measuring', launch, 1e3*launch/args.samples),
        ('each rank, by the report of `launch`', rank, 1e3*rank/args.samples), ('tokenising, in a worker of the data loader', None, encoding/2), ('a sample as tensors, pictures included, in a worker', None, 1e3*one/200)]
    lines = [f'# Before the first step: {args.samples:,} samples, on a CPU', '', f'Answers of 50 to 250 words, pictures of 300 to 1400 pixels a side; {report.tokens["mean"]} tokens on average.', '',
        '| | seconds | milliseconds a sample |', '|---|---:|---:|', *(f'| {what} | {"" if seconds is None else f"{seconds:.1f}"} | {each:.2f} |' for what, seconds, each in rows), '',
        f'The tokens of a sample, which no process keeps, would take {tokens/1e3:.0f} kB.', '']
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out/'cpu-data-start.md').write_text('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__': main()
