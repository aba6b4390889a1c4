"The guide's scripts give the guide's values; what cannot work is refused with what to do."
import json, re, shlex, subprocess, sys
from dataclasses import asdict, fields, replace

import pytest

from support import SCRIPTS
from minicpmv_nb.config import (GUIDE_LORA_TARGETS, NO_EFFECT, Config, check_batch, offloaded, nearest_name, read_value, deepspeed_json, deepspeed_notes, from_flags, from_script, full,
    load_config, lora, save_config, to_flags, write_json, zero_stage, precision_notes, qlora, recommended)

# What chapter 3.1 of the guide says, flag by flag, in its own words.
SAME_IN_BOTH = dict(
    model_name_or_path='/root/ld/ld_model_pretrained/MiniCPM-Llama3-V-2_5', llm_type='llama3',
    data_path='/root/ld/ld_project/MiniCPM-V/finetune/mllm_demo.json', eval_data_path='/root/ld/ld_project/MiniCPM-V/finetune/mllm_demo.json',
    bf16=False, fp16=True, do_train=True, do_eval=True, tune_vision=True, model_max_length=2048, max_slice_nums=9, max_steps=10000, eval_steps=1000,
    output_dir='output/output_minicpmv2_lora', logging_dir='output/output_minicpmv2_lora', logging_strategy='steps', per_device_train_batch_size=2,
    per_device_eval_batch_size=1, evaluation_strategy='steps', save_strategy='steps', save_steps=10, save_total_limit=10, learning_rate=1e-6,
    weight_decay=0.1, adam_beta2=0.95, warmup_ratio=0.01, lr_scheduler_type='cosine', logging_steps=1, gradient_checkpointing=True,
    deepspeed='ds_config_zero3.json', report_to='tensorboard',
    gpus=8, nnodes=1, node_rank=0, master_addr='localhost', master_port=6001, nccl_p2p_disable=True, nccl_ib_disable=True)
LORA = SAME_IN_BOTH | dict(tune_llm=False, use_lora=True, gradient_accumulation_steps=8,
    lora_target_modules=r'llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)')
FULL = SAME_IN_BOTH | dict(tune_llm=True, use_lora=False, gradient_accumulation_steps=1)
# The script does not say these; the official code and the Trainer have them as defaults.
UNSAID = dict(q_lora=False, tune_resampler=True, lora_r=64, lora_alpha=64, lora_dropout=0.05, seed=42, adam_beta1=0.9, max_grad_norm=1.0, optim='adamw_torch',
    num_train_epochs=1.0, warmup_steps=None)
# What a preset cannot know, or decides by the machine it is on.
MACHINE = ['model_name_or_path', 'data_path', 'eval_data_path', 'output_dir', 'logging_dir', 'llm_type', 'gpus', 'master_port', 'nccl_p2p_disable', 'nccl_ib_disable']
QLORA = LORA | dict(q_lora=True, tune_vision=False)
GUIDES = [('finetune_lora.sh', LORA, lora), ('finetune_qlora.sh', QLORA, qlora), ('finetune_ds.sh', FULL, full)]
NEEDED = dict(model_name_or_path='m', data_path='d')
NEEDED_FLAGS = ['--model_name_or_path', 'm', '--data_path', 'd']

def read(folder, text):
    (folder/'run.sh').write_text(text)
    return from_script(folder/'run.sh')


# --- scripts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('file, want', [pytest.param(file, want, id=file) for file, want, _ in GUIDES])
def test_script_of_the_guide(file, want):
    have = asdict(from_script(SCRIPTS/file))
    assert {k: have[k] for k in want} == want
    assert {k: have[k] for k in UNSAID} == UNSAID | {k: want[k] for k in UNSAID if k in want}

@pytest.mark.parametrize('file, preset', [pytest.param(file, preset, id=file) for file, _, preset in GUIDES])
def test_preset_is_the_script(file, preset):
    script, ours = asdict(from_script(SCRIPTS/file)), asdict(preset('m', 'd', 'e'))
    assert {k: v for k, v in ours.items() if k not in MACHINE} == {k: v for k, v in script.items() if k not in MACHINE}

def test_flags_without_effect_are_said(capsys):
    from_script(SCRIPTS/'finetune_lora.sh')
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ['--remove_unused_columns', '--label_names', '--prediction_loss_only', '--bf16_full_eval', '--fp16_full_eval']
    assert said[2] == f'--prediction_loss_only has no effect here: {NO_EFFECT["prediction_loss_only"]}.'

def test_changes_replace_what_the_script_says():
    cfg = from_script(SCRIPTS/'finetune_lora.sh', max_steps=3, fp16=False)
    assert (cfg.max_steps, cfg.fp16, cfg.save_steps) == (3, False, 10)

def test_script_as_bash_takes_it(tmp_path):
    # The guide's `\ # why` is no continuation for bash; a script that runs has a bare backslash.
    cfg = read(tmp_path, 'MODEL="a b" # two words\nDATA=""\nPATH=$PATH:/opt\nexport NCCL_IB_DISABLE=1\nARGS="\n    --nproc_per_node 2 \\\n    --master_port 6005\n"\n'
        'torchrun $ARGS finetune.py \\\n    --model_name_or_path "$MODEL" \\\n    --data_path ${DATA}d#1 \\\n    --do_train \\\n    --learning_rate=2e-5\n')
    assert (cfg.model_name_or_path, cfg.data_path, cfg.learning_rate) == ('a b', 'd#1', 2e-5)
    assert (cfg.gpus, cfg.master_port, cfg.nccl_ib_disable, cfg.nccl_p2p_disable) == (2, 6005, True, False)

