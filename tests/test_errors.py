"In a notebook, an error of this package is one sentence; all others look as ever."
import os, subprocess, sys, time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from minicpmv_nb import lora
from minicpmv_nb.command import ours, sentence
from minicpmv_nb.errors import HINT, interactive_shell, short_errors
from minicpmv_nb.samples import read_entries

MISTAKE = 'lora("model", "train.json", lora_rank=8)'
SAID = "There is no setting 'lora_rank'. Did you mean lora_r?"
FOREIGN = ['1/0', '{}["a"]', 'open("nowhere.txt")', 'x = = 3', 'def f():\nreturn', 'int("x")', 'import nothing_of_that_name', 'lora()', 'raise KeyboardInterrupt', 'from minicpmv_nb.config import recommended; recommended(None)']


def caught(work, *args):
    try: work(*args)
    except Exception as e: return e

def run(cells, folder, **how):
    "What each cell prints, and the text of its error."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, kernel_name='python3', extra_arguments=['--log-level=40'], resources=dict(metadata=dict(path=str(folder))), **how).execute()
    return [''.join('\n'.join(o.traceback) if o.output_type == 'error' else o.get('text', '') for o in c.outputs) for c in nb.cells]


# --- whose error -----------------------------------------------------------------------------------------------------

def test_raised_on_purpose():
    assert ours(caught(lora, 'm')) is False  # Python says that an argument is missing
    assert ours(caught(read_entries, 'nowhere.json'))

def test_raised_from_the_error_of_a_library(tmp_path):
    (tmp_path/'data.json').write_text('{')
    e = caught(read_entries, tmp_path/'data.json')
    assert ours(e) and not ours(e.__cause__) and 'is not valid JSON' in sentence(e)

def test_a_bug_is_not_a_sentence():
    from minicpmv_nb.config import recommended
    e = caught(recommended, None)
    assert not ours(e) and sentence(e) is None

def test_never_raised(): assert not ours(ValueError('x'))

def test_raised_elsewhere_by_a_function_given_to_us():
    def wrong(*_): raise ValueError('somebody else')
    assert not ours(caught(wrong)) and sentence(caught(wrong)) is None

def test_no_shell_here():
    assert interactive_shell() is None and short_errors() is None


# --- a kernel --------------------------------------------------------------------------------------------------------

def test_in_a_kernel(tmp_path):
    start, short, tb, off, long, on = run(['from minicpmv_nb import lora, short_errors', MISTAKE, '%tb', 'short_errors(False)', MISTAKE, f'short_errors()\n{MISTAKE}'], tmp_path, allow_errors=True)
    assert len(short.splitlines()) == 2 and SAID in short and 'TypeError' in short and HINT in short
    assert 'make_config' in tb and SAID in tb and HINT not in tb
    assert 'make_config' in long and HINT not in long
    assert on == short

def test_the_cell_has_failed(tmp_path):
    with pytest.raises(CellExecutionError) as e: run(['from minicpmv_nb import lora', MISTAKE, 'open("never", "w")'], tmp_path)
    assert e.value.ename == 'TypeError' and e.value.evalue == SAID and not (tmp_path/'never').exists()

def test_errors_of_others_look_as_ever(tmp_path):
    on, off = (run([f'from minicpmv_nb import lora, short_errors\n{line}', *FOREIGN], tmp_path, allow_errors=True) for line in ('', 'short_errors(False)'))
    assert on == off and all(on[1:]) and HINT not in ''.join(on)

def test_a_handler_that_was_there_stays(tmp_path):
    cells = ['get_ipython().set_custom_exc((TypeError,), lambda shell, kind, error, tb, tb_offset=None: print("mine"))', 'from minicpmv_nb import lora, short_errors', MISTAKE, 'short_errors(False)', MISTAKE]
    said = run(cells, tmp_path, allow_errors=True)
    assert said[2] == said[4] == 'mine\n'


# --- a terminal, scripts, the tests of nbdev -------------------------------------------------------------------------

def test_in_a_terminal(tmp_path):
    lines = f'from minicpmv_nb import lora\n{MISTAKE}\nprint("between")\n%tb\nexit()\n'
    done = subprocess.run([sys.executable, '-m', 'IPython', '--simple-prompt', '--colors=NoColor', '--no-banner'], input=lines, cwd=tmp_path, env=os.environ | dict(IPYTHONDIR=str(tmp_path)), capture_output=True, text=True)
    before, after = done.stdout.split('between')
    assert SAID in before and HINT in before and 'make_config' not in before
    assert SAID in after and HINT not in after and 'make_config' in after

def test_in_a_script(tmp_path):
    code = f'import IPython\nfrom minicpmv_nb import lora\n{MISTAKE}'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and 'make_config' in done.stderr and HINT not in done.stderr

def test_in_the_shell_of_nbdev(tmp_path):
    code = f'from execnb.shell import CaptureShell\ns = CaptureShell()\ns.run("from minicpmv_nb import lora")\nprint(s.custom_exceptions)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '()'


# --- how light the import is -----------------------------------------------------------------------------------------

HEAVY = ('torch', 'transformers', 'IPython', 'ipywidgets', 'matplotlib', 'deepspeed', 'peft', 'PIL')

def test_import_is_quick_and_light(tmp_path):
    code = f'import sys, time\nstart = time.perf_counter()\nimport minicpmv_nb\nprint(time.perf_counter()-start, *[m for m in {HEAVY} if m in sys.modules])'
    said = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    assert min(float(seconds) for seconds, *_ in said) <= .3 and said[0][1:] == []

def test_help_is_quick_and_light(tmp_path):
    def seconds():
        start = time.perf_counter()
        subprocess.run([sys.executable, '-m', 'minicpmv_nb', '--help'], capture_output=True, check=True)
        return time.perf_counter()-start
    assert min(seconds() for _ in range(5)) < .5
    done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'minicpmv_nb', 'train', '--help'], capture_output=True, text=True, check=True)
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'minicpmv_nb.command' in loaded and not loaded & set(HEAVY)
