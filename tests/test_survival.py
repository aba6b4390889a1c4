"Runs that survive: killed, stopped, hung, on a full disk; what is best is kept, and what is resumed gives the same losses."
import json, os, random, re, resource, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from support import draw_data, flags, free_port
from minicpmv_nb import training
from minicpmv_nb.config import Config, read_status
from minicpmv_nb.surviving import Pulse, Stop, checkpoints, newest_checkpoint, rotate, steady, writing
from minicpmv_nb.training import read_metrics, train

STEPS = 24
SMALL = dict(use_lora='true', lora_r=8, lora_dropout=.05, use_cpu='true', dataloader_num_workers=0, learning_rate=1e-3, max_steps=STEPS, save_steps=5, warmup_steps=2)


@pytest.fixture(scope='session')
def argv(tiny, drawn):
    "Flags of a run with dropout, so that the random state matters; two ranks pass over the data twice."
    return lambda out, **also: flags(model_name_or_path=tiny, data_path=drawn, output_dir=out, **SMALL | also)

class Job:
    "A run in processes of its own."
    def __init__(self, argv, ranks=2, log=None):
        self.folder = Path(argv[argv.index('--output_dir')+1])
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(ranks), '--master_port', str(free_port()), '-m', 'minicpmv_nb.training', *argv]
        self.said = log or self.folder.with_suffix('.log')
        self.process = subprocess.Popen(command, env=os.environ | dict(PATH=path, OMP_NUM_THREADS='1'), stdout=open(self.said, 'a'), stderr=subprocess.STDOUT, start_new_session=True)

    def ranks(self): # By number
        return [psutil.Process(int(pid)) for _, pid in sorted(re.findall(r'rank (\d) of \d, process (\d+)', self.log()))][-2:]

    def log(self): return self.said.read_text(errors='replace')

    def until(self, done, seconds=90):
        end = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, self.log()[-5000:]
            assert time.monotonic() < end, 'it did not happen\n' + self.log()[-3000:]
            time.sleep(.002)
        return self

    def ended(self, seconds=90): # With this exit code
        try: return self.process.wait(seconds)
        finally: self.kill()

    def still(self, action): # Do something while the ranks are suspended
        for p in self.ranks(): p.suspend()
        try: return action()
        finally:
            for p in self.ranks(): p.resume()

    def kill(self): # The ranks first, each in a session of its own; then torchrun
        try: everybody = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess: return
        for p in everybody:
            try: p.kill()
            except psutil.NoSuchProcess: pass

    def finish(self):
        assert self.ended() == 0, self.log()[-6000:]
        return self

def rows(folder): return [(m['step'], m['loss'], m['grad_norm'], m['learning_rate']) for m in read_metrics(folder) if 'loss' in m]

def at_step(folder, n): return lambda: any(m['step'] >= n for m in read_metrics(folder))

def saving(folder): return lambda: any(folder.glob('.saving/*/*'))

@pytest.fixture(scope='session')
def whole(argv, tmp_path_factory):
    "The losses of a run that nothing disturbed."
    folder = tmp_path_factory.mktemp('whole')/'run'
    Job(argv(folder)).finish()
    assert len(rows(folder)) == STEPS
    return rows(folder)

def complete(folder):
    "Whether every checkpoint holds all it needs."
    needed = {'adapter_model.safetensors', 'optimizer.pt', 'scheduler.pt', 'trainer_state.json', 'rng_state_0.pth', 'rng_state_1.pth'}
    return all(needed <= {p.name for p in c.iterdir()} and torch.load(c/'optimizer.pt', weights_only=True) for c in checkpoints(folder))


# --- kill -9 ---------------------------------------------------------------------------------------------------------

def killed(job, when, ranks):
    "End some ranks, or torchrun and all, at some moment; torchrun ends the others."
    try:
        job.until(when)
        if ranks == 'all': job.kill()
        else: job.ranks()[ranks].kill()
        assert job.ended() != 0
    finally: job.kill()

def caught(job, when):
    "Suspend the ranks at a moment that is soon over."
    if not when(): return False
    for p in job.ranks(): p.suspend()
    if when(): return True
    for p in job.ranks(): p.resume()

