"Runs as processes of their own: they outlive their launcher, fail loudly, stop and go on."
import errno, json, os, pwd, re, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from minicpmv_nb import jobs
from minicpmv_nb.batches import load_data
from minicpmv_nb.config import lora, read_status, save_config, write_json, write_status
from minicpmv_nb.jobs import Run, RunFailed, find_runs, launch
from minicpmv_nb.prompts import Processor
from minicpmv_nb.surviving import newest_checkpoint
from minicpmv_nb.training import known_report, train
from support import draw_data, free_port


@pytest.fixture
def cfg(tiny, drawn, tmp_path):
    "A LoRA run of two ranks under ZeRO-2 that would take a while."
    return lora(str(tiny), str(drawn), output_dir=str(tmp_path/'run'), use_cpu=True, gpus=2, fp16=False, deepspeed='ds_config_zero2.json', max_steps=4, save_steps=2,
        gradient_accumulation_steps=1, learning_rate=1e-3, dataloader_num_workers=0, tune_vision=False, report_to='none')

@pytest.fixture
def data_copy(tmp_path):
    "A data file that a test may spoil."
    (tmp_path/'data').mkdir()
    return draw_data(tmp_path/'data', 24)

def until(done, seconds=120):
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.1)

def steps(run)->list[int]: return [m['step'] for m in run.metrics() if 'loss' in m]


@pytest.mark.parametrize('name', ['../x', 'deep/er', '/x', '..', '.hidden'])
def test_the_name_of_a_run_is_no_path(cfg, name):
    with pytest.raises(ValueError, match='it is one folder below runs'): launch(replace(cfg, output_dir=None), name=name)

def test_a_run_outlives_the_process_that_launched_it(cfg, tmp_path):
    cfg = replace(cfg, max_steps=100, save_steps=100)
    launcher = subprocess.Popen([sys.executable, '-c', f'from minicpmv_nb import launch, Config; import time; launch({cfg!r}); print("launched", flush=True); time.sleep(600)'],
        stdout=subprocess.PIPE, text=True)
    while 'launched' not in (line := launcher.stdout.readline()): assert line
    run = Run.attach(cfg.output_dir)
    until(lambda: len(steps(run)) > 1)
    workers = [p for p in psutil.Process(run.status()['pid']).children() if 'minicpmv_nb.training' in ' '.join(p.cmdline())]
    assert len(workers) == 2
    sessions = {os.getsid(p.pid) for p in workers}
    assert os.getsid(launcher.pid) not in sessions # no signal to the launcher reaches them
    launcher.kill(); launcher.wait()
    assert all(p.is_running() for p in workers)
    run.wait(timeout=120)
    assert steps(run) == list(range(1, 101)) and (run.final/'adapter_model.safetensors').is_file()
    said = re.findall(r'rank (\d) of 2, process (\d+), .*?, ZeRO stage 2', run.log(1000)) # perhaps behind a progress bar of the other
    assert sorted(rank for rank, _ in said) == ['0', '1'] and {int(pid) for _, pid in said} == {p.pid for p in workers}

def test_stopped_and_resumed(cfg):
    run = launch(replace(cfg, max_steps=200, save_steps=2))
    until(lambda: newest_checkpoint(run.folder))
    processes = psutil.Process(run.status()['pid']).children(recursive=True)
    run.stop()
    assert run.status()['state'] == 'stopped' and not any(p.is_running() for p in processes)
    reached = int(newest_checkpoint(run.folder).name.split('-')[1])
    config = json.loads((run.folder/'config.json').read_text())
    (run.folder/'config.json').write_text(json.dumps(config | dict(max_steps=reached+2))) # so that the rest is short
    run.resume().wait(timeout=120)
    assert steps(run) == list(range(1, reached+3)) # nothing twice, nothing missing
    with pytest.raises(ValueError, match='is done: there is nothing to resume'): run.resume()

