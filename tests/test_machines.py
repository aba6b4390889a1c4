"Runs over several machines: two addresses of this one, or (slow) two network namespaces; and Slurm, played by two scripts."
import json, os, re, shutil, stat, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from minicpmv_nb.config import from_script, lora, write_json
from minicpmv_nb.jobs import Run, RunFailed, _extensions, fit_network, launch
from minicpmv_nb.surviving import alive, newest_checkpoint
from support import free_port


@pytest.fixture(scope='module')
def cfg(tiny, drawn):
    "One rank per machine; gloo is to use the loopback address of master_addr."
    return lora(str(tiny), str(drawn), use_cpu=True, gpus=1, fp16=False, deepspeed=None, max_steps=3, save_steps=2, gradient_accumulation_steps=1, learning_rate=1e-3,
        dataloader_num_workers=0, tune_vision=False, report_to='none')

@pytest.fixture(scope='module')
def one(cfg, tmp_path_factory):
    "The same run with both ranks on one machine."
    return launch(cfg, gpus=2, output_dir=str(tmp_path_factory.mktemp('one')/'run')).wait(timeout=180)

@pytest.fixture
def place(): return dict(nnodes=2, master_addr='127.0.0.2', master_port=free_port())

def numbers(run)->list: return [(m['step'], m['loss'], m['grad_norm']) for m in run.metrics() if 'loss' in m]

def from_step_2(runs):
    "As if all had been stopped behind their first checkpoint."
    for run in runs:
        until(lambda: not alive(json.loads(run.file('status.json').read_text())), 30)
        for gone in [run.final, *run.folder.glob('checkpoint-3')]: shutil.rmtree(gone, ignore_errors=True)
        write_json(run.file('status.json'), json.loads(run.file('status.json').read_text()) | dict(state='stopped'))
    for run in runs: run.resume()
    for run in runs: run.wait(timeout=240)

def assert_same(run, other):
    assert len(numbers(run)) == 3
    for mine, its in zip(numbers(run), numbers(other), strict=True): assert mine == pytest.approx(its, abs=1e-6)


def test_two_machines_learn_what_one_does(cfg, one, place, tmp_path):
    runs = [launch(cfg, node_rank=i, output_dir=str(tmp_path/str(i)), **place) for i in (0, 1)]
    assert {run.status()['state'] for run in runs} <= {'starting', 'running'}
    for run in runs: run.wait(timeout=180)
    assert [run.status()['state'] for run in runs] == ['done', 'done']
    assert_same(runs[0], one)
    assert re.findall(r'rank (\d) of 2, ', runs[1].log(500)) == ['1']
    assert Run.attach(tmp_path/'1').status()['state'] == 'done' # whoever asks
    assert (tmp_path/'1'/'exit-1').read_text() == '0\n'
    with pytest.raises(ValueError, match='numbers are written by machine 0'): runs[1].plot()

@pytest.mark.parametrize('also, said', [(dict(learning_rate=1e-1), "Machine 1 was told otherwise than machine 0: learning_rate '0.1' instead of '0.001'. Give all machines"), pytest.param(dict(max_steps=5, seed=7), "max_steps '5' instead of '3'; seed '7' instead of '42'", marks=pytest.mark.slow),
    pytest.param(dict(data_path='other'), 'data_path ', marks=pytest.mark.slow), (dict(resume_from_checkpoint='other'), "checkpoint 'checkpoint-2' instead of 'None'")])
def test_machines_that_were_told_otherwise(cfg, one, place, tmp_path, drawn, also, said):
    if 'data_path' in also:
        also = dict(data_path=str(drawn.with_name('fewer.json')))
        Path(also['data_path']).write_text(json.dumps(json.loads(drawn.read_text())[:-1]))
    if 'resume_from_checkpoint' in also: also = dict(resume_from_checkpoint=str(one.folder/'checkpoint-2'))
    runs = [launch(replace(cfg, **(also if i else {})), node_rank=i, output_dir=str(tmp_path/str(i)), **place) for i in (0, 1)]
    for run in runs:
        with pytest.raises(RunFailed): run.wait(timeout=180)
    assert said in runs[0].status()['error'] and not numbers(runs[0]) and not newest_checkpoint(runs[0].folder)