@pytest.mark.parametrize('ranks, when', [(1, 'step 14'), ('all', 'step 7'), ('all', 'saving')])
def test_killed_and_resumed_gives_the_same_losses(argv, whole, tmp_path, ranks, when):
    folder = tmp_path/'run'
    job = Job(argv(folder))
    killed(job, (lambda: caught(job, saving(folder))) if when == 'saving' else at_step(folder, int(when[5:])), ranks)
    assert complete(folder) and not (folder/'final').exists()
    if when == 'saving': assert (folder/'.saving').exists() # it was in the middle
    Job(argv(folder, resume_from_checkpoint='auto')).finish()
    assert rows(folder) == whole and read_status(folder)['state'] == 'done' and not (folder/'.saving').exists()

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(20))
def test_killed_anywhere(argv, whole, tmp_path, seed):
    luck, folder = random.Random(seed), tmp_path/'run'
    when = at_step(folder, luck.randint(1, STEPS-4)) if luck.random() < .6 else (lambda n: lambda: saving(folder)() and at_step(folder, n)())(luck.choice([4, 9, 14, 19]))
    def later(): return when() and (time.sleep(luck.random()*.1) or True)
    killed(Job(argv(folder)), later, luck.choice([0, 1, 'all']))
    assert complete(folder)
    Job(argv(folder, resume_from_checkpoint='auto')).finish()
    assert rows(folder) == whole

@pytest.mark.slow
@pytest.mark.parametrize('stage', [2, 3])
def test_killed_under_deepspeed(argv, tmp_path, stage):
    more = dict(deepspeed=f'ds_config_zero{stage}.json')
    Job(argv(tmp_path/'whole', **more)).finish()
    killed(Job(argv(tmp_path/'run', **more)), at_step(tmp_path/'run', 7), 1)
    Job(argv(tmp_path/'run', **more, resume_from_checkpoint='auto')).finish()
    assert rows(tmp_path/'run') == rows(tmp_path/'whole')


# --- SIGTERM ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('to', ['torchrun', 'one rank', pytest.param('everybody', marks=pytest.mark.slow), 'SIGINT', pytest.param('SIGHUP', marks=pytest.mark.slow)])
def test_told_to_stop_it_saves_and_leaves(argv, whole, tmp_path, to):
    folder = tmp_path/'run'
    more = dict(save_steps=100, dataloader_num_workers=0 if to == 'one rank' else 2)
    job = Job(argv(folder, **more)).until(at_step(folder, 4))
    ranks = job.ranks()
    everybody = [*psutil.Process(job.process.pid).children(recursive=True), job.process] # data loaders too, as Slurm does it
    assert len(everybody) >= (7 if more['dataloader_num_workers'] else 3)
    for p in dict(everybody=everybody).get(to, ranks[1:] if to == 'one rank' else [job.process]): p.send_signal(getattr(signal, to, signal.SIGTERM)) # torchrun passes on what it got
    assert (job.ended() == 0) == (to == 'one rank'), job.log()[-5000:] # torchrun itself ends with an error when it was told to end
    reached = int(newest_checkpoint(folder).name.split('-')[1])
    said = read_status(folder)
    assert said['state'] == 'stopped' and said['step'] == reached and 4 <= reached < STEPS and not said.get('error')
    assert 'minicpmv_nb/training.py' not in job.log() and not (folder/'final').exists() # no rank has a traceback; torchrun prints its own
    assert f'stopped by a signal after step {reached}' in job.log()
    if to != 'one rank': return # the others differ in how they end only
    Job(argv(folder, save_steps=100, resume_from_checkpoint='auto')).finish()
    assert rows(folder) == whole

def test_sigterm_before_the_first_step_ends_at_once(argv, tmp_path):
    folder = tmp_path/'run'
    job = Job(argv(folder, max_steps=10_000))
    job.until(lambda: (folder/'config.json').is_file() and len(job.ranks()) == 2)
    job.ranks()[1].send_signal(signal.SIGTERM)
    assert job.ended(40) != 0
    assert read_status(folder)['state'] == 'stopped' or at_step(folder, 1)()

def test_the_mean_between_two_lines_of_the_log_survives(argv, tmp_path, tiny, drawn):
    cfg = Config(str(tiny), str(drawn), output_dir=str(tmp_path/'whole'), use_lora=True, use_cpu=True, dataloader_num_workers=0, max_steps=6, save_steps=2, logging_steps=3, learning_rate=1e-3)
    train(cfg)
    shutil.copytree(tmp_path/'whole', tmp_path/'again', ignore=shutil.ignore_patterns('checkpoint-4', 'checkpoint-6', 'final'))
    train(replace(cfg, output_dir=str(tmp_path/'again'), resume_from_checkpoint='auto'))
    assert rows(tmp_path/'again') == rows(tmp_path/'whole') and len(rows(tmp_path/'whole')) == 2


