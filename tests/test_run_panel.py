"The panel that watches a run: what the folder says appears, the kernel stays free, threads end."
import json, os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from minicpmv_nb import plots, run_panel
from minicpmv_nb.config import clock, lora, save_config, write_json
from minicpmv_nb.jobs import Run, find_runs, launch
from minicpmv_nb.run_panel import Follower, RunPanel, progress


def until(done, seconds=20):
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)

def line(step, **also): return dict(step=step, time=time.time(), loss=2/step, learning_rate=1e-4, tokens_per_second=3000.0, memory_gb=2.5) | also

class Written:
    "A run folder that the test writes, with a process that only sleeps."
    def __init__(self, folder, state='running', steps=10, alive=True):
        self.folder = folder; folder.mkdir(parents=True)
        save_config(lora('m', 't', use_cpu=True), folder/'config.json')
        self.process = subprocess.Popen(['sleep', '600']) if alive else None
        self.known = dict(created=psutil.Process(self.process.pid).create_time(), pid=self.process.pid) if alive else dict(created=time.time()-60)
        self.say(state, step=0, steps=steps)

    def say(self, state, **also):
        self.known |= dict(state=state, heartbeat=time.time()) | also
        write_json(self.folder/'status.json', self.known)

    def log(self, *entries, file='metrics.jsonl'):
        with open(self.folder/file, 'a') as f: f.write(''.join(json.dumps(e) + '\n' for e in entries))
        if self.process: self.say('running', step=entries[-1]['step'])

    def end(self, state, **also):
        self.process.kill(); self.process.wait()
        self.say(state, **also)

@pytest.fixture
def written(tmp_path):
    made = []
    def make(name='run', **how): made.append(Written(tmp_path/'runs'/name, **how)); return made[-1]
    yield make
    for w in made:
        if w.process: w.process.kill(); w.process.wait()

@pytest.fixture
def panel_of():
    panels = []
    def make(*args, **how): panels.append(RunPanel(*args, **dict(pause=.05) | how)); return panels[-1]
    yield make
    for p in panels: p.close()


def test_reading_on(tmp_path):
    follower, file = Follower(tmp_path), tmp_path/'metrics.jsonl'
    assert not follower.read() and follower.metrics == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert follower.read() and [m['step'] for m in follower.metrics] == [1, 2] and not follower.read()
    with open(file, 'a') as f: f.write('ep": 3}\n')
    assert follower.read() and [m['step'] for m in follower.metrics] == [1, 2, 3]
    (tmp_path/'.metrics').write_text('{"step": 1}\n{"step": 2}\n{"step": 4, "loss": NaN, "longer": "than before, as after a resume"}\n')
    os.replace(tmp_path/'.metrics', file)
    assert follower.read() and [m['step'] for m in follower.metrics] == [1, 2, 4]

def test_what_is_left_is_reckoned_from_this_start():
    status = dict(state='running', created=1000, heartbeat=1030, step=30, steps=100)
    entries = [dict(step=s, time=s) for s in range(1, 11)] + [dict(step=s, time=1000+s) for s in range(11, 31)] # fast, then resumed at one step a second
    assert progress(status, entries, 1032) == dict(step=30, steps=100, elapsed=32, eta=pytest.approx(68))
    assert progress(status, entries[:11], 1012)['eta'] is None # one entry of this start
    assert progress(status | dict(state='done', step=100), entries, 5000) == dict(step=100, steps=100, elapsed=30, eta=None)
    assert progress(dict(state='stopped'), [], 5000) == dict(step=0, steps=None, elapsed=None, eta=None)
    assert (clock(3723), clock(None)) == ('1:02:03', '–')

def test_a_run_is_watched_to_its_end(written, panel_of):
    w = written()
    panel = panel_of(w.folder)
    assert panel.values()['state'] == 'running' and panel.values()['loss'] is None and 'Nothing is logged yet' in panel.empty.value and panel.image.layout.display == 'none'
    w.log(line(1), line(2))
    until(lambda: panel.values()['step'] == 2 and panel.image.value)
    assert panel.bar.value == 2 and panel.bar.max == 10 and 'step 2 of 10 (20%)' in panel.line.value and '3,000 tokens per second' in panel.numbers.value and panel.image.layout.display is None
    before = panel.image.value
    w.log(line(3), dict(step=3, time=time.time(), eval_loss=.25))
    until(lambda: panel.values()['eval_loss'] == .25 and panel.image.value != before)
    w.end('done', step=10)
    until(lambda: not panel.watcher.is_alive())
    assert panel.values()['state'] == 'done' and 'done' in panel.line.value and panel.stop.disabled and panel.resume.disabled and panel.values()['eta'] is None

def test_drawn_only_when_something_is_new(written, panel_of, monkeypatch):
    w = written(); w.log(line(1), line(2))
    panel, drawn = panel_of(w.folder), []
    monkeypatch.setattr(run_panel, 'draw', lambda *args: drawn.append(1) or plots.draw(*args))
    time.sleep(.5)
    assert not drawn
    w.log(line(3))
    until(lambda: drawn)
    time.sleep(.3)
    assert len(drawn) == 1