def test_a_killed_rank_fails_the_run_and_is_named(cfg):
    run = launch(replace(cfg, max_steps=500, save_steps=1000))
    until(lambda: steps(run))
    victim = [p for p in psutil.Process(run.status()['pid']).children() if 'minicpmv_nb.training' in ' '.join(p.cmdline())][1]
    victim.send_signal(signal.SIGKILL)
    with pytest.raises(RunFailed, match=rf'Rank 1 \(process {victim.pid}\) was ended by SIGKILL.*memory(.|\n)*Last lines of'): run.wait(timeout=90)
    assert run.status()['state'] == 'failed'
    with pytest.raises(ValueError, match='has no checkpoint yet'): run.resume()

def test_a_rank_that_raises_says_why(cfg, data_copy):
    run = launch(replace(cfg, data_path=str(data_copy), max_steps=500, save_steps=1000))
    for picture in data_copy.parent.glob('*.png'): picture.write_bytes(b'gone bad') # after the check, as a disk would do it
    with pytest.raises(RunFailed, match='is not a readable picture|cannot be read'): run.wait(timeout=90)

@pytest.mark.slow # test_scripts.py does the same with a script of the guide
def test_the_script_runs_by_hand(cfg, tmp_path):
    run = launch(replace(cfg, deepspeed=None, max_steps=1))
    run.wait(timeout=120)
    (run.folder/'status.json').unlink()
    other = subprocess.run(['bash', str(run.folder/'run.sh')], cwd='/', capture_output=True, text=True, timeout=120)
    assert other.returncode == 0, other.stdout[-2000:] + other.stderr[-2000:]
    assert run.status()['state'] == 'done'


def test_too_many_gpus_is_an_error(cfg):
    with pytest.raises(ValueError, match='64 GPUs are asked for and this machine has'): launch(replace(cfg, use_cpu=False), gpus=64)

def test_a_taken_port_is_an_error(cfg):
    with socket.socket() as s:
        s.bind(('', 0)); s.listen()
        with pytest.raises(ValueError, match='is taken'): launch(replace(cfg, master_port=s.getsockname()[1]))
    assert not Path(cfg.output_dir).exists() # nothing is left behind

def test_a_missing_model_is_an_error(cfg):
    with pytest.raises(FileNotFoundError, match='There is no folder /no/such/model'): launch(replace(cfg, model_name_or_path='/no/such/model'))

def test_bad_data_is_an_error_before_anything_starts(cfg, data_copy):
    entries = json.loads(data_copy.read_text()); entries[1]['image'] = 'gone.png'; data_copy.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match='gone.png does not exist'): launch(replace(cfg, data_path=str(data_copy)))

def test_a_wrong_llm_type_is_an_error(cfg):
    with pytest.raises(ValueError, match="llm_type is 'qwen'"): launch(replace(cfg, llm_type='qwen'))

def test_a_run_folder_is_never_reused(cfg):
    folder = Path(cfg.output_dir); folder.mkdir(); (folder/'config.json').write_text('{}')
    with pytest.raises(FileExistsError, match='holds a run already'): launch(cfg)

def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) # A disk

@pytest.mark.parametrize('step', ['write_json', 'save_config', 'write_script', '_note', '_share_config'])
def test_a_launch_that_cannot_write_leaves_nothing(cfg, tmp_path, monkeypatch, step):
    cfg = replace(cfg, output_dir=str(tmp_path/'deep'/'run'), nnodes=2, node_rank=1, master_addr='127.0.0.1')
    with monkeypatch.context() as m:
        m.setattr(jobs, step, full)
        with pytest.raises(OSError, match=r'deep/run could not be written; [\d,]+ MB are free there: .*No space left on device.*Make room'): launch(cfg, start=False)
        assert not (tmp_path/'deep').exists()
        m.setattr(jobs, step, lambda *_, **__: 1/0)
        with pytest.raises(ZeroDivisionError): launch(cfg, start=False) # any other fault
        assert not (tmp_path/'deep').exists()
    assert launch(cfg, start=False).status()['state'] == 'prepared'

