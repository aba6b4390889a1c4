"The steps of `make test`; each can be run alone. None of them changes a file that git knows."
import argparse, os, re, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE, PROC = ROOT/'nbs', ROOT/'minicpmv_nb', ROOT/'_proc'
REPORT, ALLOWED = ROOT/'.pytest-report.xml', ROOT/'tests'/'allowed_skips.txt'
BY_HAND = ('__init__.py', '__main__.py')  # the modules that no notebook makes
TIME_LIMIT = 1800  # seconds for all notebooks: nbdev_test has no limit of its own
LINK = re.compile(r'\]\(([^)\s]+)\)')


def fail(what:str, mend:str)->None: sys.exit(f'FAILED: {what}\nTo mend it: {mend}')

def notebooks()->list[Path]:
    "Every notebook that nbdev sees, relative to nbs."
    found = [p.relative_to(NBS) for p in NBS.rglob('*.ipynb')]
    return sorted(p for p in found if not any(part[0] in '._' for part in p.parts))

def run(*args, **kwargs): return subprocess.run([sys.executable, *args], cwd=kwargs.pop('cwd', ROOT), **kwargs)


# --- notebooks and package -------------------------------------------------------------------------------------------

def mirror(folder:Path)->None:
    "Copy what nbdev reads, so that a check can run its commands without touching the working tree."
    shutil.copy(ROOT/'settings.ini', folder)
    if (ROOT/'_quarto.yml').exists(): shutil.copy(ROOT/'_quarto.yml', folder)
    shutil.copytree(NBS, folder/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.*'))
    for own in [p for name in BY_HAND for p in PACKAGE.rglob(name)]:
        copy = folder/own.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(own, copy)

def changed(folder:Path, names:list[Path])->list[str]:
    "Of `names`, those that are not the same here and in `folder`."
    def read(path): return path.read_bytes() if path.exists() else None
    return sorted({str(n) for n in names if read(ROOT/n) != read(folder/n)})

def after(code:str, names)->list[str]:
    "What running `code` beside a copy of the project would change."
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp).resolve()
        mirror(folder)
        done = run('-c', code, cwd=folder, capture_output=True, text=True)
        if done.returncode: fail(f'nbdev stopped:\n{done.stdout}{done.stderr}', 'read the traceback above')
        return changed(folder, names(folder))

def clean()->None:
    "notebooks are clean"
    def names(folder): return [Path('nbs')/p for p in notebooks()]
    if dirty := after('from nbdev.clean import nbdev_clean; nbdev_clean()', names):
        fail('not as nbdev_clean leaves them: ' + ', '.join(dirty), 'make export, then commit the notebooks')

def export()->None:
    "the package is what the notebooks export"
    def modules(folder): return [p.relative_to(folder) for p in (folder/'minicpmv_nb').rglob('*.py')]
    def names(folder): return modules(ROOT) + modules(folder) + [Path('nbs/nbdev.yml')]
    code = 'from nbdev.doclinks import nbdev_export; from nbdev.quarto import refresh_quarto_yml; nbdev_export(); refresh_quarto_yml()'
    if differ := after(code, names):
        fail('not what the notebooks export: ' + ', '.join(differ),
             'change the notebook, not the module; then make export. Delete a module that has no notebook any more.')


# --- tests -----------------------------------------------------------------------------------------------------------

def run_limited(args:list[str], seconds:int)->tuple[int, str]:
    "Run and show a command; end it and its workers when the time is up."
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as p:
        old = signal.signal(signal.SIGALRM, lambda *_: os.killpg(p.pid, signal.SIGKILL))
        signal.alarm(seconds)
        lines = []
        for line in p.stdout: print(line, end='', flush=True); lines.append(line)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return p.returncode, ''.join(lines)

def nbtest()->None:
    "the cells of the notebooks run"
    code = 'from nbdev.test import nbdev_test; nbdev_test(n_workers=2, timing=True)'
    status, said = run_limited([sys.executable, '-c', code], TIME_LIMIT)
    if status: fail(f'nbdev_test (exit {status}, limit {TIME_LIMIT} s)', 'make export if a module is out of date, else see the cell above')
    # nbdev_test exits 0 when it found nothing to test, too.
    untested = [p for p in notebooks() if f'{p.name}: ' not in said]
    if missed := sorted({str(p) for p in untested} - run_by_pytest()):
        fail('not tested: ' + ', '.join(missed), 'remove .notest from its folder, or let tests/test_tutorials.py run the page')

def run_by_pytest()->set[str]:
    "The pages in folders with .notest that tests/test_tutorials.py runs, relative to nbs: they train, which nbdev_test would pay for at every `make test`."
    found = run('-m', 'pytest', '-q', '--collect-only', '-m', '', 'tests/test_tutorials.py', capture_output=True, text=True)
    pages = re.findall(r'::test_page_runs\[(.+\.ipynb)\]', found.stdout)
    return {page for page in pages if (NBS/page).with_name('.notest').exists()}