@pytest.mark.slow
def test_machines_make_up_for_an_evaluation_together(cfg, place, tmp_path, drawn):
    # Machine 1 has a copy of the checkpoint from before the evaluation was made, or, here, after it.
    cfg = replace(cfg, do_eval=True, eval_data_path=str(drawn), evaluation_strategy='steps', eval_steps=2, lora_dropout=0.0) # the random state of this checkpoint is that behind the evaluation
    runs = [launch(cfg, node_rank=i, output_dir=str(tmp_path/str(i)), **place) for i in (0, 1)]
    for run in runs: run.wait(timeout=180)
    before = numbers(runs[0]), [(m['step'], m['eval_loss']) for m in runs[0].metrics() if 'eval_loss' in m]
    kept = runs[0].folder/'checkpoint-2'
    shutil.copytree(kept, runs[1].folder/'checkpoint-2')
    state = json.loads((kept/'trainer_state.json').read_text())
    (kept/'trainer_state.json').write_text(json.dumps(state | dict(log_history=[e for e in state['log_history'] if 'eval_loss' not in e])))
    from_step_2(runs)
    assert (numbers(runs[0]), [(m['step'], m['eval_loss']) for m in runs[0].metrics() if 'eval_loss' in m]) == before

@pytest.mark.parametrize('how', [dict(deepspeed='ds_config_zero2.json'), pytest.param(dict(deepspeed='ds_config_zero3.json'), marks=pytest.mark.slow), pytest.param(dict(deepspeed=None), marks=pytest.mark.slow)], ids=lambda how: str(how['deepspeed']))
def test_machines_with_folders_of_their_own_go_on(cfg, place, tmp_path, how):
    "Machine 0 gets what the others write; copied to them, a checkpoint is whole, dropout and all."
    cfg = replace(cfg, lora_dropout=.1, **how)
    runs = [launch(cfg, node_rank=i, output_dir=str(tmp_path/str(i)), **place) for i in (0, 1)]
    for run in runs: run.wait(timeout=240)
    before, kept = numbers(runs[0]), runs[0].folder/'checkpoint-2'
    assert {f.name for f in kept.iterdir()} >= {'rng_state_0.pth', 'rng_state_1.pth', 'loss_0.json', 'loss_1.json'} and not list(kept.rglob('.*'))
    assert len(list(kept.glob('global_step*/*optim_states.pt'))) == (2 if cfg.deepspeed else 0)
    assert not list(runs[1].folder.glob('*checkpoint-*')) and not (runs[1].folder/'.saving').exists()
    shutil.copytree(kept, runs[1].folder/'checkpoint-2')
    left = runs[1].folder/'.saving'/'checkpoint-3'/'adapter_config.json' # of a save that was cut short, when this was machine 0
    left.parent.mkdir(parents=True); left.write_text('left')
    from_step_2(runs)
    assert numbers(runs[0]) == before and (runs[0].folder/'checkpoint-3'/'adapter_config.json').read_text() != 'left' and not left.exists()

def test_machines_that_are_too_few_for_a_checkpoint(cfg, place, tmp_path):
    folder = tmp_path/'checkpoint-2'; (folder/'global_step2').mkdir(parents=True)
    (folder/'trainer_state.json').write_text('{}')
    for rank in range(4): (folder/f'global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt').touch()
    runs = [launch(cfg, deepspeed='ds_config_zero2.json', resume_from_checkpoint=str(folder), node_rank=i, output_dir=str(tmp_path/str(i)), **place) for i in (0, 1)]
    with pytest.raises(RunFailed, match='cannot split it anew for 2: take machines that have 4 together'): runs[0].wait(timeout=180)
    runs[1].stop(timeout=5)