def test_both_ways_to_continue_a_line_say_the_same(tmp_path):
    guide = (SCRIPTS/'finetune_lora.sh').read_text()
    bare = '\n'.join(line[:line.index('\\ ')] + '\\' if '\\ ' in line else line for line in guide.splitlines())
    assert bare != guide and read(tmp_path, bare) == from_script(SCRIPTS/'finetune_lora.sh')

def test_commented_lines_are_not_read(tmp_path):
    cfg = read(tmp_path, '# torchrun finetune.py --model_name_or_path other --data_path d\ntorchrun finetune.py --model_name_or_path m --data_path d # --seed 7\n')
    assert cfg == Config('m', 'd')

def test_script_that_runs_our_module(tmp_path):
    assert read(tmp_path, 'torchrun --nproc_per_node 2 -m minicpmv_nb.training --model_name_or_path m --data_path d\n') == Config('m', 'd', gpus=2)

def test_script_with_a_variable_before_the_command(tmp_path):
    assert read(tmp_path, 'CUDA_VISIBLE_DEVICES=0,1 torchrun finetune.py --model_name_or_path m --data_path d\n') == Config('m', 'd')

def test_script_that_goes_on_after_training(tmp_path):
    assert read(tmp_path, 'python prepare.py --all\ntorchrun finetune.py --model_name_or_path m --data_path d\npython merge.py --adapter out\n') == Config('m', 'd')

def test_script_with_arguments_in_single_quotes(tmp_path):
    cfg = read(tmp_path, "ARGS='\n    --nproc_per_node 2 \\\n    --master_port 6005\n'\nNAME=\"it's\"\ntorchrun $ARGS finetune.py --model_name_or_path m --data_path ${D:-d}\n")
    assert cfg == Config('m', 'd', gpus=2, master_port=6005)

def test_script_with_a_variable_it_does_not_set(tmp_path):
    with pytest.raises(ValueError, match=r'The script uses \$MODEL, which it does not set'): read(tmp_path, 'torchrun finetune.py --model_name_or_path $MODEL --data_path d\n')

@pytest.mark.parametrize('line, said', [('MODEL="$NOWHERE/models/x"', r'The script uses \$NOWHERE, which it does not set'), ('MODEL=$(pwd)/m', r'The script sets \$MODEL by a command'), ('MODEL=`pwd`/m', r'The script sets \$MODEL by a command')])
def test_script_with_a_value_that_only_a_shell_knows(tmp_path, line, said):
    with pytest.raises(ValueError, match=said): read(tmp_path, f'{line}\ntorchrun finetune.py --model_name_or_path $MODEL --data_path d\n')

@pytest.mark.parametrize('launcher, fields', [('accelerate launch --num_processes 8', dict(gpus=8)), ('accelerate launch --num_processes 8 --num_machines 2 --main_process_ip node1', dict(gpus=4, nnodes=2, master_addr='node1')), ('python -m torch.distributed.launch --nproc_per_node 2', dict(gpus=2)), ('python -u', {}),
    ('torchrun --nproc_per_node gpu', {}), ('torchrun --rdzv_endpoint=node1:29500', dict(master_addr='node1', master_port=29500))])
def test_other_launchers(tmp_path, launcher, fields): assert read(tmp_path, f'{launcher} finetune.py --model_name_or_path m --data_path d\n') == Config('m', 'd', **fields)

def test_chosen_gpus_are_not_ignored_in_silence(tmp_path, capsys):
    with pytest.raises(ValueError, match='--include localhost:0,1 chooses GPUs'): read(tmp_path, 'deepspeed --include localhost:0,1 finetune.py --model_name_or_path m --data_path d\n')
    read(tmp_path, 'export CUDA_VISIBLE_DEVICES=2,3\ntorchrun finetune.py --model_name_or_path m --data_path d\n')
    assert 'CUDA_VISIBLE_DEVICES=2,3 has no effect here' in capsys.readouterr().out

def test_script_without_a_command(tmp_path):
    with pytest.raises(ValueError, match=r'run\.sh: no line "torchrun \.\.\. finetune\.py --flags" found\.'): read(tmp_path, 'echo hello\n')

RUN = 'torchrun finetune.py --model_name_or_path m --data_path d'

def by_bash(folder, text):
    "The configuration of the words that bash hands to torchrun."
    (folder/'torchrun').write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > "{folder}/words"\n')
    (folder/'torchrun').chmod(0o755)
    (folder/'bash.sh').write_text(text)
    subprocess.run(['bash', folder/'bash.sh'], cwd=folder, env=dict(PATH=f'{folder}:/usr/bin:/bin'), check=True)
    words = (folder/'words').read_text().split('\0')[:-1]
    return from_flags(words[words.index('finetune.py')+1:])

