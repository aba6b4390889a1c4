"The command line: what each command prints, where, and with which exit code. Mostly through real processes."
import json, os, pty, re, signal, subprocess, sys, time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from minicpmv_nb import command, run_panel
from minicpmv_nb.command import COMMANDS, configure, converse, docments, flag_text, main, overview, progress, progress_line, run_table
from minicpmv_nb.config import Config, check_batch, deepspeed_json, full, load_config, lora, qlora, save_config, write_json
from minicpmv_nb.jobs import Run
from minicpmv_nb.run_panel import Follower
from support import QUESTION, draw_data, entry, flags, talk, write_data

SMALL = dict(use_cpu='true', gpus=1, gradient_accumulation_steps=1, per_device_train_batch_size=2, dataloader_num_workers=0, tune_vision='false', lora_r=4, report_to='none', fp16='false', deepspeed='none', max_steps=3)

def run(*args, folder='.', **how):
    "The command in a process of its own, with pipes."
    return subprocess.run([sys.executable, '-m', 'minicpmv_nb', *map(str, args)], cwd=folder, capture_output=True, text=True, stdin=how.pop('stdin', subprocess.DEVNULL) if 'input' not in how else None, **how)

def base(tiny, drawn): return '--model_name_or_path', tiny, '--data_path', drawn

def asked(*argv, **own):
    a = Namespace(**dict(method=None, script=None, config=None, recommended=False) | own)
    return configure(a, ['--model_name_or_path', 'm', '--data_path', 'd', *argv])


# --- help ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words', [['--help'], *([name, option] for name in COMMANDS for option in ('--help', '--help_all') if option == '--help' or COMMANDS[name].flags)], ids=' '.join)
@pytest.mark.parametrize('columns', [80, 200])
def test_help(words, columns, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    assert main(words) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= min(columns, 100) and 'examples:' in said and '`' not in said and 'None' not in re.findall(r'\[(.*?)\]', said)

def test_every_command_is_in_the_overview(): assert re.findall(r'^  (\w+) {2,}', overview(), re.M) == ['demo', 'check', 'train', 'slurm', 'watch', 'merge', 'quantize', 'chat', 'estimate', 'doctor'] == list(COMMANDS)

def test_every_argument_is_explained(monkeypatch):
    for name in COMMANDS:
        for action in command._parser(name)._actions: assert action.help, (name, action.dest)

def test_help_has_the_words_of_the_functions(capsys):
    import minicpmv_nb.quantizing
    does, means = docments('quantizing', 'quantize')
    assert minicpmv_nb.quantizing.quantize.__doc__.startswith(does) and list(means) == ['src', 'out', 'vision', 'device']
    main(['quantize', '--help'])
    assert ' '.join(means['vision'].split()) in ' '.join(capsys.readouterr().out.split())

def test_all_flags_of_the_configuration(): assert re.findall(r'^  --(\w+)', flag_text(everything=True), re.M) == list(vars(lora('m', 'd')))

def test_console_script():
    from importlib.metadata import entry_points
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['='])
    ini.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
    assert ini['DEFAULT']['console_scripts'] == 'minicpmv_nb=minicpmv_nb.command:main'

def test_version(capsys):
    from minicpmv_nb import __version__
    assert main(['--version']) == 0 and capsys.readouterr().out == f'{__version__}\n'

@pytest.mark.parametrize('module', ['demo', 'chat', 'diagnosis', 'training'])
def test_modules_still_run(module): assert 'usage' in subprocess.run([sys.executable, '-m', f'minicpmv_nb.{module}', '--help'], capture_output=True, text=True, check=True).stdout


# --- errors and exit codes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('python, typed', [
    ('train on the others with bad_samples="skip".', 'train on the others with --bad_samples skip.'),
    ('Set gpus=1, or use_cpu=True to run 8 processes.', 'Set --gpus 1, or --use_cpu True to run 8 processes.'),
    ("or go on with Run.attach('/a b/r').resume().", "or go on with minicpmv_nb watch '/a b/r' --resume."),
    ('no_field=1 and nothing else', 'no_field=1 and nothing else')])
def test_fixes_are_spelled_for_the_terminal(python, typed): assert command._as_typed(python) == typed

