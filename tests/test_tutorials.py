"Every page of nbs/tutorials runs from top to bottom, and what it says about the real checkpoint is a call that would work."
import ast, re
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import minicpmv_nb

NBS = Path(__file__).resolve().parent.parent/'nbs'
PAGES = sorted((NBS/'tutorials').glob('*.ipynb'))
QUICK = '01_data.ipynb' # the quickest; the others train
NOT_RUN = re.compile(r'^[ \t]*#\|[ \t]*eval:[ \t]*false[ \t]*$', re.M)

def code(page): return [c for c in nbformat.read(page, 4).cells if c.cell_type == 'code']
def not_run(page): return [TransformerManager().transform_cell(c.source) for c in code(page) if NOT_RUN.search(c.source)]
def name(path): return path.relative_to(NBS).as_posix()

# tools/check.py finds the pages by these ids.
@pytest.mark.parametrize('page', [pytest.param(p, id=name(p), marks=[] if p.name == QUICK else pytest.mark.slow) for p in PAGES])
def test_page_runs(page, tmp_path):
    nb = nbformat.read(page, 4)
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs, cell.execution_count = [], None
        if NOT_RUN.search(cell.source): cell.metadata['tags'] = ['skip-execution']
    place = tmp_path/'nbs'/'tutorials'
    place.mkdir(parents=True)
    (tmp_path/'benchmarks').symlink_to(NBS.parent/'benchmarks')
    NotebookClient(nb, timeout=900, kernel_name='python3', resources=dict(metadata=dict(path=str(place)))).execute()
    ran = [c for c in nb.cells if c.cell_type == 'code' and 'tags' not in c.metadata]
    assert all(c.execution_count for c in ran)
    assert not [o for c in ran for o in c.outputs if o.output_type == 'error']

@pytest.mark.parametrize('page', PAGES, ids=name)
def test_page_shows_its_outputs(page):
    outputs = [o for c in code(page) for o in c.outputs]
    assert outputs, 'make notebooks'
    text = '\n'.join(str(o.get('text', '')) + str(o.get('data', {})) for o in outputs)
    assert not re.findall(r'/tmp/\w+|/root/\w+|/home/\w+|\d+%\|', text)

@pytest.mark.parametrize('page', PAGES, ids=name)
def test_cells_that_are_not_run_parse(page):
    for source in not_run(page): ast.parse(source)

def stand_in(name, real):
    "A function or class that takes the same arguments and does nothing."
    double = create_autospec(real)
    if name == 'launch':
        run = double.return_value = create_autospec(minicpmv_nb.Run, instance=True)
        double.side_effect = lambda cfg, gpus=None, name=None, start=True, join_timeout=600, **changes: replace(cfg, gpus=gpus, **changes) and run
    if name == 'Chat':
        double.load.return_value = double.return_value
        double.return_value.chat.return_value = '', None
    return double

def config_made_here(function): return function.__module__ == 'minicpmv_nb.config'

@pytest.mark.parametrize('page', [p for p in PAGES if not_run(p)], ids=name)
def test_calls_for_the_real_checkpoint_would_work(page, monkeypatch, tmp_path):
    "Configurations are made for real; what would download, train or show something is replaced."
    sources = not_run(page)
    wanted = {a.name for s in sources for node in ast.walk(ast.parse(s)) if isinstance(node, ast.ImportFrom) and node.module == 'minicpmv_nb' for a in node.names}
    reals = {n: getattr(minicpmv_nb, n) for n in wanted}
    for n, real in reals.items():
        if not config_made_here(real): monkeypatch.setattr(minicpmv_nb, n, stand_in(n, real))
    monkeypatch.chdir(tmp_path)
    for source in sources: exec(compile(source, str(page), 'exec'), {})