# --- best and last ---------------------------------------------------------------------------------------------------

LOSSES = [3., 2., 1., 2., 2.5, 2.2, 2.1, 2.]  # of the evaluations: the third is the best

@pytest.fixture
def judged(tiny, drawn, tmp_path, monkeypatch):
    "A run whose evaluations say what we like, after every step."
    losses = iter(LOSSES)
    straight = training.FineTuner.evaluation_loop
    def evaluation_loop(self, *args, **kwargs):
        result = straight(self, *args, **kwargs)
        result.metrics['eval_loss'] = next(losses)
        return result
    monkeypatch.setattr(training.FineTuner, 'evaluation_loop', evaluation_loop)
    return Config(str(tiny), str(drawn), eval_data_path=str(draw_data(tmp_path, 2, 'eval.json')), do_eval=True, eval_steps=1, output_dir=str(tmp_path/'run'), use_lora=True, use_cpu=True,
        dataloader_num_workers=0, max_steps=6, save_steps=2, learning_rate=1e-2, save_total_limit=2)

def names(folder): return [p.name for p in checkpoints(folder)]

def weights(folder): return load_file(next(folder.glob('*.safetensors')))

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

def test_the_best_checkpoint_is_saved_and_kept(judged, tmp_path):
    train(judged)
    run = tmp_path/'run'
    assert names(run) == ['checkpoint-3', 'checkpoint-6'] # the third is no multiple of save_steps
    assert (read_status(run)['best_step'], read_status(run)['best_eval_loss'], read_status(run)['state']) == (3, 1., 'done')
    assert same(weights(run/'final'), weights(run/'checkpoint-6')) and not same(weights(run/'final'), weights(run/'checkpoint-3'))
    state = json.loads((run/'checkpoint-6'/'trainer_state.json').read_text())
    assert state['best_global_step'] == 3 and '.saving' not in json.dumps(state)

@pytest.mark.parametrize('how', ['lora', 'full'])
def test_the_best_weights_are_handed_over(judged, tmp_path, how):
    if how == 'full': judged = replace(judged, use_lora=False, tune_llm=True)
    run = tmp_path/'run'
    train(judged)
    files = {p.name for p in (run/'final').iterdir()}
    shutil.rmtree(run)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training.FineTuner, 'evaluation_loop', again(LOSSES))
        train(replace(judged, load_best_model_at_end=True))
    assert {p.name for p in (run/'final').iterdir()} == files # those of any other `final`
    assert same(weights(run/'final'), weights(run/'checkpoint-3')) and not same(weights(run/'final'), weights(run/'checkpoint-6'))

def again(losses):
    "An evaluation that has the losses from the start."
    losses, inner = iter(losses), training.Trainer.evaluation_loop
    def evaluation_loop(self, *args, **kwargs):
        self.eval_sums = torch.zeros(2)
        result = inner(self, *args, **kwargs)
        result.metrics['eval_loss'] = next(losses)
        return result
    return evaluation_loop

def test_early_stopping(judged, tmp_path):
    train(replace(judged, early_stopping_patience=2))
    assert [m['step'] for m in read_metrics(tmp_path/'run') if 'eval_loss' in m] == [1, 2, 3, 4, 5]
    assert read_status(tmp_path/'run') | dict(state='done', step=5) == read_status(tmp_path/'run') and (tmp_path/'run'/'final').is_dir()

def test_early_stopping_counts_on_after_a_resume(judged, tmp_path):
    run = tmp_path/'run'
    train(replace(judged, early_stopping_patience=2, max_steps=4)) # one evaluation without a lower loss
    train(replace(judged, early_stopping_patience=2, resume_from_checkpoint='auto'))
    assert [m['step'] for m in read_metrics(run) if 'eval_loss' in m] == [1, 2, 3, 4, 5]

def test_patience_is_that_of_now(judged, tmp_path):
    run = tmp_path/'run'
    train(replace(judged, early_stopping_patience=1)) # stopped after the fourth
    assert read_status(run)['step'] == 4
    train(replace(judged, early_stopping_patience=3, resume_from_checkpoint='auto'))
    assert read_status(run)['step'] == 6 and read_status(run)['state'] == 'done'