@pytest.mark.parametrize('size', [0, 2001])
def test_a_file_travels_in_blocks(size, tmp_path):
    "Between two processes over gloo; the file on machine 0 is there when it is whole."
    (tmp_path/'1').mkdir(); (tmp_path/'1'/'part of a file').write_bytes(os.urandom(size))
    code = """import sys, types; from pathlib import Path; import torch, torch.distributed as dist; from minicpmv_nb.training import FineTuner
dist.init_process_group('gloo'); rank = dist.get_rank()
me = types.SimpleNamespace(args=types.SimpleNamespace(process_index=rank, device='cpu'))
FineTuner._send_file(me, Path(sys.argv[1])/str(rank)/'part of a file', int(sys.argv[2]), 1, at_once=1000)"""
    env = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME='lo')
    both = [subprocess.Popen([sys.executable, '-c', code, tmp_path, str(size)], env=env | dict(RANK=str(i))) for i in (0, 1)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert (tmp_path/'0'/'part of a file').read_bytes() == (tmp_path/'1'/'part of a file').read_bytes() and len(list((tmp_path/'0').iterdir())) == 1

def test_machines_share_a_folder(cfg, one, place, tmp_path):
    shared = str(tmp_path/'shared')
    second = launch(cfg, node_rank=1, output_dir=shared, **place) # the order is nobody's business
    first = launch(cfg, node_rank=0, output_dir=shared, **place)
    with pytest.raises(FileExistsError, match='holds a run already'): launch(cfg, node_rank=1, output_dir=shared, **place)
    kept = {name: first.file(name).read_text() for name in ('config.json', 'run.sh')}
    first.wait(timeout=180); second.wait(timeout=180)
    assert_same(first, one)
    assert kept == {name: first.file(name).read_text() for name in kept}
    assert first.config.node_rank == 0 and second.config.node_rank == 1
    assert second.file('log.txt').name == 'log-1.txt' and 'rank 0 of 2' not in second.log(500) and 'rank 1 of 2' not in first.log(500)
    assert Run.attach(shared).node_rank == 0
    assert Run.attach(shared, 1).status() | dict(state='done', step=3, steps=3) == Run.attach(shared, 1).status()
    assert len(Run.attach(shared, 1).metrics()) == len(first.metrics())
    with pytest.raises(FileNotFoundError, match='machine 5 takes no part'): Run.attach(shared, 5)
    with pytest.raises(FileExistsError, match='holds a run already'): launch(cfg, node_rank=1, output_dir=shared, **place)

@pytest.mark.slow
def test_a_machine_is_stopped(cfg, place, tmp_path):
    many = replace(cfg, max_steps=500, save_steps=1000)
    runs = [launch(many, node_rank=i, output_dir=str(tmp_path/str(i)), **place) for i in (0, 1)]
    until(lambda: numbers(runs[0]))
    assert runs[1].status()['state'] == 'running'
    processes = psutil.Process(runs[1].status()['pid']).children(recursive=True)
    assert len(processes) > 1
    runs[1].stop()
    assert runs[1].status()['state'] == 'stopped' and not any(p.is_running() for p in processes)
    with pytest.raises(RunFailed, match='was stopped'): runs[0].wait(timeout=120) # all save and leave together
    with pytest.raises(ValueError, match='let them share the folder'): runs[1].resume()

@pytest.mark.slow
def test_machine_0_is_stopped(cfg, place, tmp_path):
    many = replace(cfg, max_steps=500, save_steps=1000)
    runs = [launch(many, node_rank=i, output_dir=str(tmp_path/'shared'), **place) for i in (0, 1)]
    until(lambda: numbers(runs[0]))
    runs[0].stop()
    with pytest.raises(RunFailed, match='was stopped'): runs[1].wait(timeout=120)
    reached = int(newest_checkpoint(runs[0].folder).name.split('-')[1])
    for run in runs:
        kept = json.loads(run.file('config.json').read_text())
        run.file('config.json').write_text(json.dumps(kept | dict(max_steps=reached+2)))
    for run in [run.resume() for run in runs]: run.wait(timeout=180)
    assert [m['step'] for m in runs[1].metrics() if 'loss' in m] == list(range(1, reached+3))

def test_a_machine_that_does_not_come(cfg, place, tmp_path):
    first = launch(cfg, node_rank=0, output_dir=str(tmp_path/'0'), join_timeout=3, **place)
    with pytest.raises(RunFailed, match=rf'Of 2 machines, 1 came to 127.0.0.2:{place["master_port"]} within 3 seconds. Launch the run on the others'): first.wait(timeout=90)
    second = launch(cfg, node_rank=1, output_dir=str(tmp_path/'1'), join_timeout=3, **place)
    with pytest.raises(RunFailed, match=rf'Machine 0 did not answer at 127.0.0.2:{place["master_port"]} within 3 seconds'): second.wait(timeout=90)
    assert second.status()['state'] == 'failed' and (tmp_path/'1'/'exit-1').read_text() != '0\n'


@pytest.mark.slow
def test_two_hosts(cfg, one, tmp_path):
    "Two network namespaces, each with an address of its own; needs root and iproute2."
    hosts, port = [f'mcpm{os.getpid()}{i}' for i in (0, 1)], 6001
    def ip(*args): subprocess.run(['ip', *args], check=True)
    try:
        for host in hosts: ip('netns', 'add', host); ip('-n', host, 'link', 'set', 'lo', 'up')
        ip('link', 'add', 'veth0', 'netns', hosts[0], 'type', 'veth', 'peer', 'name', 'veth1', 'netns', hosts[1])
        for i, host in enumerate(hosts): ip('-n', host, 'addr', 'add', f'10.77.0.{i+1}/24', 'dev', f'veth{i}'); ip('-n', host, 'link', 'set', f'veth{i}', 'up')
        for i, host in enumerate(hosts):
            call = f'from minicpmv_nb import launch, Config; launch(Config(**{asdict(cfg)!r}), output_dir={str(tmp_path/str(i))!r}, nnodes=2, node_rank={i}, master_addr="10.77.0.1", join_timeout=120)'
            subprocess.run(['ip', 'netns', 'exec', host, sys.executable, '-c', call], check=True)
        runs = [Run.attach(tmp_path/str(i)).wait(timeout=180) for i in (0, 1)]
    finally:
        for host in hosts: subprocess.run(['ip', 'netns', 'del', host])
    assert [(run.node_rank, run.status()['state']) for run in runs] == [(0, 'done'), (1, 'done')]
    assert_same(runs[0], one)
    for i, run in enumerate(runs): assert f'export GLOO_SOCKET_IFNAME=veth{i}' in run.file('run.sh').read_text().splitlines()


@pytest.mark.slow
def test_a_machine_whose_name_is_unknown(cfg, one, tmp_path):
    "torchrun would look it up for five minutes; needs root and util-linux."
    call = f'from minicpmv_nb import launch, Config; launch(Config(**{asdict(cfg)!r}), output_dir={str(tmp_path/"run")!r}, gpus=2).wait(timeout=120)'
    subprocess.run(['unshare', '--uts', 'sh', '-c', 'hostname nowhere.invalid && exec "$@"', 'sh', sys.executable, '-c', call], check=True)
    assert_same(Run.attach(tmp_path/'run'), one)


# --- what can be wrong before the start ------------------------------------------------------------------------------

def test_settings_are_replaced_by_name(cfg, tmp_path):
    with pytest.raises(TypeError, match="There is no setting 'node_rnk'. Did you mean node_rank?"): launch(cfg, output_dir=str(tmp_path/'run'), node_rnk=1)
    with pytest.raises(ValueError, match='node_rank is 2, but there are 2 machines'): launch(cfg, output_dir=str(tmp_path/'run'), nnodes=2, node_rank=2)
    with pytest.raises(ValueError, match='2 machines cannot meet at localhost.*Set master_addr'): launch(cfg, output_dir=str(tmp_path/'run'), nnodes=2)
    assert not (tmp_path/'run').exists()

def test_the_port_of_the_guide(cfg): assert fit_network(replace(cfg, nnodes=2, master_addr='10.77.0.1')).master_port == 6001

def test_another_run_is_not_joined(cfg, place, tmp_path):
    prepared = launch(cfg, output_dir=str(tmp_path/'run'), start=False, **place)
    assert prepared.status()['state'] == 'prepared'
    with pytest.raises(FileExistsError, match='holds a run already'): launch(cfg, output_dir=str(tmp_path/'run'), start=False, node_rank=1, **place | dict(nnodes=3))
    assert launch(cfg, output_dir=str(tmp_path/'run'), start=False, node_rank=1, **place).file('run.sh').name == 'run-1.sh'

def test_nccl_switches_and_interfaces(cfg, tmp_path, monkeypatch):
    for name in ('NCCL_P2P_DISABLE', 'NCCL_IB_DISABLE', 'GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME'): monkeypatch.delenv(name, raising=False)
    def exports(name, **changes):
        run = launch(cfg, output_dir=str(tmp_path/name), start=False, **changes)
        return [line.removeprefix('export ') for line in run.file('run.sh').read_text().splitlines() if 'NCCL' in line or 'GLOO' in line]
    assert exports('none') == []
    assert exports('p2p', nccl_p2p_disable=True) == ['NCCL_P2P_DISABLE=1']
    assert exports('both', nccl_p2p_disable=True, nccl_ib_disable=True) == ['NCCL_P2P_DISABLE=1', 'NCCL_IB_DISABLE=1']
    assert exports('lo', nnodes=2, master_addr='127.0.0.1') == ['GLOO_SOCKET_IFNAME=lo']
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'eth7'); monkeypatch.setenv('NCCL_SOCKET_IFNAME', 'ib0')
    assert exports('mine', nnodes=2, master_addr='127.0.0.1') == ['GLOO_SOCKET_IFNAME=eth7', 'NCCL_SOCKET_IFNAME=ib0']