def pytest()->None:
    "tests/ pass"
    REPORT.unlink(missing_ok=True)
    if run('-m', 'pytest', '-q', 'tests', f'--junitxml={REPORT}').returncode: fail('pytest', 'see the summary above')


# --- documentation ---------------------------------------------------------------------------------------------------

def docs()->None:
    "the pages of the site can be prepared, and their links lead somewhere"
    code = 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=2, force=True)'
    done = run('-c', code, capture_output=True, text=True)
    if done.returncode: fail(f'nbdev.serve.proc_nbs:\n{done.stdout}{done.stderr}', 'an import or exported cell does not run by itself')
    if missing := [str(p) for p in notebooks() if not (PROC/p).exists()]:
        fail('no page for ' + ', '.join(missing), 'nbdev skips a checkout below a folder whose name starts with a dot: move it')
    if broken := [f'{page}: {target}' for page in notebooks() for target in links(page) if not leads_somewhere(page, target)]:
        fail('broken links\n  ' + '\n  '.join(broken), 'link a notebook by its file name, as seen from the page')

def links(page:Path)->list[str]:
    "Targets of the markdown links of a prepared page, other than web addresses and places on the same page."
    import nbformat
    cells = nbformat.reader.reads((PROC/page).read_text(encoding='utf-8')).cells
    texts = [c.source for c in cells if c.cell_type == 'markdown']
    texts += [o.data.get('text/markdown', '') for c in cells for o in c.get('outputs', []) if 'data' in o]
    texts = [re.sub(r'```.*?```|`[^`\n]*`', 'code', ''.join(t), flags=re.S) for t in texts]
    return [t for text in texts for t in LINK.findall(text) if not re.match(r'\w+:|#', t)]

def leads_somewhere(page:Path, target:str)->bool:
    "Whether a page or file of the site answers to this link."
    from nbdev.doclinks import _nbpath2html
    pages = {PROC/_nbpath2html(p) for p in notebooks()}
    path = Path(os.path.normpath(PROC/page.parent/target.partition('#')[0]))
    return path in pages or path.is_file()

def readme()->None:
    "README.md is what nbs/index.ipynb makes"
    if run('tools/readme.py', '--check').returncode: fail('README.md', 'make readme')


# --- skipped tests ---------------------------------------------------------------------------------------------------

def node_id(case:ElementTree.Element)->str:
    "The id that pytest's own command line takes; a module skipped as a whole has no class name."
    file, owner, name = case.get('file'), case.get('classname'), case.get('name')
    module = file.removesuffix('.py').replace('/', '.')
    classes = owner.removeprefix(module).split('.') if owner else []
    return '::'.join([file, *filter(None, classes), *([name] if owner else [])])

def reason(skip:ElementTree.Element)->str:
    "Why a test was skipped; for a whole module, pytest keeps that in the text."
    return skip.text if skip.get('message') == 'collection skipped' else skip.get('message')

def skips()->None:
    "only tests that need a GPU were skipped"
    if not REPORT.exists(): fail('pytest has not run', 'mend the step that failed before it')
    allowed = {line.partition('#')[0].strip() for line in ALLOWED.read_text().splitlines()}
    cases = list(ElementTree.parse(REPORT).iter('testcase'))
    skipped = {node_id(c): reason(c.find('skipped')) for c in cases if c.find('skipped') is not None}
    failed = sum(c.find('failure') is not None or c.find('error') is not None for c in cases)
    for node, why in skipped.items(): print(f"{'skipped' if node in allowed else 'SKIPPED, NOT ALLOWED'}: {node}: {why}")
    unknown = set(skipped) - allowed
    if unknown: print(f'FAILED: {len(unknown)} skipped tests are not in {ALLOWED.relative_to(ROOT)}, which is for tests that need a GPU.')
    print(f'{len(cases) - failed - len(skipped)} passed, {failed} failed, {len(skipped)} skipped', flush=True)
    sys.exit(1 if unknown or failed else 0)


STEPS = {f.__name__: f for f in (clean, export, nbtest, pytest, docs, readme)}

def all_steps()->None:
    "every step of `make test`, in order"
    for i, step in enumerate(STEPS.values(), 1):
        print(f'[{i}/{len(STEPS)}] {step.__doc__}', flush=True)
        start = time.time()
        step()
        print(f'      {time.time() - start:.0f} s', flush=True)

def main()->None:
    commands = {**STEPS, 'skips': skips, 'all': all_steps}
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest='command', required=True)
    for name, command in commands.items(): sub.add_parser(name, help=command.__doc__)
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # two tests run side by side, and a second thread brings tiny models nothing
    os.chdir(ROOT)
    commands[parser.parse_args().command]()


if __name__ == '__main__': main()