@pytest.mark.parametrize('words, code, said', [
    (['check', 'nowhere.json'], 1, 'error: There is no data file nowhere.json.'),
    (['chekc'], 2, "minicpmv_nb: There is no command 'chekc'. Did you mean check?"),
    (['check'], 2, 'the following arguments are required: DATA'),
    (['check', 'd.json', '--max_slice_nums', '4'], 2, '--max_slice_nums and --model_max_length need --model'),
    (['train', '--model_name_or_path', 'm', '--data_path', 'd'], 2, 'Say what trains: --method lora, qlora or full'),
    (['train', '--method', 'lora', '--learnin_rate', '1'], 2, 'There is no flag --learnin_rate. Did you mean learning_rate?'),
    (['train', '--method', 'lora', '--data_path', 'd'], 2, '--model_name_or_path is missing.'),
    (['train', '--method', 'lora', '--script', 's'], 2, 'not allowed with argument --method'),
    (['train', '--script', 'nowhere.sh'], 1, 'error: nowhere.sh: No such file or directory.'),
    (['train', 'stray', '--method', 'lora'], 2, "'stray' is not a flag"),
    (['doctor', '--gpus', '0'], 2, '--gpus must be positive'),
    (['watch', '--stop'], 2, 'say which run'),
    (['chat', 'm', '--picture', 'nowhere.png', 'What?'], 1, 'error: The picture nowhere.png does not exist.')])
def test_one_sentence(words, code, said, tmp_path):
    done = run(*words, folder=tmp_path)
    assert done.returncode == code and said in ' '.join(done.stderr.split()) and 'Traceback' not in done.stderr and done.stdout == ''
    assert code == 2 or len(done.stderr.splitlines()) == 1

def test_debug_shows_the_traceback(tmp_path):
    for words in (['check', 'nowhere.json', '--debug'], ['--debug', 'check', 'nowhere.json']):
        done = run(*words, folder=tmp_path)
        assert done.returncode == 1 and 'Traceback' in done.stderr and 'There is no data file nowhere.json.' in done.stderr

def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def work(a, rest, p): return {}['bug']
    monkeypatch.setitem(COMMANDS, 'check', replace(COMMANDS['check'], work=work))
    with pytest.raises(KeyError): main(['check', 'd.json'])

def test_a_package_that_is_missing(monkeypatch, capsys):
    def work(a, rest, p): import nothing_of_that_name
    monkeypatch.setitem(COMMANDS, 'check', replace(COMMANDS['check'], work=work))
    assert main(['check', 'd.json']) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: No module named 'nothing_of_that_name'.") and 'pip check' in said

def test_no_command(capsys): assert main([]) == 2 and capsys.readouterr().out == overview() + '\n'

def test_interrupted(monkeypatch, capsys):
    def work(a, rest, p): os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
    monkeypatch.setitem(COMMANDS, 'check', replace(COMMANDS['check'], work=work))
    assert main(['check', 'd.json']) == 130 and capsys.readouterr() == ('', '')

def test_reader_that_has_gone(drawn):
    done = subprocess.run(f'{sys.executable} -m minicpmv_nb check {drawn} --json | head -1', shell=True, capture_output=True, text=True)
    assert done.stdout == '{\n' and done.stderr == ''


# --- check -----------------------------------------------------------------------------------------------------------

def test_check(drawn, tmp_path):
    done = run('check', drawn)
    assert done.returncode == 0 and done.stdout.startswith(f'{drawn}: 24 entries, 24 good, 0 bad') and done.stderr == ''

def test_check_finds_what_is_wrong(tmp_path):
    data = write_data(tmp_path, [entry('a'), entry('b', image='lost.png'), entry('c', conversations=talk()[:1])])
    done, as_json = run('check', data), run('check', data, '--json')
    assert done.returncode == as_json.returncode == 1 and '3 entries, 1 good, 2 bad' in done.stdout and 'entry 1 (id b): The picture' in done.stdout
    assert [r['id'] for r in json.loads(as_json.stdout)['problems']] == ['b', 'c']

def test_check_against_a_checkpoint(drawn, tiny):
    done = run('check', drawn, '--model', tiny, '--max_slice_nums', '4')
    longest = int(re.search(r'tokens per sample: longest (\d+)', done.stdout)[1])
    assert done.returncode == 0, done.stderr
    short = run('check', drawn, '--model', tiny, '--max-slice-nums', '4', '--model_max_length', longest-1)
    assert short.returncode == 1 and f'{longest} tokens' in short.stdout
    none = run('check', drawn, '--model', tiny, '--model_max_length', 5)
    assert none.returncode == 1 and '24 entries, 0 good' in none.stdout and none.stderr == ''


