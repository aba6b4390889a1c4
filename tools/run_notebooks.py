"Execute notebooks in place, as Jupyter would, and keep their outputs. `make notebooks` cleans them afterwards."
import argparse, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
WIDGET = 'application/vnd.jupyter.widget-view+json'
BAR = re.compile(r'\d+%\|')  # what tqdm's bar in a notebook is as text


def notebooks()->list[Path]:
    "All notebooks in reading order, without work folders."
    found = (ROOT/'nbs').rglob('*.ipynb')
    return sorted(p for p in found if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))

def skipped(cell, flags:list[str])->bool:
    "Whether the cell says not to run it here."
    names = '|'.join(['eval:[ \t]*false', *flags])
    return cell.cell_type == 'code' and re.search(rf'^[ \t]*#\|[ \t]*({names})[ \t:]*$', cell.source, re.M) is not None

def never_run(nb)->bool:
    "Whether the notebook's front matter says `skip_exec: true`."
    return any(c.cell_type == 'raw' and re.search(r'^skip_exec:\s*true', c.source, re.M) for c in nb.cells)

def is_bar(output)->bool:
    "Whether an output is a progress bar: a slow machine shows them, a fast one does not."
    return WIDGET in output.get('data', {}) and BAR.search(output.data.get('text/plain', '')) is not None

def drop_noise(nb)->None:
    "Warnings and progress bars do not belong on the page; nor does the state of widgets that no output shows."
    outputs = []
    for cell in [c for c in nb.cells if c.cell_type == 'code']:
        cell.outputs = [o for o in cell.outputs if not (o.output_type == 'stream' and o.name == 'stderr' or is_bar(o))]
        outputs += cell.outputs
    if not any(WIDGET in o.get('data', {}) for o in outputs): nb.metadata.pop('widgets', None)

def run(path:Path, flags:list[str], timeout:int)->None:
    "Execute one notebook; the file is written only when every cell has run."
    nb = nbformat.read(path, 4)
    if never_run(nb): return
    for cell in [c for c in nb.cells if skipped(c, flags)]: cell.metadata['tags'] = ['skip-execution']
    NotebookClient(nb, timeout=timeout, kernel_name='python3', store_widget_state=True,
                   extra_arguments=['--log-level=40'], resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells: cell.metadata.pop('tags', None)
    drop_noise(nb)
    nbformat.write(nb, path)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('paths', nargs='*', type=Path, help='notebooks; all when none is named')
    parser.add_argument('--flags', default='', help="marked cells to run after all, e.g. 'slow gpu'")
    parser.add_argument('--timeout', type=int, default=600, help='seconds for one cell')
    args = parser.parse_args()
    flags = [f for f in ('slow', 'gpu') if f not in args.flags.split()]
    for path in args.paths or notebooks():
        start = time.time()
        try: run(path.resolve(), flags, args.timeout)
        except CellExecutionError as e: sys.exit(f'{path} stopped:\n{e}')
        print(f'{path.resolve().relative_to(ROOT)} {time.time() - start:.1f} s', flush=True)


if __name__ == '__main__': main()