@pytest.mark.parametrize('lines,found', [('', (False, False)), ('export NCCL_P2P_DISABLE=1 # no A100\n', (True, False)), ('export NCCL_P2P_DISABLE=1\nexport NCCL_IB_DISABLE=1\n', (True, True)), ('export NCCL_IB_DISABLE=0\n', (False, False))])
def test_nccl_switches_of_a_script(tmp_path, lines, found):
    (tmp_path/'finetune.sh').write_text(f'{lines}torchrun --nnodes 2 --node_rank 1 --master_addr 10.77.0.1 --master_port 6001 finetune.py --model_name_or_path m --data_path d.json\n')
    cfg = from_script(tmp_path/'finetune.sh')
    assert (cfg.nccl_p2p_disable, cfg.nccl_ib_disable) == found
    assert (cfg.nnodes, cfg.node_rank, cfg.master_addr, cfg.master_port) == (2, 1, '10.77.0.1', 6001)


# --- prepared, and Slurm ---------------------------------------------------------------------------------------------

def test_prepared_and_started(cfg, tmp_path):
    run = launch(cfg, output_dir=str(tmp_path/'run'), max_steps=1, start=False)
    assert run.status()['state'] == 'prepared' and not run.log()
    with pytest.raises(ValueError, match='is not started yet'): run.wait()
    run.start().wait(timeout=120)
    with pytest.raises(ValueError, match='is done: only a prepared run'): run.start()