# --- what was asked for ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method, preset', [('lora', lora), ('qlora', qlora), ('full', full)])
def test_methods_are_the_presets(method, preset):
    assert asked(method=method) == preset('m', 'd')
    assert asked('--eval_data_path', 'e', method=method) == preset('m', 'd', 'e')

def test_flags_are_stronger():
    cfg = asked('--learning_rate', '1e-6', '--max_steps', '-1', '--deepspeed', 'none', method='lora', recommended=True)
    assert (cfg.learning_rate, cfg.max_steps, cfg.deepspeed, cfg.lora_alpha) == (1e-6, -1, None, 128)

def test_plain_flags_are_those_of_the_guide(): assert asked('--use_lora', 'true') == Config('m', 'd', use_lora=True)

def test_better_values_for_flags_of_the_guide(): assert asked('--use_lora', 'true', '--learning_rate', '1e-6', recommended=True).learning_rate == 1e-4

def test_from_a_script(tmp_path):
    (tmp_path/'s.sh').write_text('GPUS=4\ntorchrun --nproc_per_node $GPUS finetune.py --model_name_or_path x --data_path y --use_lora true --tune_llm false --lora_r 7\n')
    cfg = asked('--lora_r', '9', script=str(tmp_path/'s.sh'))
    assert (cfg.model_name_or_path, cfg.gpus, cfg.use_lora, cfg.lora_r) == ('m', 4, True, 9)

def stored(folder, **changes):
    "The config.json of a run, beside its own copy of DeepSpeed's configuration."
    cfg = lora('x', 'y', output_dir=str(folder), **changes)
    write_json(folder/'deepspeed.json', deepspeed_json(cfg))
    save_config(replace(cfg, deepspeed=str(folder/'deepspeed.json')), folder/'config.json')
    return str(folder/'config.json')

def test_a_copy_of_our_deepspeed_file_follows_the_flags(tmp_path):
    cfg = asked('--per_device_train_batch_size', '1', '--max_grad_norm', '0.5', '--offload', 'optimizer', config=stored(tmp_path))
    check_batch(replace(cfg, gpus=1)) # would complain about the file of the earlier run
    ours = deepspeed_json(cfg)
    assert cfg.deepspeed == 'ds_config_zero3.json' and ours['gradient_clipping'] == .5 and 'offload_optimizer' in ours['zero_optimization']

def test_a_deepspeed_file_of_the_user_stays(tmp_path):
    config = stored(tmp_path)
    write_json(tmp_path/'deepspeed.json', dict(zero_optimization=dict(stage=2), steps_per_print=7))
    assert asked(config=config).deepspeed == str(tmp_path/'deepspeed.json')

def test_what_a_run_has_switched_off_stays_off(tmp_path): assert asked(config=stored(tmp_path, save_total_limit=None)).save_total_limit is None

def test_from_a_run(tmp_path):
    save_config(lora('x', 'y', output_dir='runs/first', lora_r=7), tmp_path/'config.json', versions={})
    assert asked(config=str(tmp_path/'config.json')) == asked(config=str(tmp_path)) == lora('m', 'd', lora_r=7)
    for text in ('{', '[]', '{"a": 1}'):
        (tmp_path/'config.json').write_text(text)
        with pytest.raises(ValueError, match='is no configuration'): asked(config=str(tmp_path/'config.json'))


# --- how far a run is ------------------------------------------------------------------------------------------------

def made_up(folder, state='running', step=12, steps=40, times=None):
    "A run folder that nothing runs in."
    folder.mkdir(parents=True, exist_ok=True)
    save_config(lora('m', 'd', output_dir=str(folder)), folder/'config.json')
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(step=s+1, loss=2-s/100, time=t)) + '\n' for s, t in enumerate(times or [2.0*s for s in range(step)])))
    write_json(folder/'status.json', dict(state=state, step=step, steps=steps, heartbeat=time.time()))
    return Run.attach(folder)

def test_progress(tmp_path):
    p = progress(made_up(tmp_path/'r', 'done'))
    assert p == dict(state='done', step=12, steps=40, loss=1.89)