@pytest.mark.parametrize('before, flags, want', [
    ('ARGS="--seed 7"\nARGS+=" --output_dir o"', '$ARGS', 'o'), ('O=a; O+=b;', '--output_dir $O', 'ab'), ('O=out;', '--output_dir $O', 'out'), ('A=1 B=2', '--output_dir $A$B', '12'), ('export A=1 B="2 3"', '--output_dir "$A$B"', '12 3'),
    ('readonly O=o', '--output_dir $O', 'o'), ('R=/r\nO="$R"/out', '--output_dir $O', '/r/out'), ('R=/r\nO=$R/"my"out', '--output_dir $O', '/r/myout'), ('O="/o\'brien/x"', '--output_dir $O', "/o'brien/x"),
    ('O="a b"', '--output_dir "$O" --seed 7', 'a b'), ('R="a\\.\\d+(b|c)"', '--output_dir $R', r'a\.\d+(b|c)'), ('', r'--output_dir "a\"b\$c\d|e$"', r'a"b$c\d|e$'), ('', "--output_dir '$HOME/x'", '$HOME/x'), ("O='a\\'", '--output_dir $O', 'a\\'),
    ('', '--output_dir ${O:-${B:-/o}}', '/o'), ('O=', '--output_dir ${O:-"a b"}', 'a b'), ('E=${E:-}', '--output_dir o $E', 'o'), ('', '--output_dir ${1:-o}', 'o'), ('O=a\nunused=$(date) other=`date`', '--output_dir ${O:-b}', 'a'),
    ('O=old\n# the new place \\\nO=new', '--output_dir $O', 'new'), ('O=old # the place \\\nO=new', '--output_dir $O', 'new'), ("# don't\nO=o", '--output_dir $O', 'o'), ('# torchrun finetune.py \\\n#  --seed 3 \\\nO=o', '--output_dir $O', 'o'),
    ('', '--output_dir /a/\\\nb', '/a/b'), ('', '--output_dir o \\\n  # --seed 3 \\\n\necho', 'o'), ('', '--seed 3 > log 2>&1 --output_dir o || exit 1', 'o'), ('', '--output_dir o | tee log', 'o'), ('cat > x.json <<EOF\n{"it\'s": 1}\nO=bad\nEOF\nO=o', '--output_dir $O', 'o'),
    ('if [ 1 = 2 ]; then\n  unused=1\nfi\nwhile [ $# -gt 0 ]; do case $1 in --o) unused=$2 ;; *) shift ;; esac; done\nfunction f {\n  O=1\n}\nO=2', '--output_dir $O', '2'), ('O=x\nunset O', '--output_dir ${O:-y}', 'y'),
    ('true && O=a || true\nO=b', '--output_dir $O', 'b'), ('cd . && O=a', '--output_dir $O', 'a')])
def test_script_says_what_bash_makes_of_it(tmp_path, before, flags, want):
    text = f'{before}\n{RUN} {flags}\n'
    cfg = read(tmp_path, text)
    assert cfg.output_dir == want and cfg == by_bash(tmp_path, text)

@pytest.mark.parametrize('before, flags, said', [
    ('', '--output_dir ${M##*/}', r'uses \$\{M##\*/\}, which is not read: write its value'), ('', '--output_dir "${D%.json}-run"', 'which is not read'), ('', '--output_dir ${O/a/b}', 'which is not read'), ('', '--output_dir "${O:0:3}"', 'which is not read'), ('', '--output_dir ${O^^}', 'which is not read'),
    ('O=${M##*/}', '--output_dir $O', r'uses \$\{M##\*/\}'), ('', "--output_dir $'o'", r"uses \$', which is not read"), ('', '--output_dir `date`', 'uses `date`, a command, which is not run here'), ('', '--output_dir "o-$(date "+%s")"', r'uses \$\(date "\+%s"\), a command'), ('O=o-$(date)', '--output_dir $O', r'sets \$O by a command'),
    ('', '"$@"', r'uses \$@, the arguments it is started with, which are not known'), ('', '${@:2}', 'the arguments it is started with'), ('A=(--seed 1)', '"${A[@]}"', r'uses \$\{A\[@\]\}, and arrays are not read: write the flags into the command'), ('A=(\n  --seed 1 # "one"\n  --lora_target_modules "(q|k)"\n)', '${A[@]}', 'arrays are not read'),
    ('O=1\nif [ -n "$X" ]; then\n  O=2\nfi', '--output_dir $O', r'sets \$O in line 3 under a condition'), ('O=1\n[ -n "$X" ] && O=2', '--output_dir $O', r'sets \$O in line 2 under a condition'), ('[ "$O" ] || O=2', '--output_dir $O', r'sets \$O in line 1'), ('case $1 in\n  a) O=1 ;;\nesac', '--output_dir $O', r'sets \$O in line 2'),
    ('f() {\n  O=1\n}', '--output_dir $O', r'sets \$O in line 2'), ('for O in a b; do echo; done', '--output_dir $O', r'sets \$O in line 1'), ('if [ 1 ]; then export NCCL_P2P_DISABLE=1; fi', '', r'sets \$NCCL_P2P_DISABLE in line 1'),
    (RUN, '--seed 2', 'several training commands, in lines 1, 2: leave one'), (f'if [ 1 ]; then\n  {RUN}\nelse', '\nfi', 'several training commands, in lines 2, 4'),
    ('', '\\\n  # --seed 3 \\\n  --output_dir o', 'Line 4 begins with a flag, but the command ends above it'), ('', '\\\n\n  --output_dir o', 'Line 4 begins with a flag'), ('', '--seed 3 # why \\\n  --output_dir o', 'Line 3 begins with a flag'), ('A="\n  --seed 1 # why\n"', '$A', 'bash takes a comment in quotes for words'), ('', '--output_dir "o', 'The quote " in line 2 or below it is never closed')])
def test_script_with_what_is_not_read(tmp_path, before, flags, said):
    with pytest.raises(ValueError, match=said): read(tmp_path, f'{before}\n{RUN} {flags}\n')

@pytest.mark.parametrize('start', ['nohup ', 'exec ', 'env X=1 ', 'env X=1 Y="a b" ', 'FOO="a b" ', 'cd x && ', 'set -e; ', 'srun -n 1 ', 'time ', '/opt/conda/bin/', 'A=1 nohup /opt/bin/', 'if ! ', 'timeout 10h ', '(cd x; ', 'train() { '])
def test_script_with_something_before_the_command(tmp_path, start):
    assert read(tmp_path, f'{start}torchrun --nproc_per_node 2 finetune.py --model_name_or_path m --data_path d\n') == Config('m', 'd', gpus=2)

