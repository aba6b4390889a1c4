"What must hold for the repository as a whole: notebooks, modules, versions, the installed package."
import json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import COLLECTED
from support import draw_data

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'minicpmv_nb'
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))


def code_cells(path): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']

def exported_module(path):
    "The module that a notebook makes, as a path inside the package; None where it makes none."
    found = [re.match(r'#\|\s*default_exp\s+(\S+)', ''.join(c['source'])) for c in code_cells(path)]
    names = [m[1] for m in found if m]
    return names[0].replace('.', '/') + '.py' if names else None

EXPORTED = [p for p in NOTEBOOKS if exported_module(p)]

def name(path): return path.relative_to(ROOT/'nbs').as_posix()

def test_each_module_has_one_notebook():
    modules = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob('*.py')} - {'_modidx.py'}
    made = [exported_module(p) for p in EXPORTED]
    assert sorted(made) == sorted(m for m in modules if not m.endswith(('__init__.py', '__main__.py')))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_no_error_is_saved(path):
    errors = [o['evalue'] for c in code_cells(path) for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors

@pytest.mark.parametrize('path', EXPORTED, ids=name)
def test_exported_notebook_shows_its_outputs(path):
    assert any(c['outputs'] for c in code_cells(path)), 'make notebooks'

def test_every_page_is_in_the_sidebar():
    sidebar = re.findall(r'^ +- (\S+\.ipynb)$', (ROOT/'_quarto.yml').read_text(), re.M)
    assert sorted(sidebar) == sorted(map(name, NOTEBOOKS))

def test_support_matrix_names_tests_that_exist(request):
    page = json.loads((ROOT/'nbs'/'reference'/'support.ipynb').read_text(encoding='utf-8'))
    table = ''.join(''.join(o['data']['text/html']) for c in page['cells'] for o in c.get('outputs', []) if 'text/html' in o.get('data', {}))
    rows = [re.findall(r'<code[^>]*>(.*?)</code>', row) for row in re.findall(r'<tr>.*?</tr>', table)]
    named = {f'tests/{test}[{case}]' for test, *cases in filter(None, rows) for case in cases}
    collected = set(request.config.stash[COLLECTED])
    files = {test.partition('::')[0] for test in collected} # all, unless some were chosen on the command line
    assert len(named) > 60 and not {test for test in named if test.partition('::')[0] in files} - collected

def pinned():
    "Version by package, from constraints.txt."
    lines = [line.partition('#')[0].strip() for line in (ROOT/'constraints.txt').read_text().splitlines()]
    return {canonicalize_name(line.split('==')[0]): line.split('==')[1] for line in lines if line}

def asked():
    "Every requirement of settings.ini, extras included."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    return [Requirement(r) for key in cfg if key.endswith('requirements') for r in cfg[key].split()]

@pytest.mark.parametrize('requirement', asked(), ids=str)
def test_tested_version_is_one_we_ask_for(requirement):
    assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)])

def test_import_is_light():
    code = 'import sys, minicpmv_nb; print([m for m in ("torch", "transformers", "deepspeed") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'

def build_wheel(folder):
    "A wheel made through a source archive, so that a file missing from MANIFEST.in is missed here."
    source = copytree(ROOT, folder/'source', symlinks=True,
                      ignore=ignore_patterns('.*', '_docs', '_proc', '__pycache__', 'runs', 'demo_run', 'build', 'dist', '*.egg-info'))
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, source], check=True)
    return next(folder.glob('*.whl'))

def clean_environment(folder):
    "A new environment that sees the dependencies of this one, but not this checkout."
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    def site(python):
        ask = [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    python = folder/'bin'/'python'
    # A folder named in a .pth file is searched, but its own .pth files, such as an editable install's, are not read.
    Path(site(python), 'dependencies.pth').write_text(site(sys.executable) + '\n')
    return python

@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(tmp_path):
    wheel, python = build_wheel(tmp_path), clean_environment(tmp_path/'env')
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps', wheel], check=True)
    def run(*args): return subprocess.run([python, *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(run('-c', 'import minicpmv_nb; print(minicpmv_nb.__file__)').strip()).is_relative_to(tmp_path)
    assert 'usage' in run('-m', 'minicpmv_nb.training', '--help')
    command = subprocess.run([python.parent/'minicpmv_nb', '--help'], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert command == run('-m', 'minicpmv_nb', '--help') and 'usage: minicpmv_nb COMMAND' in command
    data = draw_data(tmp_path, 8)
    code = f"""from minicpmv_nb import launch, lora, merge, tiny_checkpoint
base = tiny_checkpoint('tiny', ['Which colour is the dot?'])
run = launch(lora(str(base), {str(data)!r}, use_cpu=True, gpus=2, deepspeed='ds_config_zero2.json', max_steps=2, gradient_accumulation_steps=1, dataloader_num_workers=0)).wait()
print(merge(base, run.final, 'merged'))"""
    assert run('-c', code).splitlines()[-1] == 'merged' and (tmp_path/'merged'/'model.safetensors').is_file()