def test_the_panel_and_the_command_say_the_same_time(tmp_path, monkeypatch):
    begun = time.time() - 24
    r = made_up(tmp_path/'r', times=[begun-9000, begun-8999] + [begun+2*s for s in range(1, 11)]) # a break, then a step in two seconds
    status = dict(state='running', step=12, steps=40, created=begun, heartbeat=time.time())
    monkeypatch.setattr(Run, 'status', lambda self: status)
    left, follower = progress(r)['left'], Follower(r.folder)
    assert left == pytest.approx(2*28 - 4, abs=1) and left == pytest.approx(run_panel.progress(status, r.metrics(), time.time())['eta'], abs=1)
    assert progress(r, follower)['loss'] == 1.89 and follower.offset == (r.folder/'metrics.jsonl').stat().st_size # and reads on from there

def test_a_prepared_run_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made_up(tmp_path/'runs'/'mine', 'prepared', 0)
    assert main(['watch', 'mine']) == 1
    assert capsys.readouterr().err == 'runs/mine is prepared, not started. To start it: minicpmv_nb watch runs/mine --start\n'
    monkeypatch.setattr(Run, 'start', lambda self: write_json(self.folder/'status.json', dict(state='done', step=40, steps=40, heartbeat=time.time())))
    assert main(['watch', 'runs/mine', '--start']) == 0 and capsys.readouterr().out.splitlines()[-1] == 'done: runs/mine/final'

def test_a_run_is_prepared_for_a_cluster(tiny, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['train', *map(str, base(tiny, drawn)), *'--method lora --gpus 8 --nnodes 2 --name big --prepare'.split()]) == 0
    assert Run.attach('runs/big').status()['state'] == 'prepared' and capsys.readouterr().out.splitlines()[-1] == 'run folder: runs/big'
    assert main(['slurm', 'big', *'--partition a100 --time 2-00 --save_seconds 600 --extra=--qos=high --extra=--exclusive'.split()]) == 0
    job = Path('runs/big/job.sbatch').read_text().splitlines()
    assert capsys.readouterr().out.endswith('sbatch runs/big/job.sbatch\n')
    assert {f'#SBATCH --{option}' for option in ('nodes=2', 'gres=gpu:8', 'partition=a100', 'time=2-00', 'signal=TERM@600', 'qos=high', 'exclusive')} <= set(job)
    assert main(['train', *map(str, base(tiny, drawn)), '--method', 'lora', '--prepare']) == 2 and '--gpus 8' in capsys.readouterr().err
    assert main(['slurm', 'big', '--time', 'soon']) == 1 and "time is 'soon'" in capsys.readouterr().err

@pytest.mark.parametrize('make', [Path.mkdir, Path.touch])
def test_a_run_comes_before_another_thing_of_its_name(tmp_path, monkeypatch, capsys, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path/'mine')
    assert main(['watch', 'mine']) == 1 and 'There is no run mine, neither here nor below runs.' in capsys.readouterr().err
    made_up(tmp_path/'runs'/'mine', 'done')
    assert main(['watch', 'mine']) == 0 and capsys.readouterr().out.splitlines()[-1] == 'done: runs/mine/final'

def test_nothing_is_known_yet(tmp_path):
    r = made_up(tmp_path/'r', 'stopped', step=0)
    write_json(r.folder/'status.json', dict(state='stopped'))
    assert progress(r) == dict(state='stopped') and progress_line(progress(r)) == 'stopped'

def test_line():
    assert progress_line(dict(state='running', step=12, steps=40, loss=.53214, eval_loss=1.0, left=3675.4)) == 'running  [######..............]  step 12 of 40  loss 0.5321  eval_loss 1  1:01:15 left'
    assert 'left' not in progress_line(dict(state='done', step=40, steps=40, left=0.0))
    assert progress_line(dict(state='running', step=1, steps=2, left=90_000.0)).endswith('25:00:00 left')

def test_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_table([made_up(tmp_path/'runs'/'a', 'done'), made_up(tmp_path/'runs'/'long-name', 'stopped', 1)])
    assert [line.split('  ')[0] for line in found.splitlines()] == ['run', 'runs/a', 'runs/long-name'] and '12 of 40' in found


# --- a conversation --------------------------------------------------------------------------------------------------