@pytest.mark.parametrize('launcher, fields', [('python -m torch.distributed.run --nproc_per_node 2 finetune.py', dict(gpus=2)), ('torchrun --nproc_per_node=2 -m finetune.finetune', dict(gpus=2)), ('python3.10 -u -m finetune.finetune', {}), ('python -W ignore finetune.py', {}), ('python -m accelerate.commands.launch --num_processes 2 finetune.py', dict(gpus=2)),
    ('deepspeed --num_nodes 2 --num_gpus 4 --module finetune.finetune', dict(nnodes=2, gpus=4)), ('NCCL_P2P_DISABLE=1 torchrun finetune.py', dict(nccl_p2p_disable=True)), ('env NCCL_IB_DISABLE=1 nohup torchrun finetune.py', dict(nccl_ib_disable=True)), ('NCCL_P2P_DISABLE="0" torchrun finetune.py', {})])
def test_launchers_in_full(tmp_path, launcher, fields): assert read(tmp_path, f'{launcher} --model_name_or_path m --data_path d\n') == Config('m', 'd', **fields)

def test_launcher_and_flags_in_variables(tmp_path):
    assert read(tmp_path, 'L="torchrun --nproc_per_node 2"\nA="--model_name_or_path m --data_path d"\n$L finetune.py $A\n') == Config('m', 'd', gpus=2)

@pytest.mark.parametrize('options, said', [('--mixed_precision bf16', '--mixed_precision in front of the script changes the training, and is not read: leave it out, and write behind the script --bf16 true or'), ('--use_deepspeed --deepspeed_config_file ds.json', '--use_deepspeed in front .* --deepspeed ds_config_zero2.json'),
    ('--deepspeed_config_file ds.json', 'behind the script --deepspeed with this file'), ('--config_file a.yaml', 'behind the script what the file says'), ('--gpu_ids 0,1', '--gpu_ids 0,1 chooses GPUs')])
def test_options_of_a_launcher_that_change_the_training(tmp_path, options, said):
    with pytest.raises(ValueError, match=said): read(tmp_path, f'accelerate launch {options} finetune.py --model_name_or_path m --data_path d\n')

def test_options_of_a_launcher_that_are_left_out_are_said(tmp_path, capsys):
    assert read(tmp_path, 'torchrun -r 3 --standalone --log-dir logs finetune.py --model_name_or_path m --data_path d\n') == Config('m', 'd')
    assert capsys.readouterr().out.splitlines() == ['-r of the launcher has no effect here.', '--log_dir of the launcher has no effect here.']

@pytest.mark.parametrize('start', ['CUDA_VISIBLE_DEVICES="0,1" ', 'env CUDA_VISIBLE_DEVICES=0,1 ', 'export CUDA_VISIBLE_DEVICES=0,1\n'])
def test_gpus_chosen_before_the_command(tmp_path, start, capsys):
    assert read(tmp_path, f'{start}{RUN}\n') == Config('m', 'd')
    assert 'CUDA_VISIBLE_DEVICES=0,1 has no effect here' in capsys.readouterr().out

@pytest.mark.parametrize('start', ['mpirun -np 2 torchrun ', 'bash -c "torchrun ', './'])
def test_script_whose_command_begins_otherwise(tmp_path, start):
    with pytest.raises(ValueError, match='Line 2 does not begin with torchrun, deepspeed, accelerate or python'): read(tmp_path, f'\n{start}finetune.py --model_name_or_path m --data_path d' + '"'*('"' in start) + '\n')

def test_comments_behind_backslashes_in_quotes(tmp_path):
    assert read(tmp_path, f'D="\n  --nproc_per_node 2 \\ # isn\'t it\n  --nnodes 1 \\  \n"\n{RUN.replace("finetune.py", "$D finetune.py")}\n') == Config('m', 'd', gpus=2)