def test_showing_the_panel_takes_no_time_and_close_ends_it(written, panel_of):
    w = written()
    panel = panel_of(w.folder, pause=600) # a thread that sleeps between two looks
    assert panel.watcher.is_alive() and panel.watcher.daemon
    begin = time.monotonic()
    panel.close()
    assert not panel.watcher.is_alive() and time.monotonic()-begin < 2
    assert w.process.poll() is None # the run goes on

def test_a_prepared_run_is_started(written, panel_of, monkeypatch):
    w = written(alive=False, state='prepared')
    panel, started = panel_of(w.folder), []
    assert panel.resume.description == 'Start' and not panel.resume.disabled and panel.stop.disabled
    monkeypatch.setattr(Run, 'start', lambda run: (started.append(run.folder), w.say('failed')))
    monkeypatch.setattr(Run, 'cause', lambda run: 'no reason')
    panel.resume.click(); panel.join()
    assert started == [w.folder] and panel.said == 'run is starting.' and panel.resume.description == 'Resume' and not panel.resume.disabled

def test_the_settings_change_the_figure(written, panel_of):
    w = written(alive=False, state='done'); w.log(*[line(s, grad_norm=1.0) for s in range(1, 60)])
    panel = panel_of(w.folder)
    seen = {panel.image.value}
    for change in (dict(show='memory'), dict(show='all'), dict(show='loss', log=True), dict(log=False, smooth=.4), dict(x='time')):
        for name, value in change.items(): getattr(panel, name).value = value
        assert panel.values() | change == panel.values() and panel.image.value not in seen
        seen.add(panel.image.value)
    assert panel.watcher is None # nothing to watch

def test_runs_are_found_chosen_and_laid_over_each_other(written, panel_of, tmp_path):
    for i, name in enumerate(('old', 'new')):
        w = written(name, alive=False, state='done'); w.log(line(1), line(2)); w.say('done', step=2)
        os.utime(w.folder/'status.json', (i, i))
    (tmp_path/'runs'/'none').mkdir()
    assert [r.folder.name for r in find_runs(tmp_path/'runs')] == ['new', 'old']
    panel = panel_of(folder=tmp_path/'runs')
    assert Path(panel.values()['run']).name == 'new' and [label for label, _ in panel.chosen.options] == ['new · done, step 2 of 10', 'old · done, step 2 of 10']
    panel.chosen.value = str(tmp_path/'runs'/'old')
    assert Path(panel.values()['run']).name == 'old' and [Path(p).name for _, p in panel.others.options] == ['new']
    alone = panel.image.value
    panel.others.value = [str(tmp_path/'runs'/'new')]
    assert panel.values()['runs'] == ['new'] and panel.image.value != alone and len(panel.figure.axes[0].lines) == 2
    written('third', alive=False, state='stopped')
    panel.refresh.click()
    assert 'third · stopped, step 0 of 10' in [label for label, _ in panel.chosen.options] and panel.values()['runs'] == ['new'] and Path(panel.chosen.value).name == 'old'

def test_a_path_elsewhere(written, panel_of, tmp_path):
    w = written(alive=False, state='stopped')
    panel = panel_of(folder=tmp_path/'nothing')
    assert panel.said.startswith('There is no run in') and panel.values()['run'] is None
    panel.path.value = str(tmp_path/'gone'); panel.attach.click()
    assert 'is no run folder: it has no config.json' in panel.said
    panel.path.value = str(w.folder); panel.attach.click()
    assert panel.values()['run'] == str(w.folder) and panel.chosen.value == str(w.folder) and panel.said == ''

def test_stopping_asks_once_more(written, panel_of):
    w = written()
    w.log(line(1))
    panel = panel_of(w.folder)
    panel.stop.click()
    assert panel.stop.description == 'Really stop?' and w.process.poll() is None and panel.values()['state'] == 'running'
    panel.asked -= 11 # it was long ago
    until(lambda: panel.stop.description == 'Stop')
    panel.stop.click(); panel.stop.click()
    until(lambda: w.process.poll() is not None) # reaped here, since the test is its parent
    panel.join()
    assert panel.values()['state'] == 'stopped' and 'is stopped at step 1' in panel.said and panel.watcher is None and not panel.resume.disabled
    panel.stop.click()
    assert panel.said == 'run is stopped: there is nothing to stop.'
    panel.resume.click(); panel.join()
    assert 'has no checkpoint yet' in panel.said

def test_why_it_failed_and_what_it_said_are_shown_and_escaped(written, panel_of):
    w = written()
    (w.folder/'log.txt').write_text('<script>alert(1)</script>\nbar 1%\rbar 100%\nlast & least\n')
    panel = panel_of(w.folder)
    assert '&lt;script&gt;' in panel.tail.value and '<script>' not in panel.tail.value and 'bar 1%' not in panel.tail.value
    panel.lines.value = 1
    assert 'last &amp; least' in panel.tail.value and 'bar' not in panel.tail.value
    w.end('failed', error='DataError: <b>bad</b>')
    until(lambda: not panel.watcher.is_alive())
    assert 'DataError: &lt;b&gt;bad&lt;/b&gt;' in panel.why.value and panel.bar.bar_style == 'danger' and not panel.resume.disabled