def test_a_failed_launch_removes_only_what_it_wrote(cfg, monkeypatch):
    cfg = replace(cfg, nnodes=2, master_addr='127.0.0.1')
    first = launch(replace(cfg, node_rank=1), start=False)
    before = {p.name: p.read_bytes() for p in first.folder.iterdir()}
    assert json.loads(before['config.json'])['node_rank'] == 1 and not any('part' in name for name in before)
    for step in ('write_script', '_note', 'save_config'):
        monkeypatch.setattr(jobs, step, full)
        with pytest.raises(OSError, match='could not be written'): launch(replace(cfg, node_rank=0), start=False)
        assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == before # of machine 1
        monkeypatch.undo()
    zero = launch(replace(cfg, node_rank=0), start=False)
    assert Run.attach(zero.folder).node_rank == 0 and first.config.node_rank == 1
    zero.file('run.sh').unlink()
    Path(cfg.output_dir, 'run.sh').touch() # a launch that was quicker keeps its own
    with pytest.raises(FileExistsError, match='was taken by another launch'): jobs._write_folder(Run(first.folder), cfg, {}, dict(join_timeout=1))
    assert (first.folder/'run.sh').exists()

def test_a_shared_config_is_linked_or_copied(cfg, tmp_path, monkeypatch):
    run = Run(tmp_path, 1)
    save_config(replace(cfg, nnodes=2, node_rank=1), run.file('config.json'))
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, 'no links here')))
    jobs._share_config(run)
    assert (tmp_path/'config.json').read_bytes() == run.file('config.json').read_bytes()
    monkeypatch.undo()
    (tmp_path/'config.json').write_text('of machine 0')
    jobs._share_config(run)
    assert (tmp_path/'config.json').read_text() == 'of machine 0' and sorted(p.name for p in tmp_path.iterdir() if 'config' in p.name) == ['config-1.json', 'config.json']

def test_a_user_without_a_home(cfg, tmp_path, monkeypatch):
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[uid]) # as in a container
    monkeypatch.delenv('TORCH_EXTENSIONS_DIR', raising=False)
    with pytest.raises(ValueError, match='Set TORCH_EXTENSIONS_DIR to a folder'): launch(cfg)
    assert not Path(cfg.output_dir).exists()
    assert launch(replace(cfg, deepspeed=None), start=False).status()['state'] == 'prepared'
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path/'compiled'))
    run = launch(replace(cfg, output_dir=str(tmp_path/'other')), start=False)
    assert f'TORCH_EXTENSIONS_DIR={tmp_path}/compiled' in run.file('run.sh').read_text()

def test_a_home_that_cannot_be_written(cfg, tmp_path, monkeypatch):
    (tmp_path/'home').write_text('')
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.delenv('TORCH_EXTENSIONS_DIR', raising=False)
    with pytest.raises(ValueError, match='which cannot be written .*Set TORCH_EXTENSIONS_DIR'): launch(cfg)
    assert not Path(cfg.output_dir).exists()
    jobs._check_compiled(replace(cfg, deepspeed=None)) # compiles nothing
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path/'compiled'))
    jobs._check_compiled(cfg)

def test_the_folder_says_how_to_repeat_the_run(cfg):
    run = launch(cfg, start=False)
    kept = json.loads((run.folder/'config.json').read_text())
    assert kept['versions']['torch'] and len(kept['data_sha256']['data_path']) == 64
    report = json.loads((run.folder/'data_report.json').read_text())
    assert list(report.values())[0]['problems'] == []

def test_ranks_know_what_launch_found_in_the_data(cfg, data_copy):
    run = launch(replace(cfg, data_path=str(data_copy)), start=False)
    known = known_report(run.config, str(data_copy))
    assert (known.entries, known.kept, known.problems) == (24, 24, []) and known.tokens['longest'] > 0
    _, again = load_data(data_copy, Processor.from_folder(cfg.model_name_or_path), run.config.model_max_length, known=known)
    assert again is known # not measured
    other = dict(fingerprint='', new=1)
    for broken in ('', '[]', '{}', '{"entries": 24', json.dumps({str(data_copy): None}), json.dumps({str(data_copy): other})):
        run.file('data_report.json').write_text(broken)
        assert known_report(run.config, str(data_copy)) is None
    assert known_report(replace(run.config, nnodes=2, node_rank=1), str(data_copy)) is None