def test_script_of_another_encoding(tmp_path):
    (tmp_path/'run.sh').write_bytes(f'# 模型路径\n{RUN}\n'.encode('gbk'))
    with pytest.raises(ValueError, match=r'run\.sh is not UTF-8 text: save it as UTF-8\.$'): from_script(tmp_path/'run.sh')
    done = subprocess.run([sys.executable, '-m', 'minicpmv_nb.command', 'train', '--script', 'run.sh'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and 'run.sh is not UTF-8 text' in done.stderr and 'Traceback' not in done.stderr
    (tmp_path/'run.sh').write_bytes(f'# 模型路径\r\n{RUN}\r\n'.encode('utf-8-sig'))
    assert from_script(tmp_path/'run.sh') == Config('m', 'd')

def test_script_that_is_long_or_odd_is_read_at_once(tmp_path):
    for odd in ('A=(' + '\\a"$(a)"'*300 + ')', 'A="' + '$(a)\\"'*300 + '"', 'A=' + '${a'*300, 'A=(' + '"$(a)$(b)" \'x\' '*300 + ')', 'echo "x" $(ls)\n'*2000):
        assert read(tmp_path, f'{odd}\n{RUN}\n') == Config('m', 'd')


# --- flags -----------------------------------------------------------------------------------------------------------

EVERY_KIND = [Config(**NEEDED), lora('m', 'd', 'e'), full('m', 'd', fp16=False, bf16=True, save_total_limit=3),
    Config('a folder/with space', "d'quoted'", use_lora=True, lora_dropout=0.0, learning_rate=3e-5, max_steps=7, deepspeed='x.json', gpus=2, master_port=6001,
        gradient_checkpointing=False, gradient_checkpointing_vision=True, warmup_steps=0, weight_decay=0.0)]

@pytest.mark.parametrize('cfg', EVERY_KIND, ids=['defaults', 'lora', 'full', 'many'])
def test_flags_there_and_back(cfg):
    assert from_flags(to_flags(cfg)) == cfg
    assert from_flags(shlex.split(shlex.join(to_flags(cfg)))) == cfg

def test_a_setting_that_is_switched_off_comes_back():
    # Its default is not None, so leaving the flag out would bring the default back.
    cfg = Config(**NEEDED, save_total_limit=None)
    assert from_flags(to_flags(cfg)) == cfg

@pytest.mark.parametrize('flag, value, field, want', [('eval_strategy', 'epoch', 'evaluation_strategy', 'epoch'), ('warmup_ratio', '0.1', 'warmup_ratio', 0.1),
    ('warmup_steps', '20', 'warmup_steps', 20), ('logging_dir', 'logs', 'logging_dir', 'logs'), ('no_cuda', 'true', 'use_cpu', True), ('lora_rank', '8', 'lora_r', 8),
    ('max_length', '4096', 'model_max_length', 4096), ('learning-rate', '1e-4', 'learning_rate', 1e-4), ('max_steps', '1e4', 'max_steps', 10000),
    ('save_total_limit', 'none', 'save_total_limit', None), ('max_steps', '-1', 'max_steps', -1)])
def test_flag_sets_field(flag, value, field, want):
    have = getattr(from_flags([*NEEDED_FLAGS, f'--{flag}', value]), field)
    assert have == want and type(have) is type(want)

def test_flag_without_a_value_is_true():
    assert from_flags([*NEEDED_FLAGS, '--use_lora', '--bf16']) == Config(**NEEDED, use_lora=True, bf16=True)

@pytest.mark.parametrize('text, want', [('True', True), ('FALSE', False), ('1', True), ('0', False), ('yes', True), ('no', False)])
def test_true_and_false(text, want): assert from_flags([*NEEDED_FLAGS, '--use_lora', text]).use_lora is want

@pytest.mark.parametrize('argv, message', [
    (['--learning_rat', '1'], 'There is no flag --learning_rat. Did you mean learning_rate?'),
    (['--eval_strateg', 'no'], 'There is no flag --eval_strateg. Did you mean eval_strategy?'),
    (['--zzzzzz', '1'], 'There is no flag --zzzzzz.'),
    (['stray'], "'stray' is not a flag: flags look like --learning_rate 1e-6."),
    (['--fp16', 'maybe'], "--fp16 is 'maybe': say true or false."),
    (['--max_steps', 'many'], "--max_steps is 'many': expected int."),
    (['--save_steps', '1.5'], "--save_steps is '1.5': expected int."),
    (['--learning_rate', 'fast'], "--learning_rate is 'fast': expected float."),
    (['--learning_rate'], "--learning_rate has no value.")])
def test_flag_is_refused(argv, message):
    with pytest.raises(ValueError) as e: from_flags([*NEEDED_FLAGS, *argv])
    assert str(e.value) == message

@pytest.mark.parametrize('missing', NEEDED)
def test_needed_flag_is_missing(missing):
    with pytest.raises(ValueError, match=f'--{missing} is missing'): from_flags([p for k, v in NEEDED.items() if k != missing for p in (f'--{k}', v)])

def test_aliases_are_names_of_settings_only():
    assert nearest_name('lr') == ' Did you mean learning_rate?' and nearest_name('lr', ('adamw_torch', 'sgd')) == ''

def test_whole_numbers_stay_whole():
    assert read_value('seed', '9007199254740993') == 9007199254740993 and read_value('max_steps', '1e4') == 10000
    with pytest.raises(ValueError, match='expected int'): read_value('max_steps', '1.5')

@pytest.mark.parametrize('preset', [lora, qlora, full])
def test_unknown_setting_gives_the_nearest_name(preset):
    with pytest.raises(TypeError, match=r"There is no setting 'max_step'\. Did you mean max_steps\?"): preset('m', 'd', max_step=3)


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('values, message', [
    (dict(use_lora=True, tune_llm=True), 'use_lora and tune_llm exclude each other: LoRA exists to leave the language model frozen. Set one of them to false.'),
    (dict(tune_llm=True, q_lora=True), 'q_lora trains LoRA on four-bit weights: set use_lora=True as well.'),
    (dict(tune_llm=True, use_dora=True), 'use_rslora, use_dora and loraplus_ratio belong to LoRA: set use_lora=True, or leave them out.'),
    (dict(use_lora=True, early_stopping_patience=3), 'early_stopping_patience needs evaluations: set do_eval=True and give eval_data_path.'),
    (dict(use_lora=True, load_best_model_at_end=True), 'load_best_model_at_end needs evaluations: set do_eval=True and give eval_data_path.'),
    (dict(use_lora=True, offload='all'), "offload is done by DeepSpeed: set deepspeed='ds_config_zero3.json', or leave it out."),
    (dict(fp16=True, bf16=True), 'fp16 and bf16 exclude each other: choose bf16 where the GPU has it.'),
    (dict(do_eval=True), 'do_eval needs eval_data_path: give a file, or set do_eval=False.'),
    (dict(tune_resampler=False), 'nothing would train: set use_lora, tune_llm, tune_vision or tune_resampler.'),
    (dict(do_train=False), 'do_train=False leaves nothing to do: leave the flag out.'),
    (dict(max_steps=0), 'max_steps is 0: give a positive number, or -1 to train for num_train_epochs.'),
    (dict(max_steps=-2), 'max_steps is -2: give a positive number, or -1 to train for num_train_epochs.'),
    (dict(warmup_ratio=1.5), 'warmup_ratio is 1.5: it is a share of the steps, between 0 and 1.'),
    (dict(warmup_ratio=-0.1), 'warmup_ratio is -0.1: it is a share of the steps, between 0 and 1.'),
    (dict(lora_dropout=1.0), 'lora_dropout is 1.0: it is a probability below 1.'),
    (dict(node_rank=1), 'node_rank is 1, but there are 1 machines, numbered from 0.'),
    (dict(node_rank=-1, nnodes=2), 'node_rank is -1, but there are 2 machines, numbered from 0.'),
    (dict(save_strategy='best'), "save_strategy is 'best': choose one of steps, epoch, no."),
    (dict(bad_samples='drop'), "bad_samples is 'drop': choose one of error, skip."),
    (dict(extra_image_tags='text'), "extra_image_tags is 'text': choose one of report, literal."),
    (dict(report_to='mlflow'), "report_to is 'mlflow': choose one of none, tensorboard, wandb."),
    (dict(per_device_train_batch_size=0), 'per_device_train_batch_size is 0: it must be positive.'),
    (dict(learning_rate=-1e-6), 'learning_rate is -1e-06: it must be positive.'),
    (dict(learning_rate=float('nan')), 'learning_rate is nan: it must be positive.'),
    (dict(model_max_length=0), 'model_max_length is 0: it must be positive.'),
    (dict(max_slice_nums=0), 'max_slice_nums is 0: it must be positive.'),
    (dict(num_train_epochs=0.0), 'num_train_epochs is 0.0: it must be positive.'),
    (dict(weight_decay=-0.1), 'weight_decay is -0.1: it must not be negative.'),
    (dict(vision_weight_decay=-1.0), 'vision_weight_decay is -1.0: it must not be negative.'),
    (dict(warmup_steps=-1), 'warmup_steps is -1: it must not be negative.'),
    (dict(max_grad_norm=-1.0), 'max_grad_norm is -1.0: it must not be negative.'),
    (dict(dataloader_num_workers=-1), 'dataloader_num_workers is -1: it must not be negative.'),
    (dict(adam_beta2=1.0), 'adam_beta2 is 1.0: it must be at least 0 and below 1.'),
    (dict(seed=2**32), 'seed is 4294967296: it must be below 2**32, since NumPy takes no larger one.'),
    (dict(master_port=70000), 'master_port is 70000: give a number from 1 to 65535, or None for a free one.'),
    (dict(deepspeed=''), "deepspeed is '': give a DeepSpeed JSON, or None."),
    (dict(offload='all', deepspeed='ds_config_zero2.json'), "offload='all' needs ZeRO-3, which alone splits the weights: set deepspeed='ds_config_zero3.json', or offload='optimizer'.")])
def test_refused_with_what_to_do(values, message):
    with pytest.raises(ValueError) as e: Config(**NEEDED, **values)
    assert str(e.value) == message

def test_zero_where_it_means_something(): Config(**NEEDED, max_grad_norm=0.0, weight_decay=0.0, warmup_steps=0, dataloader_num_workers=0, adam_beta1=0.0)

def test_tuning_embeddings_alone_is_allowed(): Config(**NEEDED, tune_resampler=False, tune_embeddings=True)


# --- DeepSpeed -------------------------------------------------------------------------------------------------------

def test_no_deepspeed_is_stage_0(): assert zero_stage(Config(**NEEDED)) == 0

@pytest.mark.parametrize('stage', [2, 3])
@pytest.mark.parametrize('name', ['ds_config_zero{}.json', 'somewhere/ds_config_zero{}.json', 'zero{}'])
def test_the_guides_file_means_ours_where_it_is_missing(tmp_path, monkeypatch, name, stage):
    monkeypatch.chdir(tmp_path)
    cfg = lora('m', 'd', deepspeed=name.format(stage))
    ours = deepspeed_json(cfg)
    assert zero_stage(cfg) == stage == ours['zero_optimization']['stage']
    assert ours['fp16'] == dict(enabled=True) and ours['bf16'] == dict(enabled=False)
    assert (ours['train_micro_batch_size_per_gpu'], ours['gradient_accumulation_steps'], ours['gradient_clipping']) == (2, 8, 1.0)
    said = [f'There is no file {cfg.deepspeed}: taking our own configuration for ZeRO stage {stage}.'] if '/' in name else []
    assert 'scheduler' not in ours and deepspeed_notes(cfg) == said  # the Trainer's schedule is the one that counts

def test_a_file_of_the_user_is_taken_as_it_is(tmp_path):
    given = dict(zero_optimization=dict(stage=1), anything=[1, 2])
    (tmp_path/'ds_config_zero3.json').write_text(json.dumps(given))
    cfg = Config(**NEEDED, deepspeed=str(tmp_path/'ds_config_zero3.json'))
    assert deepspeed_json(cfg) == given and zero_stage(cfg) == 1 and deepspeed_notes(cfg) == []

def test_optimizer_and_scheduler_of_the_user_are_left_out(tmp_path):
    # The official ds_config_zero2.json has both; each cancels the learning rates of the parts.
    file, zero = tmp_path/'mine.json', dict(stage=2, overlap_comm=True)
    auto = dict(lr='auto', betas='auto', eps='auto', weight_decay='auto')
    file.write_text(json.dumps(dict(zero_optimization=zero, optimizer=dict(type='AdamW', params=auto), scheduler=dict(type='WarmupLR'), train_batch_size='auto')))
    cfg = Config(**NEEDED, deepspeed=str(file))
    assert deepspeed_json(cfg) == dict(zero_optimization=zero, train_batch_size='auto')
    assert deepspeed_notes(cfg) == [f"{file} has an optimizer (AdamW), which is left out: the run's own optim=adamw_torch, with a learning rate and weight decay for each part, applies.",
        f"{file} has a scheduler (WarmupLR), which is left out: the run's own lr_scheduler_type=cosine applies."]

@pytest.fixture
def own_file(tmp_path):
    "A configuration with a DeepSpeed file of the user's."
    def make(given, **how):
        (tmp_path/'mine.json').write_text(json.dumps(given))
        return Config(**NEEDED | dict(deepspeed=str(tmp_path/'mine.json')) | how)
    return make

def test_a_deepspeed_file_from_home(own_file, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert zero_stage(own_file(dict(zero_optimization=dict(stage=3, stage3_gather_16bit_weights_on_model_save=True)), deepspeed='~/mine.json')) == 3

def test_empty_entries_of_a_deepspeed_file_are_none(own_file):
    cfg = own_file(dict(zero_optimization=dict(stage=2, offload_optimizer=None)))
    assert deepspeed_json(cfg) == dict(zero_optimization=dict(stage=2)) and offloaded(cfg) == 'none'

@pytest.mark.parametrize('given', [dict(train_batch_size='auto'), dict(zero_optimization=None), {}, []])
def test_a_deepspeed_file_without_zero_is_refused(own_file, given):
    with pytest.raises(ValueError, match='mine.json has no zero_optimization: write for example "zero_optimization": {"stage": 2}'): deepspeed_json(own_file(given))

def test_a_deepspeed_file_of_another_precision_is_refused(own_file):
    zero = dict(zero_optimization=dict(stage=2))
    with pytest.raises(ValueError, match='has fp16 enabled: true, and the run has fp16=False. Write "auto" there'): check_batch(own_file(zero | dict(fp16=dict(enabled=True))))
    for fine in (dict(fp16=dict(enabled='auto'), bf16=dict(enabled=True)), dict(fp16=None), dict(fp16=dict(enabled=False))): check_batch(own_file(zero | fine, bf16=True))

OFFLOADS = dict(zero_optimization=dict(stage=2, offload_optimizer=dict(device='cpu')))

@pytest.mark.parametrize('optim, given, said', [('adagrad', dict(zero_optimization=dict(stage=2)), "optim='adagrad' does not work under DeepSpeed"), ('adafactor', OFFLOADS, "optim='adafactor' cannot be offloaded"), ('paged_lion_32bit', OFFLOADS, 'cannot be offloaded')])
def test_optimizers_that_deepspeed_cannot_take(own_file, optim, given, said):
    with pytest.raises(ValueError, match=said): deepspeed_json(own_file(given, optim=optim))
    deepspeed_json(own_file(given, optim='sgd'))

def test_an_optimizer_that_stays_as_it_is_may_be_offloaded(own_file): deepspeed_json(own_file(OFFLOADS | dict(zero_force_ds_cpu_optimizer=False), optim='adafactor'))

@pytest.mark.parametrize('given, said', [(dict(zero_optimization=dict(stage=2, offload_optimizer='cpu')), 'offload_optimizer: "cpu", where DeepSpeed wants an object such as {"device": "cpu"}'),
    (dict(zero_optimization=dict(stage=2), bf16=True), 'has bf16: true, where DeepSpeed wants an object')])
def test_entries_of_a_deepspeed_file_that_are_no_objects(own_file, given, said):
    with pytest.raises(ValueError, match=re.escape(said)): check_batch(own_file(given))

def test_a_plateau_needs_evaluations():
    with pytest.raises(ValueError, match='looks at evaluations: set do_eval=True'): Config(**NEEDED, lr_scheduler_type='reduce_lr_on_plateau')
    Config(**NEEDED, lr_scheduler_type='reduce_lr_on_plateau', do_eval=True, eval_data_path='eval.json')

@pytest.mark.parametrize('name', ['mine.json', 'ds_config_zero1.json', 'ds_config_zero33.json'])
def test_another_missing_file_is_an_error(tmp_path, name):
    with pytest.raises(FileNotFoundError) as e: deepspeed_json(Config(**NEEDED, deepspeed=str(tmp_path/name)))
    assert str(e.value) == f'There is no file {tmp_path/name}. Give a DeepSpeed JSON, or ds_config_zero2.json or ds_config_zero3.json for ours.'

def test_broken_deepspeed_json(tmp_path):
    (tmp_path/'mine.json').write_text('{"a": 1,\n}')
    with pytest.raises(ValueError, match=r'mine\.json is not valid JSON \(line [12]'): deepspeed_json(Config(**NEEDED, deepspeed=str(tmp_path/'mine.json')))


# --- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('cfg', EVERY_KIND, ids=['defaults', 'lora', 'full', 'many'])
def test_saved_configuration_comes_back(tmp_path, cfg):
    save_config(cfg, tmp_path/'config.json', versions=dict(torch='2'))
    assert load_config(tmp_path/'config.json') == cfg
    assert json.loads((tmp_path/'config.json').read_text())['versions'] == dict(torch='2')

def test_paths_are_saved_as_text(tmp_path):
    cfg = lora(tmp_path/'m', tmp_path/'d.json', output_dir=tmp_path/'run')
    save_config(cfg, tmp_path/'config.json')
    assert load_config(tmp_path/'config.json') == cfg and cfg.output_dir == str(tmp_path/'run')

def test_failed_writing_leaves_the_old_file(tmp_path):
    write_json(tmp_path/'x.json', dict(a=1))
    with pytest.raises(TypeError): write_json(tmp_path/'x.json', dict(a=object()))
    assert json.loads((tmp_path/'x.json').read_text()) == dict(a=1) and [p.name for p in tmp_path.iterdir()] == ['x.json']

def test_help_lists_every_field():
    said = subprocess.run([sys.executable, '-m', 'minicpmv_nb.training', '--help'], capture_output=True, text=True, check=True).stdout
    listed = [line.split()[0] for line in said.splitlines() if line.startswith('  --')]
    assert listed == [f'--{f.name}' for f in fields(Config)]
    assert "--learning_rate float [1e-6]\n      LoRA usually wants about 1e-4; the guide has 1e-6" in said
    assert f'--lora_target_modules str [{GUIDE_LORA_TARGETS}]' in said

def test_default_targets_are_the_guides(): assert GUIDE_LORA_TARGETS == LORA['lora_target_modules']


# --- better values ---------------------------------------------------------------------------------------------------

def test_recommended_replaces_the_guides_values_and_says_why(capsys):
    cfg = recommended(lora('m', 'd', learning_rate=5e-5))
    said = capsys.readouterr().out.splitlines()
    assert cfg.learning_rate == 5e-5 and cfg.bf16 and not cfg.fp16 and not cfg.tune_vision and cfg.lora_target_modules == 'llm.attention llm.mlp'
    assert 'save_steps: 10 -> 200: every 10 steps is a checkpoint every few minutes' in said and not any(line.startswith('learning_rate') for line in said)
    assert recommended(cfg) == cfg

@pytest.mark.parametrize('rank, alpha', [(8, 16), (32, 64), (64, 128)])
def test_recommended_alpha_follows_the_rank(rank, alpha): assert recommended(lora('m', 'd', lora_r=rank)).lora_alpha == alpha

def test_recommended_leaves_alone_what_it_is_told_to():
    cfg = lora('m', 'd')
    assert recommended(cfg, keep={'learning_rate'}) == replace(recommended(cfg), learning_rate=cfg.learning_rate)

def test_recommended_keeps_fp16_and_offloaded_weights():
    cfg = recommended(lora('m', 'd'), keep=('fp16',))
    assert cfg.fp16 and not cfg.bf16
    assert recommended(lora('m', 'd', offload='all')).deepspeed == 'ds_config_zero3.json'

@pytest.mark.parametrize('text', ['none', 'None', 'null', ''])
def test_nothing_can_be_said_as_a_flag(text): assert from_flags([*NEEDED_FLAGS, '--use_lora', 'true', '--deepspeed', text]).deepspeed is None

def test_recommended_for_full_training():
    cfg = recommended(full('m', 'd'))
    assert (cfg.learning_rate, cfg.vision_learning_rate, cfg.tune_vision, cfg.lora_alpha, cfg.save_total_limit) == (5e-6, 2e-6, True, 64, 2) and recommended(lora('m', 'd')).save_total_limit == 10


# --- offload ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('offload, stage, keys', [('none', 2, set()), ('optimizer', 2, {'offload_optimizer'}), ('optimizer', 3, {'offload_optimizer'}), ('all', 3, {'offload_optimizer', 'offload_param'})])
def test_offload(offload, stage, keys):
    zero = deepspeed_json(lora('m', 'd', offload=offload, deepspeed=f'ds_config_zero{stage}.json'))['zero_optimization']
    assert {k for k in zero if k.startswith('offload')} == keys

def test_weights_are_offloaded_under_zero3_only():
    with pytest.raises(ValueError, match="offload='all' needs ZeRO-3"): deepspeed_json(lora('m', 'd', offload='all', deepspeed='ds_config_zero2.json'))


# --- batches and precision -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('given, said', [(dict(train_batch_size=30), 'train_batch_size 30; 2 samples per GPU x 8 accumulation steps x 8 GPUs need 128'), (dict(train_micro_batch_size_per_gpu=4), 'train_micro_batch_size_per_gpu 4'),
    (dict(gradient_accumulation_steps=3), 'gradient_accumulation_steps 3')])
def test_batch_that_deepspeed_cannot_divide(tmp_path, given, said):
    (tmp_path/'ds.json').write_text(json.dumps(dict(zero_optimization=dict(stage=2)) | given))
    with pytest.raises(ValueError, match=said): check_batch(lora('m', 'd', gpus=8, deepspeed=str(tmp_path/'ds.json')))

def test_batch_that_fits(tmp_path):
    (tmp_path/'ds.json').write_text(json.dumps(dict(zero_optimization=dict(stage=2), train_batch_size=128, train_micro_batch_size_per_gpu='auto')))
    check_batch(lora('m', 'd', gpus=8, deepspeed=str(tmp_path/'ds.json')))
    check_batch(lora('m', 'd', gpus=8))

@pytest.mark.parametrize('fp16, dtype, notes', [(True, 'bfloat16', 1), (True, 'float16', 0), (False, 'bfloat16', 0)])
def test_fp16_on_a_bf16_checkpoint(fp16, dtype, notes): assert len(precision_notes(lora('m', 'd', fp16=fp16), dict(torch_dtype=dtype))) == notes

@pytest.mark.parametrize('name, meant', [('lr', 'learning_rate'), ('batch_size', 'per_device_train_batch_size'), ('rank', 'lora_r'), ('device', 'use_cpu')])
def test_names_of_other_programs(name, meant):
    with pytest.raises(TypeError, match=f'There is no setting {name!r}. Did you mean {meant}[?]'): lora('m', 'd', **{name: 1})

def test_a_hash_in_quotes_is_no_comment(tmp_path):
    assert read(tmp_path, 'DATA="my #1.json" # the first\nMODEL=m # it\'s small\ntorchrun finetune.py --model_name_or_path $MODEL --data_path "$DATA" # go\n') == Config('m', 'my #1.json')