def test_a_run_that_was_stopped_early_and_killed_does_not_go_on(judged, tmp_path):
    run = tmp_path/'run'
    train(replace(judged, early_stopping_patience=1, save_steps=1, max_steps=8))
    shutil.rmtree(run/'final')
    train(replace(judged, early_stopping_patience=1, save_steps=1, max_steps=8, resume_from_checkpoint='auto'))
    assert [m['step'] for m in read_metrics(run) if 'eval_loss' in m] == [1, 2, 3, 4] and (run/'final').is_dir() and read_status(run)['state'] == 'done'

def test_early_stopping_may_begin_when_a_run_goes_on(judged, tmp_path):
    train(replace(judged, max_steps=4))
    train(replace(judged, early_stopping_patience=2, resume_from_checkpoint='auto')) # the best was the third
    assert read_status(tmp_path/'run')['state'] == 'done'

def test_the_best_of_another_run_does_not_count(judged, tmp_path):
    train(replace(judged, max_steps=3)) # the best of all is its last
    other = replace(judged, output_dir=str(tmp_path/'other'), resume_from_checkpoint=str(tmp_path/'run/checkpoint-3'), load_best_model_at_end=True, early_stopping_patience=3)
    train(other) # 2, 2.5 and 2.2
    assert read_status(tmp_path/'other')['best_step'] == 4 and same(weights(tmp_path/'other/final'), weights(tmp_path/'other/checkpoint-4'))

def test_what_the_best_needs_is_said(judged):
    with pytest.raises(ValueError, match='load_best_model_at_end needs checkpoints'): train(replace(judged, load_best_model_at_end=True, save_strategy='no'))
    with pytest.raises(ValueError, match='load_best_model_at_end and early_stopping_patience need evaluations'): train(replace(judged, early_stopping_patience=1, evaluation_strategy='no'))

class StopAfter(Stop):
    "SIGTERM in the middle of this step."
    def __init__(self, folder, step): super().__init__(folder); self.step = step
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step: self.asked = 1.
        super().on_step_end(args, state, control, **kw)

class StopWithin(StopAfter):
    "SIGTERM in the middle of the evaluation after this step."
    def on_step_end(self, *args, **kw): Stop.on_step_end(self, *args, **kw)
    def on_prediction_step(self, args, state, control, **kw):
        if state.global_step == self.step: self.asked = 1.
        super().on_prediction_step(args, state, control, **kw)

def test_a_loader_that_was_told_to_stop_does_not_end_a_long_save(monkeypatch):
    alarm = signal.alarm
    monkeypatch.setattr(signal, 'alarm', lambda seconds: alarm(1)) # in the process that loads
    loader = torch.utils.data.DataLoader(range(100), num_workers=1, worker_init_fn=partial(steady, None))
    batches = iter(loader); next(batches)
    worker = batches._workers[0]
    os.kill(worker.pid, signal.SIGTERM)
    end = time.monotonic() + 4
    while time.monotonic() < end: time.sleep(.1) # a save; torch would raise here
    assert worker.exitcode == 0