def test_gpus_of_another_machine(cfg, tmp_path):
    run = launch(cfg, gpus=8, use_cpu=False, bf16=True, output_dir=str(tmp_path/'run'), start=False)
    assert run.config.gpus == 8 and run.config.bf16
    if not shutil.which('nvidia-smi'):
        with pytest.raises(ValueError, match='8 GPUs are asked for and this machine has 0'): run.start()

@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "srun and scontrol of a cluster of up to two nodes, both of which are this machine."
    tools = tmp_path/'bin'; tools.mkdir()
    (tools/'scontrol').write_text('#!/bin/bash\n[ "$1 $2 $3" = "show hostnames n[0-1]" ] && printf "127.0.0.1\\nn1\\n"\n')
    (tools/'srun').write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nfor i in $(seq 0 $((SLURM_NNODES-1))); do SLURM_NODEID=$i "$@" & all="$all $!"; done\nfor p in $all; do wait $p || code=$?; done\nexit ${code:-0}\n')
    for tool in tools.iterdir(): tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    def sbatch(file, nodes):
        env = os.environ | dict(PATH=f'{tools}{os.pathsep}{os.environ["PATH"]}', SLURM_JOB_NODELIST='n[0-1]', SLURM_NNODES=str(nodes), SLURM_CPUS_PER_TASK='1')
        with open(file.parent/'log.txt', 'ab') as log: return subprocess.Popen(['bash', str(file)], env=env, stdout=log, stderr=log, start_new_session=True)
    return sbatch

def until(done, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.1)

def test_slurm_starts_and_goes_on(cfg, cluster, tmp_path):
    run = launch(cfg, output_dir=str(tmp_path/'a run of 100%'), max_steps=500, save_steps=1000, start=False)
    file = run.slurm(partition='a100')
    assert subprocess.run(['bash', '-n', str(file)]).returncode == 0
    assert run.status()['state'] == 'prepared'
    job = cluster(file, 1)
    until(lambda: len(numbers(run)) > 2)
    assert run.status()['state'] == 'running'
    with pytest.raises(ValueError, match='end it with scancel'): run.stop()
    with pytest.raises(ValueError, match='is running: prepare a new run'): run.slurm()
    torchrun = psutil.Process(run.status()['pid'])
    for p in (torchrun.parent(), torchrun): p.terminate() # as two minutes before the time limit
    job.wait(120)
    assert run.status()['state'] == 'stopped', run.log(50)
    reached = int(newest_checkpoint(run.folder).name.split('-')[1])
    assert reached == run.status()['step']
    (run.folder/'config.json').write_text(json.dumps(json.loads((run.folder/'config.json').read_text()) | dict(max_steps=reached+2)))
    assert cluster(run.slurm(), 1).wait(240) == 0, run.log(50)
    assert run.status()['state'] == 'done' and (run.final/'adapter_model.safetensors').is_file()
    assert f'resuming from {run.folder}/checkpoint-{reached}' in run.log(500)
    assert [m['step'] for m in run.metrics() if 'loss' in m] == list(range(1, reached+3))