def test_half_a_character_in_an_id_does_not_stop_a_launch(cfg, data_copy):
    entries = json.loads(data_copy.read_text())
    entries[0] |= dict(id='\udc80', image='none.png')
    data_copy.write_text(json.dumps(entries))
    run = launch(replace(cfg, data_path=str(data_copy), bad_samples='skip'), start=False)
    assert known_report(run.config, str(data_copy)).problems[0].id == '\udc80'

def test_no_rank_outlives_torchrun(cfg):
    run = launch(replace(cfg, max_steps=500, save_steps=1000))
    until(lambda: steps(run))
    torchrun = psutil.Process(run.status()['pid'])
    ranks = [p for p in torchrun.children() if 'minicpmv_nb.training' in ' '.join(p.cmdline())]
    torchrun.kill()
    with pytest.raises(RunFailed): run.wait(timeout=60)
    assert not psutil.wait_procs(ranks, timeout=30)[1]

def test_a_later_failure_is_not_blamed_on_an_earlier_one(cfg, data_copy):
    run = launch(replace(cfg, data_path=str(data_copy), max_steps=500, save_steps=2))
    until(lambda: newest_checkpoint(run.folder))
    psutil.Process(run.status()['pid']).children()[0].kill()
    with pytest.raises(RunFailed, match='SIGKILL'): run.wait(timeout=60)
    for picture in data_copy.parent.glob('*.png'): picture.write_bytes(b'gone bad')
    with pytest.raises(RunFailed, match='rank . *: DataError'): run.resume().wait(timeout=90)

def test_waiting_for_a_stopped_run_says_so(cfg):
    run = launch(cfg).stop()
    with pytest.raises(RunFailed, match='was stopped at step 0. It has no checkpoint yet.'): run.wait()

@pytest.fixture
def running(cfg, tmp_path):
    "A run folder, and a process that stands for one that is at work there."
    process = subprocess.Popen(['sleep', '100'])
    run = launch(replace(cfg, output_dir=str(tmp_path/'at work')), start=False)
    (run.folder/'checkpoint-5').mkdir(); (run.folder/'checkpoint-5'/'trainer_state.json').write_text('{}')
    def say(state): write_status(run.folder, state, pid=process.pid, created=psutil.Process(process.pid).create_time(), host=socket.gethostname(), step=5, steps=9); return run
    yield say, process
    process.kill(); process.wait()

def test_a_run_that_still_saves_is_not_resumed(running):
    say, process = running
    run = say('stopped')
    with pytest.raises(ValueError, match=f'was told to stop, and process {process.pid} still saves'): run.resume()
    with pytest.raises(TimeoutError): run.wait(timeout=1)
    process.kill(); process.wait()
    with pytest.raises(RunFailed, match='was stopped at step 5. resume'): run.wait(timeout=5)

def test_a_second_copy_is_refused(running):
    say, process = running
    run = say('running')
    before = (run.folder/'status.json').read_text()
    second = subprocess.run(['bash', str(run.file('run.sh'))], capture_output=True, text=True, timeout=120)
    assert second.returncode and f'holds a run that is going on, as process {process.pid}' in second.stdout + second.stderr
    assert (run.folder/'status.json').read_text() == before and (run.folder/'checkpoint-5').is_dir()
    with pytest.raises(FileExistsError, match='holds a run that is going on'): train(run.config)

def test_a_port_that_was_taken_meanwhile_is_said(cfg):
    run = launch(cfg, start=False, master_port=free_port())
    run.file('log.txt').write_text('RuntimeError: The server socket has failed to listen on any local network address. port: 1, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use')
    assert run.cause().startswith(f'Port {run.config.master_port} was taken by something else') and 'master_port' in run.cause()
    run.file('log.txt').write_text('OSError: EADDRINUSE, says something else')
    assert 'was taken' not in run.cause()

def test_the_log_of_a_stopped_run_ends_with_what_was_saved(cfg):
    run = launch(cfg, start=False)
    ended = 'step 7/9\nstopped by a signal after step 7; resuming goes on from there\nTraceback (most recent call last):\n  File "x"\ntorch.distributed.elastic.multiprocessing.api.SignalException: Process 5 got signal: 15\n'
    run.file('log.txt').write_text(ended)
    assert run.log(1) == 'stopped by a signal after step 7; resuming goes on from there'
    run.file('log.txt').write_text(ended + 'resuming from checkpoint-7\n')
    assert run.log(1) == 'resuming from checkpoint-7' and 'SignalException' in run.log(2)