def test_a_loss_that_is_no_number(written, panel_of):
    w = written(); w.log(line(1), line(2, loss=float('nan')))
    panel = panel_of(w.folder)
    assert panel.image.value and 'loss nan' in panel.numbers.value and panel.said == ''

def test_a_resumed_run_is_read_anew(written, panel_of):
    w = written(); w.log(line(1), line(2), line(3))
    panel = panel_of(w.folder)
    (w.folder/'.metrics').write_text(json.dumps(line(1)) + '\n'); os.replace(w.folder/'.metrics', w.folder/'metrics.jsonl')
    w.log(line(2, loss=.125))
    until(lambda: panel.values()['loss'] == .125)
    assert len(panel.followers[w.folder].metrics) == 2

def test_a_folder_that_vanishes_ends_the_watching(written, panel_of):
    w = written(); w.log(line(1))
    panel = panel_of(w.folder)
    import shutil; shutil.rmtree(w.folder)
    until(lambda: not panel.watcher.is_alive())

def test_saving_the_figure(written, panel_of, tmp_path):
    w = written(alive=False, state='done'); w.log(line(1), line(2))
    panel = panel_of(w.folder)
    assert panel.file.value == 'run.png'
    for name, said in (('loss.pdf', 'Saved'), ('loss.doc', 'written as .png, .svg or .pdf'), ('gone/loss.png', 'There is no folder')):
        panel.file.value = str(tmp_path/name); panel.save.click()
        assert said in panel.said
    assert (tmp_path/'loss.pdf').read_bytes().startswith(b'%PDF')

def test_every_input_says_what_it_is(panel_of, tmp_path):
    panel = panel_of(folder=tmp_path)
    inputs = (panel.chosen, panel.refresh, panel.path, panel.attach, panel.stop, panel.resume, panel.x, panel.smooth, panel.log, panel.lines, panel.others, panel.file, panel.save)
    assert all(w.description and w.tooltip for w in inputs) and len(panel.show.tooltips) == len(panel.show.options)


@pytest.mark.slow
def test_a_real_run_from_start_to_end(tiny, drawn, tmp_path, panel_of):
    cfg = lora(str(tiny), str(drawn), output_dir=str(tmp_path/'runs'/'real'), use_cpu=True, fp16=False, deepspeed=None, max_steps=2000, save_steps=5, gradient_accumulation_steps=1, max_slice_nums=1,
        learning_rate=1e-3, dataloader_num_workers=0, tune_vision=False, report_to='none')
    panel = panel_of(launch(cfg), folder=tmp_path/'runs')
    assert panel.values()['state'] in ('starting', 'running')
    until(lambda: panel.values()['step'] >= 8, 240)
    first = panel.figure.axes[0].lines[0].get_ydata()[0]
    assert panel.values()['loss'] != first and panel.image.value and panel.values()['eta'] > 0
    panel.stop.click(); panel.stop.click(); panel.join(240)
    assert panel.values()['state'] == 'stopped' and panel.watcher is None
    reached = panel.values()['step']
    save_config(replace(panel.run.config, max_steps=reached+4), tmp_path/'runs'/'real'/'config.json') # so that the rest is short
    code = f"from minicpmv_nb import RunPanel; p = RunPanel({cfg.output_dir!r}); print(p.values()['state'], p.values()['step'])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split() == ['stopped', str(reached)]
    panel.resume.click(); panel.join(240)
    assert panel.watcher is not None, panel.said
    panel.watcher.join(240)
    assert (panel.values()['state'], panel.values()['step'], panel.values()['steps']) == ('done', reached+4, reached+4), panel.why.value
    assert 'resumed' in [l.get_label() for l in panel.figure.axes[0].lines] and [m['step'] for m in panel.run.metrics()] == list(range(1, reached+5))

@pytest.mark.slow
def test_a_run_started_from_a_shell(tiny, drawn, tmp_path, panel_of):
    cfg = lora(str(tiny), str(drawn), output_dir=str(tmp_path/'runs'/'shell'), use_cpu=True, fp16=False, deepspeed=None, max_steps=6, save_steps=5, gradient_accumulation_steps=1, max_slice_nums=1, dataloader_num_workers=0, tune_vision=False, report_to='none')
    run = launch(cfg, start=False)
    panel = panel_of(run)
    assert panel.values()['state'] == 'prepared' and panel.watcher is None
    shell = subprocess.Popen(['bash', str(run.folder/'run.sh')], cwd='/', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: Run.attach(run.folder).status()['state'] == 'running', 240)
    panel.refresh.click()
    panel.watcher.join(240); shell.wait(60)
    assert panel.values()['state'] == 'done' and panel.values()['step'] == 6 and 'prints there' in panel.tail.value