@pytest.mark.slow
def test_slurm_with_two_nodes(cfg, one, cluster, tmp_path):
    run = launch(cfg, output_dir=str(tmp_path/'run'), nnodes=2, master_port=free_port(), start=False)
    assert cluster(run.slurm(), 2).wait(240) == 0, run.log(50)
    assert_same(run, one)
    assert [(run.folder/f'exit-{i}').read_text() for i in (0, 1)] == ['0\n', '0\n']

def test_slurm_failure_is_seen(cfg, cluster, tmp_path):
    run = launch(cfg, output_dir=str(tmp_path/'run'), start=False)
    file = run.slurm()
    (run.folder/'node.sh').write_text((run.folder/'node.sh').read_text().replace('--learning_rate 0.001', '--learning_rate much'))
    assert cluster(file, 1).wait(120) != 0
    assert (run.folder/'exit-0').read_text() != '0\n'
    (run.folder/'status.json').write_text(json.dumps(dict(state='running', slurm=True))) # what the first rank writes before something goes wrong
    assert run.status()['state'] == 'failed'
    with pytest.raises(RunFailed, match='Root Cause'): run.wait()
    assert "--learning_rate is 'much': expected float" in run.log(500)

def test_what_the_job_asks_for(cfg, tmp_path):
    run = launch(cfg, gpus=8, use_cpu=False, nnodes=4, output_dir=str(tmp_path/'run'), dataloader_num_workers=2, start=False)
    lines = run.slurm('2-12', 'a100', account="it's; me", extra=['--qos=high']).read_text().splitlines()
    for option in ('--nodes=4', '--ntasks-per-node=1', '--gres=gpu:8', '--cpus-per-task=24', '--time=2-12', '--partition=a100', """--account='it'"'"'s; me'""", '--signal=TERM@120', '--requeue', '--qos=high'):
        assert f'#SBATCH {option}' in lines
    code = [line for line in lines if not line.startswith('#')]
    assert len(code) == 4 and 'me' not in ''.join(code).split() # values are in comments only
    script = (run.folder/'node.sh').read_text()
    assert code[-1].startswith('srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ') # which srun does not take from the job
    assert 'TERM@900' in run.slurm(save_seconds=900).read_text() and 'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900\n' in (run.folder/'node.sh').read_text()
    assert script.count('--node_rank "$SLURM_NODEID"') == 2 and script.count('--master_addr "$MASTER_ADDR"') == 2 and '--resume_from_checkpoint auto' in script

@pytest.mark.parametrize('wrong,said', [(dict(account='a\nrm -rf x'), 'account is'), (dict(partition='a\0b'), 'partition is'), (dict(time='soon'), "time is 'soon'"), (dict(save_seconds=0), 'save_seconds is 0'), (dict(extra=['rm -rf x']), 'options of sbatch look like'), (dict(extra=['--a\nb']), 'options of sbatch look like')])
def test_values_that_are_no_options(cfg, tmp_path, wrong, said):
    run = launch(cfg, output_dir=str(tmp_path/'run'), start=False)
    with pytest.raises(ValueError, match=said): run.slurm(**wrong)
    assert not (run.folder/'job.sbatch').exists()

def test_each_node_compiles_for_itself(cfg, tmp_path, monkeypatch):
    monkeypatch.delenv('TORCH_EXTENSIONS_DIR', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path/"a user's home"))
    run = launch(cfg, deepspeed='ds_config_zero2.json', output_dir=str(tmp_path/'run'), start=False)
    run.slurm()
    line = next(l for l in (run.folder/'node.sh').read_text().splitlines() if 'TORCH_EXTENSIONS_DIR' in l)
    hostname = tmp_path/'bin'/'hostname'
    hostname.parent.mkdir(); hostname.write_text('#!/bin/bash\necho another-node\n'); hostname.chmod(0o755)
    said = subprocess.run(['bash', '-c', f'{line}; echo "$TORCH_EXTENSIONS_DIR"'], env=os.environ | dict(PATH=f'{hostname.parent}{os.pathsep}{os.environ["PATH"]}'), capture_output=True, text=True).stdout.strip()
    assert said == str(_extensions('another-node')) and "a user's home" in said

def test_one_job_for_all_machines(cfg, place, tmp_path):
    run = launch(cfg, output_dir=str(tmp_path/'run'), node_rank=1, start=False, **place)
    with pytest.raises(ValueError, match='One job starts all machines'): run.slurm()