def test_converse(tmp_path):
    write_data(tmp_path, [entry()])
    asked, said = [], []
    class Stand:
        def chat(self, pictures, question, talk, system, **how):
            if question == 'too long': raise ValueError('The question is too long.')
            asked.append((len(pictures or []), question, talk, system, how)); return f'answer {len(asked)}', (talk or 0)+1
    converse(Stand(), ['one', '', f'/picture {tmp_path}/dot.png', 'two', '/picture lost.png', '/nonsense', 'too long', 'three', '/new', 'four', '/quit', 'five'], [f'{tmp_path}/dot.png'], 'Be brief.', said.append, max_new_tokens=3)
    assert asked == [(1, 'one', None, 'Be brief.', dict(max_new_tokens=3)), (1, 'two', 1, None, dict(max_new_tokens=3)), (0, 'three', 2, None, dict(max_new_tokens=3)), (0, 'four', None, 'Be brief.', dict(max_new_tokens=3))]
    assert said == ['answer 1', 'answer 2', 'error: The picture lost.png does not exist.', command.WORDS, 'error: The question is too long.', 'answer 3', 'answer 4']


# --- each command on a tiny checkpoint -------------------------------------------------------------------------------

def test_estimate(tiny, drawn):
    done = run('estimate', '--method', 'lora', *base(tiny, drawn), '--gpus', 4)
    assert done.returncode == 0 and 'GB on each of 4 GPUs' in done.stdout and 'the heaviest of the 24 samples' in done.stdout and done.stderr == ''

def test_estimate_without_data(tiny):
    done = run('estimate', '--method', 'lora', '--model_name_or_path', tiny)
    assert done.returncode == 0 and 'no data file was given' in done.stdout
    lost = run('estimate', '--method', 'lora', '--model_name_or_path', tiny, '--data_path', 'lost.json')
    assert lost.returncode == 1 and 'There is no data file lost.json.' in lost.stderr

def test_doctor(tiny, tmp_path):
    machine, folder, none = run('doctor'), run('doctor', tiny, '--gpus', 4), run('doctor', tmp_path)
    assert machine.returncode == 0 and machine.stdout.startswith('this machine: nothing is wrong') and machine.stderr == ''
    assert folder.returncode == 0 and 'GB on each of 4 GPUs' in folder.stdout
    assert none.returncode == 1 and 'wrong  folder' in none.stdout or 'wrong  config.json' in none.stdout

def test_quantize(tiny, tmp_path):
    done = run('quantize', tiny, 'int4', folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'quantised: int4\n', '') and (tmp_path/'int4'/'model.safetensors').is_file()
    again = run('quantize', tiny, 'int4', folder=tmp_path)
    assert again.returncode == 1 and again.stderr.startswith('error: int4') and len(again.stderr.splitlines()) == 1

def test_chat(tiny, drawn):
    picture = drawn.parent/'0.png'
    one = run('chat', tiny, '--picture', picture, QUESTION, '--max_new_tokens', 4)
    assert one.returncode == 0 and one.stderr == '', one.stderr
    several = run('chat', tiny, '--max_new_tokens', 4, '--picture', picture, input=f'{QUESTION}\n/picture lost.png\n/new\n/quit\n')
    assert several.returncode == 0 and several.stdout.splitlines()[-1] == 'error: The picture lost.png does not exist.'
    assert several.stdout.startswith(one.stdout)  # greedy both times

@pytest.fixture(scope='module')
def place(tiny, drawn, tmp_path_factory):
    "A folder with a run of three steps, and what was printed while it ran."
    folder = tmp_path_factory.mktemp('place')
    return folder, run('train', '--method', 'lora', *base(tiny, drawn), *flags(**SMALL), '--name', 'first', folder=folder)

@pytest.mark.slow
def test_train(place):
    folder, done = place
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert 'run folder: runs/first' in lines and lines[-2].startswith('done  [####################]  step 3 of 3  loss ') and lines[-1] == 'done: runs/first/final'
    assert '\r' not in done.stdout and '\x1b' not in done.stdout and (folder/'runs/first/final/adapter_model.safetensors').is_file()
    assert load_config(folder/'runs/first/config.json').lora_r == 4

@pytest.mark.slow
def test_a_folder_is_taken(place, tiny, drawn):
    done = run('train', '--method', 'lora', *base(tiny, drawn), *flags(**SMALL), '--name', 'first', folder=place[0])
    assert done.returncode == 1 and done.stderr.startswith('error: ') and 'holds a run already (done)' in done.stderr

@pytest.mark.slow
def test_watch(place):
    folder, _ = place
    listed, watched, shown = run('watch', folder=folder), run('watch', 'runs/first', folder=folder), run('watch', 'first', '--log', '--lines', 1, '--plot', 'loss.png', folder=folder)
    assert re.search(r'^runs/first +done +3 of 3 ', listed.stdout, re.M)
    assert watched.returncode == 0 and watched.stdout.splitlines()[-1] == 'done: runs/first/final'
    assert shown.returncode == 0 and shown.stdout.splitlines()[-1] == 'drawn in loss.png' and (folder/'loss.png').stat().st_size > 10_000
    lost, resumed = run('watch', 'second', folder=folder), run('watch', 'first', '--resume', folder=folder)
    assert lost.returncode == 1 and 'There is no run second' in lost.stderr
    assert resumed.returncode == 1 and 'there is nothing to resume' in resumed.stderr