def test_checkpoints_of_something_else_are_left_alone(cfg):
    old = Path(cfg.output_dir)/'checkpoint-400'; old.mkdir(parents=True)
    with pytest.raises(FileExistsError, match='holds no run of this package'): launch(cfg)
    assert old.is_dir()
    with pytest.raises(FileExistsError, match='is a file, and a run needs a folder'): launch(replace(cfg, output_dir=str(cfg.data_path)))

def test_the_demo_deletes_only_its_own_folder(tmp_path):
    from minicpmv_nb.demo import demo
    (tmp_path/'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='was not made by the demo'): demo(tmp_path)
    assert (tmp_path/'thesis.txt').is_file()

def test_a_broken_status_file_is_survived(cfg):
    run = launch(cfg)
    (run.folder/'status.json').write_text('{"state": "run')
    assert run.status()['state'] == 'stopped' or run.status()['state'] in ('starting', 'running')
    until(lambda: run.status()['state'] == 'done')

@pytest.mark.parametrize('broken', [b'', b'[]', b'3', b'\xff\xfe', b'{"a"'])
def test_one_broken_file_hides_no_run(tmp_path, broken):
    for name in ('good', 'bad'): elsewhere(tmp_path/name, 5)
    (tmp_path/'bad'/'status.json').write_bytes(broken)
    assert {r.folder.name: r.status()['state'] for r in find_runs(tmp_path)} == dict(good='running', bad='stopped')
    assert read_status(tmp_path/'bad') == {}
    write_status(tmp_path/'bad', 'running')
    assert read_status(tmp_path/'bad')['state'] == 'running'
    (tmp_path/'bad'/'config.json').write_bytes(broken)
    assert [r.folder.name for r in find_runs(tmp_path)] == ['good']
    with pytest.raises(ValueError, match='config.json is broken.*Bring it back'): Run.attach(tmp_path/'bad')

def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    write_json(tmp_path/'status.json', dict(state='running'))
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='No space left'): write_json(tmp_path/'status.json', {})
    assert [p.name for p in tmp_path.iterdir()] == ['status.json'] and read_status(tmp_path) == dict(state='running')

def test_a_full_disk_is_a_cause(tmp_path, monkeypatch):
    run = elsewhere(tmp_path/'a', 700)
    assert run.cause().startswith('Nothing was printed.\n') or shutil.disk_usage(tmp_path).free < 16e6
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(100, 100, 0))
    assert re.match(r'Nothing was printed. The disk may have been full: 0.0 MB are free where .*/a is. Make room first.\n', run.cause())
    run.file('log.txt').write_text('loading\n')
    assert run.cause().startswith('A process ended without a word. The disk may have been full')
    write_status(run.folder, 'failed', error='ValueError: said')
    assert run.cause().startswith('ValueError: said\n')

@pytest.mark.parametrize('wrong, said', [(dict(cpus_per_task=-3), 'cpus_per_task is -3'), (dict(cpus_per_task=0), '1 or more'), (dict(cpus_per_task=2.5), 'number of cores'), (dict(partition=''), "partition is ''"), (dict(account=' '), "account is ' '")])
def test_what_slurm_would_refuse(tmp_path, wrong, said):
    run = elsewhere(tmp_path/'a', 700)
    with pytest.raises(ValueError, match=said): run.slurm(**wrong)
    assert not (run.folder/'job.sbatch').exists()

def test_what_the_data_check_found_is_printed(cfg, data_copy, capsys):
    entries = json.loads(data_copy.read_text()); entries[1]['image'] = 'gone.png'; del entries[2]['image']; entries[2]['conversations'][0]['content'] = 'Which colour?'
    data_copy.write_text(json.dumps(entries))
    run = launch(replace(cfg, data_path=str(data_copy), bad_samples='skip'), start=False)
    said = capsys.readouterr().out
    assert f'{data_copy}: 24 entries, 23 good, 1 bad; 1 without a picture' in said and 'gone.png does not exist' in said
    launch(cfg, output_dir=f'{run.folder}2', start=False)
    assert 'entries' not in capsys.readouterr().out # nothing to say

