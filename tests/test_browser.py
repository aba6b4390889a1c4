"The whole way by clicking, in a real JupyterLab and a real browser. `make shots` keeps what it photographs for the pages."
import json, os, random, re
from pathlib import Path

import pytest

from browser import browser, lab, open_notebook, restart_and_run_all, run_all, write_notebook
from minicpmv_nb.config import lora, read_metrics, save_config
from minicpmv_nb.demo import draw_shape
from minicpmv_nb.jobs import Run
from minicpmv_nb.model import tiny_checkpoint

QUESTION = 'Which shape is it?'
KINDS = [('ring', 'red'), ('bar', 'blue'), ('cross', 'green'), ('circle', 'black'), ('ring', 'orange')]
# Long enough to be stopped on the way.
SETTINGS = dict(use_cpu=True, gpus=1, fp16=False, deepspeed=None, tune_vision=False, max_steps=500, logging_steps=5, eval_steps=50, save_steps=1000, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_slice_nums=2,
    gradient_checkpointing=False, dataloader_num_workers=0, learning_rate=2e-3, report_to='none')


def answer(kind, colour): return f'It is a {colour} {kind}.'

@pytest.fixture
def folder(tmp_path):
    "Pictures, a checkpoint, settings that suit it, and a notebook of three cells."
    (tmp_path/'pictures').mkdir()
    for i, (kind, colour) in enumerate(KINDS): draw_shape(kind, colour, random.Random(i), large=i == 1).save(tmp_path/'pictures'/f'{i}-{kind}.png')
    tiny_checkpoint(tmp_path/'base', [QUESTION, *(answer(*k) for k in KINDS)], '2.6')
    save_config(lora('', '', **SETTINGS), tmp_path/'small.json')
    write_notebook(tmp_path/'bench.ipynb', 'from minicpmv_nb import Workbench', "bench = Workbench(model='base')\nbench", "print('the kernel is', 'free')")
    return tmp_path

class Clicks:
    "What a person does at the workbench."
    def __init__(self, page, shots):
        self.page, self.shots, self.bench = page, shots, page.locator('.jp-OutputArea-output .widget-vbox').first

    def box(self, name): return self.bench.get_by_label(name, exact=True).locator('visible=true').first
    def button(self, name): return self.bench.get_by_role('button', name=re.compile(rf'^\W*{re.escape(name)}$')).locator('visible=true').first # an icon may stand before the name
    def tab(self, title): self.bench.locator('.lm-TabBar-tab', has_text=title).first.click()
    def told(self, text): self.bench.get_by_text(text).locator('visible=true').first.wait_for(timeout=180_000)

    def write(self, name, text):
        self.box(name).fill(text)
        self.box(name).press('Tab') # leaving a field is what most of them wait for

    def shot(self, name):
        self.page.wait_for_timeout(1500)
        self.bench.screenshot(path=self.shots/f'{name}.png')

def annotate(c):
    c.write('folder', 'pictures')
    c.button('Open').click()
    for i, kind in enumerate(KINDS):
        c.told(f'{i}-{kind[0]}.png, ') # below the picture that is shown
        c.write('question 1', QUESTION); c.write('answer 1', answer(*kind))
        if i == 1: c.shot('pictures')
        c.button('Save and next ▶').click()
    c.told('5 of 5 pictures have an entry')

def look_at_data(c):
    c.tab('2 Data')
    c.button('Check').click()
    c.told('5 of 5 entries are good.')
    c.button('next ▶').click()
    c.told('entry 1, id')
    c.shot('data')

def set_up(c):
    c.tab('3 Settings')
    c.write('script or config.json', 'small.json')
    c.button('Load').click()
    c.told('small.json was read')
    c.write('model_name_or_path', 'base'); c.write('data_path', 'pictures/train.json'); c.write('eval_data_path', 'pictures/train.json')
    c.write('learning_rate', '-1')
    c.told('it must be positive')
    assert c.button('Launch').is_disabled()
    c.write('learning_rate', '0.002'); c.write('name of the run', 'clicked')
    c.told('process on the CPU needs')
    c.shot('settings')
    c.button('Launch').click()

LOSS = r'loss (\d[\d.e-]*)'

def loss_below(c, limit): # Wait until the panel shows one
    c.page.wait_for_function('([loss, limit]) => { const m = document.querySelector(".jp-OutputArea-output .widget-vbox").innerText.match(loss); return m && parseFloat(m[1]) < limit }', arg=[LOSS, limit], timeout=180_000)
    return float(re.search(LOSS, c.bench.inner_text())[1])

def watch_and_stop(c):
    c.told('running')
    first = loss_below(c, 1e6)
    loss_below(c, .9*first)
    c.shot('workbench')
    c.button('Stop').click(); c.button('Really stop?').click()
    c.told('is stopped at step')

@pytest.mark.slow
def test_from_pictures_to_an_answer(folder):
    shots = Path(os.environ.get('SHOTS', folder)).absolute()
    with lab(folder) as address, browser(shots) as page:
        open_notebook(page, address('bench.ipynb'))
        run_all(page)
        c = Clicks(page, shots)
        c.told('1 Pictures')
        annotate(c); look_at_data(c); set_up(c)
        page.get_by_text('the kernel is free', exact=True).wait_for()
        watch_and_stop(c)
        run = Run.attach(folder/'runs'/'clicked')
        stopped = run.status()
        assert stopped['state'] == 'stopped' and 0 < stopped['step'] < 500

        restart_and_run_all(page) # a new kernel finds the run, and goes on with it
        c.told('clicked: stopped')
        c.button('Resume').click()
        c.told('clicked: done')
        steps = [m['step'] for m in read_metrics(run.folder) if 'loss' in m]
        assert steps == sorted(set(steps)) and steps[-1] == 500
        c.shot('run')

        c.tab('5 Merge')
        c.button('Merge').click()
        c.told('logits differ by')
        c.shot('merge')

        c.tab('6 Ask')
        c.write('picture', 'pictures/1-bar.png'); c.write('question', QUESTION)
        c.bench.get_by_text('ask the base too', exact=True).locator('visible=true').click()
        c.button('Ask').click()
        c.told(answer('bar', 'blue')); c.told('base and tuned in memory')
        c.shot('ask')
    entries = json.loads((folder/'pictures'/'train.json').read_text(encoding='utf-8'))
    assert [e['conversations'][-1]['content'] for e in entries] == [answer(*k) for k in KINDS]
    assert (folder/'runs'/'clicked'/'merged'/'config.json').is_file()