@pytest.mark.slow
def test_watch_on_a_terminal(place):
    ours, theirs = pty.openpty()
    p = subprocess.Popen([sys.executable, '-m', 'minicpmv_nb', 'watch', 'first'], cwd=place[0], stdout=theirs, stderr=theirs)
    assert p.wait() == 0
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert '\rdone  [####################]  step 3 of 3' in said

@pytest.mark.slow
def test_merge(place, tiny):
    folder, _ = place
    done = run('merge', tiny, 'runs/first/final', 'merged', folder=folder)
    assert done.returncode == 0 and 'merged checkpoint confirmed' in done.stdout and done.stdout.splitlines()[-1] == 'merged: merged' and done.stderr == '', done.stderr
    run_itself = run('merge', tiny, 'runs/first', 'again', folder=folder)
    assert run_itself.returncode == 1 and 'give a final or checkpoint folder of a LoRA run' in run_itself.stderr

@pytest.mark.slow
def test_interrupt_stop_resume(tiny, drawn, tmp_path):
    long = SMALL | dict(max_steps=4000, save_steps=2)
    p = subprocess.Popen([sys.executable, '-m', 'minicpmv_nb', 'train', '--method', 'lora', *map(str, base(tiny, drawn)), *flags(**long), '--name', 'long'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if 'step 3' in line or re.search('step [4-9]|step [1-9][0-9]', line): break
    p.send_signal(signal.SIGINT)
    _, said = p.communicate()
    assert p.returncode == 130 and 'runs/long goes on.' in said and 'minicpmv_nb watch runs/long --stop' in said and 'Traceback' not in said
    r = Run.attach(tmp_path/'runs/long')
    try:
        assert r.status()['state'] == 'running'
        stopped = run('watch', 'long', '--stop', folder=tmp_path)
        assert stopped.returncode == 0 and stopped.stdout.startswith('stopped'), stopped.stderr
        watched = run('watch', 'long', folder=tmp_path)
        assert watched.returncode == 1 and 'minicpmv_nb watch runs/long --resume' in watched.stderr
        step = r.status()['step']
        again = subprocess.Popen([sys.executable, '-m', 'minicpmv_nb', 'watch', 'long', '--resume'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in again.stdout:
            if line.startswith('running') and int(re.search(r'step (\d+)', line)[1]) > step: break
        again.send_signal(signal.SIGINT)
        assert again.wait() == 130
    finally: r.stop()

@pytest.mark.slow
def test_a_run_that_fails(tiny, drawn, tmp_path):
    data = draw_data(tmp_path, 8)
    done = run('train', '--method', 'lora', '--model_name_or_path', tiny, '--data_path', data, *flags(**SMALL | dict(learning_rate='1e30', max_steps=20, max_grad_norm=0)), '--name', 'wild', folder=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith('error: wild failed.') and 'FloatingPointError' in done.stderr
    log = (tmp_path/'runs/wild/log.txt').read_text()
    assert 'Traceback (most recent call last)' in log and 'training_step' in log  # what the sentence leaves out is here

@pytest.mark.slow
def test_detached(tiny, drawn, tmp_path):
    done = run('train', '--method', 'lora', *base(tiny, drawn), *flags(**SMALL), '--name', 'alone', '--detach', folder=tmp_path)
    r = Run.attach(tmp_path/'runs/alone')
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == 'run folder: runs/alone'
    r.wait(120)

@pytest.mark.slow
def test_demo(tmp_path):
    p = subprocess.Popen([sys.executable, '-m', 'minicpmv_nb', 'demo', '--family', '2.6', '--out', 'here'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = tmp_path/'here'/'base'/'status.json'
    while p.poll() is None and not (status.is_file() and json.loads(status.read_text())['state'] == 'running'): time.sleep(.5)
    p.send_signal(signal.SIGINT)
    _, said = p.communicate()
    assert p.returncode == 130 and said == ''
    assert Run.attach(tmp_path/'here'/'base').status()['state'] == 'stopped'  # nobody would look for it