def test_locks_of_ended_processes_are_removed(tmp_path):
    # DeepSpeed's compiling waits for a lock file, forever if its owner was killed.
    from minicpmv_nb.surviving import clear_locks
    for name in ('dead', 'alive'): (tmp_path/name).mkdir(); (tmp_path/name/'lock').touch()
    with open(tmp_path/'alive'/'lock'): assert clear_locks(tmp_path) == [tmp_path/'dead'/'lock']
    assert (tmp_path/'alive'/'lock').exists() and not (tmp_path/'dead'/'lock').exists()
    assert clear_locks(tmp_path/'none') == []


# --- runs of other machines ------------------------------------------------------------------------------------------

def elsewhere(folder, heard:float, **also)->Run: # A run that another machine says it is doing, heard so many seconds ago
    (folder/'ranks').mkdir(parents=True)
    save_config(lora('model', 'train.json'), folder/'config.json')
    (folder/'status.json').write_text(json.dumps(dict(state='running', step=3, steps=9, pid=4_000_000, created=1.0, host='node17', heartbeat=time.time()-heard) | also))
    (folder/'ranks'/'rank-0.json').write_text(json.dumps(dict(rank=0, host='node17', time=time.time()-heard)))
    return Run.attach(folder)

def test_a_run_of_another_machine_is_running_while_it_is_heard(tmp_path):
    run = elsewhere(tmp_path/'a', 5)
    assert run.status()['state'] == 'running'
    with pytest.raises(ValueError, match='runs on node17: stop it there'): run.stop()
    with pytest.raises(ValueError, match='is running on node17. If that machine is gone, wait: after 10 minutes'): run.resume()
    assert elsewhere(tmp_path/'b', 700).status()['state'] == 'failed'
    assert elsewhere(tmp_path/'c', 5, host=socket.gethostname()).status()['state'] == 'failed' # here, and its process is gone

def test_a_slurm_job_that_was_killed_has_failed(tmp_path):
    assert elsewhere(tmp_path/'a', 5, slurm=True).status()['state'] == 'running'
    assert elsewhere(tmp_path/'b', 700, slurm=True).status()['state'] == 'failed'

def test_stop_does_not_end_the_process_that_asks(tmp_path):
    run = elsewhere(tmp_path/'a', 5, host=socket.gethostname(), pid=os.getpid(), created=psutil.Process().create_time())
    with pytest.raises(ValueError, match='trains in this very process'): run.stop()

def test_targets_that_match_nothing_are_refused_at_the_launch(tiny, drawn, tmp_path):
    how = dict(use_cpu=True, deepspeed=None, output_dir=str(tmp_path/'run'))
    with pytest.raises(ValueError, match='matches no linear layer'): launch(lora(str(tiny), str(drawn), lora_target_modules='foo', **how))
    with pytest.raises(ValueError, match='tune_resampler=False'): launch(lora(str(tiny), str(drawn), lora_target_modules='llm.attention resampler', **how))
    assert not (tmp_path/'run').exists()

def test_what_is_missing_is_said_before_the_model_is_fetched(tiny, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, 'resolve', lambda *_: pytest.fail('the model was looked up'))
    how = dict(use_cpu=True, output_dir=str(tmp_path/'run'))
    with pytest.raises(FileNotFoundError, match='data_path is nowhere.json'): launch(lora(str(tiny), 'nowhere.json', **how))
    with pytest.raises(FileNotFoundError, match='resume_from_checkpoint is nowhere, which is no checkpoint'): launch(lora(str(tiny), str(drawn), resume_from_checkpoint='nowhere', **how))
    with pytest.raises(ValueError, match='8 GPUs are asked for and this machine has 0. Launch it where they are'): launch(lora(str(tiny), str(drawn), output_dir=how['output_dir']), gpus=8)
    with pytest.raises(ValueError, match='gpus'): launch(lora(str(tiny), str(drawn), **how), gpus=0)
    with pytest.raises(ValueError, match='Did you mean cosine'): launch(lora(str(tiny), str(drawn), lr_scheduler_type='cosin', **how))
    assert not (tmp_path/'run').exists()