@pytest.mark.parametrize('ignored', [False, True])
def test_what_is_ignored_stays_so(monkeypatch, tmp_path, ignored):
    # As under nohup.
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    code = f'''import signal; from minicpmv_nb.surviving import Stop
signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'}) # whatever started the tests
Stop({str(tmp_path)!r}).listen(); print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == str(ignored)

@pytest.mark.parametrize('how', ['steps', 'epoch'])
@pytest.mark.parametrize('kind', [StopAfter, StopWithin])
def test_an_evaluation_does_not_keep_a_run_from_stopping(judged, tmp_path, monkeypatch, how, kind):
    cfg = replace(judged, evaluation_strategy=how, eval_steps=6, save_steps=6, max_steps=18, per_device_train_batch_size=4, lora_dropout=.05, save_total_limit=None, logging_steps=4)
    def part(name, losses, stop=None):
        with monkeypatch.context() as m:
            m.setattr(training.FineTuner, 'evaluation_loop', again(losses))
            return train(replace(cfg, output_dir=str(tmp_path/name), resume_from_checkpoint='auto'), stop=stop)
    part('whole', [2., 3., 1.])
    assert part('run', [2.], kind(tmp_path/'run', 12)) is None and read_status(tmp_path/'run')['state'] == 'stopped' and newest_checkpoint(tmp_path/'run').name == 'checkpoint-12'
    assert [m['step'] for m in read_metrics(tmp_path/'run') if 'eval_loss' in m] == [6]
    part('run', [3., 1.])
    for seen in (rows, lambda run: [(m['step'], m['eval_loss']) for m in read_metrics(run) if 'eval_loss' in m], lambda run: read_status(run)['best_step'], names): assert seen(tmp_path/'run') == seen(tmp_path/'whole')
    assert same(weights(tmp_path/'run/final'), weights(tmp_path/'whole/final'))

def test_an_evaluation_that_was_missed_is_made_up_for(judged, tmp_path, monkeypatch):
    # The checkpoint of an epoch's last step is written before its evaluation, by the second of which the run is killed; then stopped in front of the third, killed in the fourth.
    cfg = replace(judged, evaluation_strategy='epoch', num_train_epochs=4, max_steps=-1, per_device_train_batch_size=4, lora_dropout=.05, save_total_limit=None, load_best_model_at_end=True)
    def part(name, losses, stop=None):
        with monkeypatch.context() as m:
            m.setattr(training.FineTuner, 'evaluation_loop', again(losses))
            return train(replace(cfg, output_dir=str(tmp_path/name), resume_from_checkpoint='auto'), stop=stop)
    part('whole', LOSSES[:4])
    with pytest.raises(StopIteration): part('run', LOSSES[:1])
    assert newest_checkpoint(tmp_path/'run').name == 'checkpoint-12'
    assert part('run', LOSSES[1:2], StopAfter(tmp_path/'run', 18)) is None
    with pytest.raises(StopIteration): part('run', LOSSES[2:3])
    part('run', LOSSES[3:4])
    for seen in (rows, lambda run: [(m['step'], m['eval_loss']) for m in read_metrics(run) if 'eval_loss' in m], lambda run: read_status(run)['best_step'], names): assert seen(tmp_path/'run') == seen(tmp_path/'whole')
    assert [m['step'] for m in read_metrics(tmp_path/'run') if 'eval_loss' in m] == [6, 12, 18, 24] and same(weights(tmp_path/'run/final'), weights(tmp_path/'whole/checkpoint-18'))

@pytest.mark.slow
@pytest.mark.parametrize('stage', [2, 3])
def test_a_missed_evaluation_under_deepspeed(argv, tmp_path, drawn, stage):
    more = dict(deepspeed=f'ds_config_zero{stage}.json', do_eval='true', eval_data_path=drawn, evaluation_strategy='epoch', save_steps=4)
    Job(argv(tmp_path/'whole', **more)).finish()
    run = tmp_path/'run'
    killed(Job(argv(run, **more)), (run/'checkpoint-12').is_dir, 'all') # 12 steps an epoch
    assert not any('eval_loss' in m for m in json.loads((run/'checkpoint-12/trainer_state.json').read_text())['log_history'])
    Job(argv(run, **more, resume_from_checkpoint='auto')).finish()
    assert rows(run) == rows(tmp_path/'whole') and [(m['step'], m['eval_loss']) for m in read_metrics(run) if 'eval_loss' in m] == [(m['step'], m['eval_loss']) for m in read_metrics(tmp_path/'whole') if 'eval_loss' in m]

@pytest.mark.slow
@pytest.mark.parametrize('stage', [2, 3])
@pytest.mark.parametrize('how', ['use_lora', 'tune_llm'])
def test_the_best_weights_under_deepspeed(argv, tmp_path, drawn, stage, how):
    # A rate that makes the second step a bad one; the first is made with a rate of 0.
    run = tmp_path/'run'
    Job(argv(run, use_lora=str(how == 'use_lora').lower(), tune_llm=str(how == 'tune_llm').lower(), learning_rate=3, warmup_steps=6, max_steps=2, save_steps=2, eval_data_path=drawn,
        do_eval='true', eval_steps=1, load_best_model_at_end='true', deepspeed=f'ds_config_zero{stage}.json')).finish()
    losses = {m['step']: m['eval_loss'] for m in read_metrics(run) if 'eval_loss' in m}
    best = min(losses, key=losses.get)
    assert read_status(run)['best_step'] == best == 1
    assert same(weights(run/'final'), weights(run/'checkpoint-1')) and not same(weights(run/'final'), weights(run/'checkpoint-2'))

def test_rotation(tmp_path):
    def left(limit, best, found=range(1, 7)):
        shutil.rmtree(tmp_path); tmp_path.mkdir()
        for n in found: (tmp_path/f'checkpoint-{n}').mkdir()
        rotate(tmp_path, limit, best)
        return [int(n.split('-')[1]) for n in names(tmp_path)]
    assert left(2, None) == [5, 6] and left(3, 2) == [2, 5, 6] and left(1, 2) == [2, 6] and left(1, 6) == [6] and left(None, 1) == [1, 2, 3, 4, 5, 6] and left(9, 1) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


# --- the disk --------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    "Mount a tmpfs of some size, if this machine lets us."
    mounted = []
    def mount(size):
        folder = tmp_path/'disk'; folder.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True).returncode: return None
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted: subprocess.run(['umount', '-l', str(folder)], check=True)

def fill(folder, leave):
    "Take the room of a disk, but for some bytes."
    free = shutil.disk_usage(folder).free
    (folder/'ballast').write_bytes(b'0'*max(free-leave, 0))

def test_a_full_disk(argv, whole, small_disk, tmp_path):
    disk = small_disk('24m')
    if not disk: # the same by a limit on the size of files, once the first checkpoint is there
        disk = tmp_path/'disk'; disk.mkdir(exist_ok=True)
    run = disk/'run'
    job = Job(argv(run), log=tmp_path/'log').until(lambda: newest_checkpoint(run))
    if os.path.ismount(disk): job.still(lambda: fill(disk, 200_000))
    else: job.still(lambda: [resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (100_000, 100_000)) for p in job.ranks()])
    assert job.ended() != 0
    said = read_status(run)
    assert said['state'] == 'failed'
    assert re.search(r'checkpoint-\d+ could not be written to .*/run, where [\d,]+ MB are free: .*(No space left|unexpected pos|File too large)', said['error'], re.S), said['error']
    last = newest_checkpoint(run).name
    assert f'{last} is complete, and resuming goes on from there. Make room' in said['error'] and complete(run)
    if os.path.ismount(disk): (disk/'ballast').unlink()
    Job(argv(run, resume_from_checkpoint='auto')).finish()
    assert rows(run) == whole

def test_a_read_only_folder(argv, whole, small_disk, tmp_path):
    disk = small_disk('40m')
    run = (disk or tmp_path)/'run'
    job = Job(argv(run), log=tmp_path/'log').until(lambda: newest_checkpoint(run))
    if disk:
        while job.process.poll() is None and job.still(lambda: subprocess.run(['mount', '-o', 'remount,ro', str(disk)], capture_output=True)).returncode: time.sleep(.001) # refused while a file is open for writing
    else: shutil.rmtree(run/'.saving', ignore_errors=True); (run/'.saving').write_text('in the way')
    assert job.ended() != 0
    assert re.search(r'could not be written to .*/run, where [\d,]+ MB are free: .*(Read-only file system|Not a directory|File exists)', job.log(), re.S), job.log()[-4000:]
    assert complete(run) and newest_checkpoint(run)
    if disk: subprocess.run(['mount', '-o', 'remount,rw', str(disk)], check=True)
    else: (run/'.saving').unlink()
    Job(argv(run, resume_from_checkpoint='auto')).finish()
    assert rows(run) == whole

@pytest.mark.parametrize('write', [lambda: torch.save(torch.zeros(1_000_000), '/dev/full'), lambda: open('/dev/full', 'w').write('x'*10_000)])
def test_what_a_disk_says_is_translated(tmp_path, write):
    (tmp_path/'checkpoint-7').mkdir(); (tmp_path/'.saving'/'checkpoint-9').mkdir(parents=True); (tmp_path/'.saving'/'checkpoint-9'/'half').write_text('x')
    with pytest.raises(OSError, match='^checkpoint-9 could not be written to .* MB are free: .* checkpoint-7 is complete, and resuming goes on from there. Make room, or make the folder writable, first.$'):
        with writing('checkpoint-9', tmp_path): write()
    assert not (tmp_path/'.saving'/'checkpoint-9'/'half').exists() # room for the last words

def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match='^Connection closed by peer$'):
        with writing('checkpoint-9', tmp_path): raise RuntimeError('Connection closed by peer')


# --- a rank that hangs -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_hung_rank_is_named(argv, tmp_path, rank):
    folder = tmp_path/'run'
    job = Job(argv(folder, max_steps=100_000, save_steps=100_000, hang_timeout=6)).until(at_step(folder, 5))
    hung = job.ranks()[rank]
    hung.suspend()
    try: assert job.ended(60) != 0
    finally: job.kill()
    said = read_status(folder)
    assert said['state'] == 'failed'
    assert (m := re.fullmatch(rf'rank {rank} \(pid {hung.pid} on {re.escape(socket.gethostname())}\) has not finished step (\d+) for (\d+) seconds', said['error'])), said['error']
    assert 5 <= int(m[1]) <= read_metrics(folder)[-1]['step'] + 2 and 5 <= int(m[2]) <= 15
    assert said['error'] in job.log() and 'Signal 9' not in job.log() and not hung.is_running() # of which jobs.cause would say that memory ran out

def pulse_of(*said, timeout=60, rank=0):
    "What the watcher finds; each of `said`: a time, and per rank (moves, when it last wrote, bytes written)."
    pulse = Pulse('run', timeout); pulse.rank = rank
    for now, ranks in said:
        found = {n: dict(rank=n, pid=n, host='here', step=3, moves=moves, time=beat, written=written) for n, (moves, beat, written) in ranks.items()}
        late = pulse.look(found, now)
    return late and (late[0]['rank'], late[1])

def test_who_is_to_blame():
    assert pulse_of((0, {0: (5, 0, 0), 1: (5, 0, 0)}), (50, {0: (5, 50, 0), 1: (5, 50, 0)})) is None # not yet
    assert pulse_of((0, {0: (6, 0, 0), 1: (5, 0, 0)}), (61, {0: (6, 61, 0), 1: (5, 61, 0)})) == (1, 61) # the one that has done less
    assert pulse_of((0, {0: (5, 0, 0), 1: (6, 0, 0)}), (61, {0: (5, 61, 0), 1: (6, 0, 0)})) == (1, 61) # the one that does not even say so
    assert pulse_of((0, {0: (6, 0, 0), 1: (5, 0, 0)}), (61, {0: (6, 61, 9), 1: (5, 61, 0)})) is None # a checkpoint is growing
    assert pulse_of((0, {0: (5, 0, 0)}), (61, {0: (5, 0, 0)}), rank=1) is None and pulse_of((0, {0: (5, 0, 0)}), (80, {0: (5, 0, 0)}), rank=1) == (0, 80) # rank 0 is given the first word


# --- what is reported ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_a_report_whose_package_is_missing(judged, monkeypatch, capsys, name):
    there = training._installed
    monkeypatch.setattr(training, '_installed', lambda package: package != name and there(package))
    train(replace(judged, report_to=name, do_eval=False, max_steps=1))
    assert f'{name} is not installed, metrics.jsonl is written all the same. To get it: pip install' in capsys.readouterr().out and len(read_metrics(judged.output_dir)) == 1

def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    # tensorboard and wandb write into folders of their names in the run folder, where a run works.
    (tmp_path/'nosuchpackage').mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not training._installed('nosuchpackage') and training._installed('torch')

@pytest.mark.parametrize('given, netrc, mode', [({}, '', 'offline'), (dict(WANDB_API_KEY='k'), '', 'online'), (dict(WANDB_MODE='disabled'), '', 'disabled'), ({}, 'machine api.wandb.ai login user password k', 'online')])
def test_wandb_asks_for_no_login(judged, tmp_path, monkeypatch, given, netrc, mode):
    for name in ('WANDB_API_KEY', 'WANDB_MODE', 'WANDB_DIR', 'WANDB_PROJECT', 'TENSORBOARD_LOGGING_DIR'): monkeypatch.setenv(name, ''); monkeypatch.delenv(name)
    (tmp_path/'netrc').write_text(netrc)
    monkeypatch.setenv('NETRC', str(tmp_path/'netrc')); monkeypatch.setenv('HOME', str(tmp_path))
    for name, value in given.items(): monkeypatch.setenv(name, value)
    training._report_environment(replace(judged, report_to='wandb'))
    assert os.environ['WANDB_MODE'] == mode and os.environ['WANDB_DIR'] == judged.output_dir

def test_the_line_says_how_long_it_takes(monkeypatch):
    log = training.RunLog('run')
    log.start = (1000, 10)
    monkeypatch.setattr(training.time, 'time', lambda: 1000 + 20*90)
    state = type('State', (), dict(global_step=30, max_steps=100))
    assert log._line(dict(loss=.5), state) == 'step 30/100  loss 0.5  1:45:00 left' # 70 steps of 90 seconds
