"What a run promises: it stops at nonsense, evaluates the same on any machine, resumes as if nothing had happened, and saves what the official code reads."
import json, math, shutil, time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from support import GOLDENS, TESTS, draw_data, flags, run_ranks
from minicpmv_nb import training
from minicpmv_nb.batches import SampleDataset, collate, load_data
from minicpmv_nb.config import Config, load_config, read_status, save_config
from minicpmv_nb.model import load
from minicpmv_nb.prompts import Processor
from minicpmv_nb.surviving import check_resume, checkpoints, newest_checkpoint, set_aside
from minicpmv_nb.training import FineTuner, fit_precision, make_trainer, read_metrics, save_final, train

SPEED = dict(dataloader_num_workers=0, use_cpu=True)
LORA, FULL = dict(use_lora=True, lora_r=8, lora_alpha=16), dict(tune_llm=True, tune_vision=True)


@pytest.fixture
def cfg(tiny, drawn, tmp_path):
    "A LoRA run of 4 steps on the CPU."
    return Config(str(tiny), str(drawn), output_dir=str(tmp_path/'run'), max_steps=4, learning_rate=1e-3, save_steps=2, **LORA, **SPEED)

@pytest.fixture(scope='session')
def eval_file(tmp_path_factory): return draw_data(tmp_path_factory.mktemp('eval'), 7, 'eval.json')

@pytest.fixture(scope='session')
def finished(tiny, drawn, tmp_path_factory):
    "Folder of a run that nothing disturbed, by what it trained."
    made = {}
    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp('finished')
            how = dict(LORA=LORA | dict(tune_vision=True), FULL=FULL)[kind]
            train(Config(str(tiny), str(drawn), output_dir=str(made[kind]), max_steps=4, learning_rate=1e-3, save_steps=2, warmup_steps=2, **how, **SPEED))
        return made[kind]
    return run

def status(folder): return json.loads((folder/'status.json').read_text())

def steps(folder): return [m for m in read_metrics(folder) if 'loss' in m]

def one_batch(folder, file, size=2):
    processor = Processor.from_folder(folder)
    data = SampleDataset(load_data(file, processor)[0], processor)
    batch = collate([data[i] for i in range(size)])
    return {k: v for k, v in batch.items() if k not in ('labels', 'ids')}, batch['labels']


# --- nonsense stops the run ------------------------------------------------------------------------------------------

def test_nan_names_step_and_sample(cfg, monkeypatch):
    straight = FineTuner.compute_loss
    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(inputs['ids'])
        return straight(self, model, inputs, *args, **kwargs)*(float('nan') if len(seen) == 3 else 1)
    seen = []
    monkeypatch.setattr(FineTuner, 'compute_loss', compute_loss)
    with pytest.raises(FloatingPointError) as e: train(replace(cfg, per_device_train_batch_size=2))
    assert str(e.value).startswith(f'The loss is nan at step 3, samples {", ".join(seen[2])}. ') and 'Try a smaller learning_rate. If resuming from the last checkpoint fails the same way, take an earlier one.' in str(e.value)
    assert len(seen) == 3 and len(seen[2]) == 2

def test_nan_in_an_accumulated_step(cfg, monkeypatch):
    straight = FineTuner.compute_loss
    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.extend(inputs['ids'])
        return straight(self, model, inputs, *args, **kwargs)*(float('inf') if len(seen) == 6 else 1)
    seen = []
    monkeypatch.setattr(FineTuner, 'compute_loss', compute_loss)
    with pytest.raises(FloatingPointError, match=r'The loss is inf at step 2, samples s\d+\. ') as e: train(replace(cfg, gradient_accumulation_steps=4))
    assert f'samples {seen[5]}. ' in str(e.value)

def test_broken_weight_stops_the_first_step(cfg, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path/'broken')
    weights = load_file(tiny/'model.safetensors')
    weights['llm.lm_head.weight'][7] = float('inf')
    save_file(weights, tmp_path/'broken'/'model.safetensors')
    with pytest.raises(FloatingPointError, match=r'The loss is (nan|inf) at step 1, samples s\d+\.'): train(replace(cfg, model_name_or_path=str(tmp_path/'broken')))
    assert not newest_checkpoint(cfg.output_dir)

def test_gradient_that_is_not_a_number(cfg, monkeypatch):
    # The loss can be finite when a gradient is not.
    straight = FineTuner.training_step
    def training_step(self, model, *args):
        loss = straight(self, model, *args)
        next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float('nan'))
        return loss
    monkeypatch.setattr(FineTuner, 'training_step', training_step)
    with pytest.raises(FloatingPointError, match='The gradient norm is nan at step 1'): train(cfg)

def test_failure_is_written_down(cfg, tmp_path):
    argv = flags(model_name_or_path=cfg.model_name_or_path, data_path=tmp_path/'none.json', output_dir=cfg.output_dir, use_cpu='true')
    with pytest.raises(FileNotFoundError): training.main(argv)
    assert status(tmp_path/'run')['state'] == 'failed'
    assert status(tmp_path/'run')['error'] == f'rank 0: FileNotFoundError: There is no data file {tmp_path/"none.json"}.'

def test_nan_on_one_of_two_ranks_ends_the_job(tiny, drawn, tmp_path):
    # Only one rank meets the sample; the other must not wait for it for ever, and the status names the cause, not its consequence.
    argv = flags(model_name_or_path=tiny, data_path=drawn, output_dir=tmp_path, use_cpu='true', use_lora='true', num_train_epochs=1, save_strategy='no', dataloader_num_workers=0)
    done = run_ranks(argv, 2, (str(TESTS/'nan_loss.py'),), check=False)
    assert done.returncode != 0
    assert status(tmp_path)['state'] == 'failed' and 'FloatingPointError: The loss is nan at step' in status(tmp_path)['error'] and 'samples s5.' in status(tmp_path)['error']
    assert not (tmp_path/'final').exists()

def test_target_without_a_gradient_is_named(cfg, monkeypatch):
    loaded = training.load_any
    def with_spare(*args):
        model = loaded(*args)
        model.llm.spare = torch.nn.Linear(4, 4)  # no forward pass comes here
        return model
    monkeypatch.setattr(training, 'load_any', with_spare)
    with pytest.raises(RuntimeError) as e: train(replace(cfg, lora_target_modules=cfg.lora_target_modules + r'|llm\.spare'))
    assert str(e.value).startswith('2 trainable parameters got no gradient in the first step: llm.spare.lora_A.default.weight, llm.spare.lora_B.default.weight. ')
    assert 'leave their modules out of lora_target_modules' in str(e.value)


# --- evaluation ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def direct_loss(tiny, eval_file):
    "The mean over all taught tokens of the evaluation file, from the logits of one sample at a time."
    model, processor = load(tiny), Processor.from_folder(tiny)
    data, total, count = SampleDataset(load_data(eval_file, processor)[0], processor), 0.0, 0
    for i in range(len(data)):
        batch = collate([data[i]])
        with torch.no_grad(): logits = model(**{k: v for k, v in batch.items() if k not in ('labels', 'ids')})['logits'][0].double()
        at = [t for t, label in enumerate(batch['labels'][0].tolist()) if label != -100]
        total -= sum(float(logits[t-1].log_softmax(0)[batch['labels'][0, t]]) for t in at)
        count += len(at)
    return total/count

@pytest.fixture
def evaluating(cfg, eval_file): return replace(cfg, eval_data_path=str(eval_file), do_eval=True)

@pytest.mark.parametrize('size', [1, 2, 5, 16])
def test_evaluation_loss_does_not_depend_on_the_batch(evaluating, direct_loss, size):
    assert make_trainer(replace(evaluating, per_device_eval_batch_size=size)).evaluate()['eval_loss'] == pytest.approx(direct_loss, abs=2e-6)

def test_answers_of_the_evaluation_file_are_unequal(eval_file, tiny):
    # Otherwise a mean of means would pass for the mean over all tokens.
    processor = Processor.from_folder(tiny)
    data = SampleDataset(load_data(eval_file, processor)[0], processor)
    taught = [sum(label != -100 for label in e.labels) for e in map(data.encoded, range(len(data)))]
    assert max(taught) > 2*min(taught)

def test_evaluation_loss_does_not_depend_on_the_ranks(evaluating, direct_loss, tmp_path):
    # 7 samples on 2 ranks with batches of 2: the last batch is filled up with samples that must not count twice.
    still = flags(model_name_or_path=evaluating.model_name_or_path, data_path=evaluating.data_path, eval_data_path=evaluating.eval_data_path, output_dir=tmp_path/'two',
        do_eval='true', eval_steps=1, max_steps=2, per_device_eval_batch_size=2, learning_rate=1e-12, use_lora='true', use_cpu='true', dataloader_num_workers=0, save_strategy='no')
    run_ranks(still, 2)
    found = [m['eval_loss'] for m in read_metrics(tmp_path/'two') if 'eval_loss' in m]
    assert found == pytest.approx([direct_loss]*2, abs=1e-5)

def test_evaluation_keeps_no_logits(evaluating):
    trainer = make_trainer(evaluating)
    widths = []
    trainer.model.base_model.model.llm.lm_head.register_forward_hook(lambda m, i, out: widths.append(out.shape))
    out = trainer.evaluation_loop(trainer.get_eval_dataloader(), 'evaluation', prediction_loss_only=False)
    assert out.predictions is None and out.label_ids is None
    labels = [e.labels for e in map(trainer.eval_dataset.encoded, range(len(trainer.eval_dataset)))]
    assert [w[0] for w in widths] == [sum(x != -100 for x in row) for row in labels]  # not even computed where nothing is taught

def test_evaluation_is_logged(evaluating, tmp_path):
    train(replace(evaluating, eval_steps=2))
    assert [m['step'] for m in read_metrics(tmp_path/'run') if 'eval_loss' in m] == [2, 4]

def test_evaluation_changes_nothing(cfg, evaluating, tmp_path):
    # But for the random numbers of dropout: each data loader that starts draws one.
    train(replace(cfg, lora_dropout=0.0))
    train(replace(evaluating, lora_dropout=0.0, eval_steps=1, output_dir=str(tmp_path/'evaluating')))
    assert [m['loss'] for m in steps(tmp_path/'evaluating')] == [m['loss'] for m in steps(tmp_path/'run')]


# --- checkpoints -----------------------------------------------------------------------------------------------------

STATE = {'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'trainer_state.json'}
WEIGHTS = dict(LORA={'adapter_config.json', 'adapter_model.safetensors'}, FULL={'model.safetensors', 'config.json', 'preprocessor_config.json', 'tokenizer.json', 'tokenizer_config.json'})

@pytest.mark.parametrize('kind', ['LORA', 'FULL'])
def test_checkpoint_is_complete(finished, kind):
    folder = finished(kind)
    assert sorted(p.name for p in folder.glob('*checkpoint*')) == ['checkpoint-2', 'checkpoint-4']
    for n in (2, 4): assert STATE | WEIGHTS[kind] <= {p.name for p in (folder/f'checkpoint-{n}').iterdir()}
    assert WEIGHTS[kind] <= {p.name for p in (folder/'final').iterdir()} and not STATE & {p.name for p in (folder/'final').iterdir()}
    assert not list(folder.glob('.saving*')) and not list(folder.glob('.final*')) and not list(folder.rglob('*.part'))
    assert status(folder)['state'] == 'done'

def dies_while_renaming(monkeypatch):
    real = training.os.replace
    def replace_(source, target):
        if '.saving' in str(source): raise KeyboardInterrupt
        return real(source, target)
    monkeypatch.setattr(training.os, 'replace', replace_)

def dies_after_the_weights(monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(FineTuner, '_save_optimizer_and_scheduler', interrupted)

def dies_within_the_weights(monkeypatch):
    real = training._save_adapter
    def half(model, state, out, notes):
        real(model, state, out, notes)
        (out/'adapter_model.safetensors').write_bytes((out/'adapter_model.safetensors').read_bytes()[:1000])
        raise KeyboardInterrupt
    monkeypatch.setattr(training, '_save_adapter', half)

@pytest.mark.parametrize('dies', [dies_while_renaming, dies_after_the_weights, dies_within_the_weights])
def test_run_that_dies_while_saving_leaves_no_checkpoint(cfg, tmp_path, dies):
    with pytest.MonkeyPatch.context() as m:
        dies(m)
        with pytest.raises(KeyboardInterrupt): train(cfg)
    assert not list((tmp_path/'run').glob('checkpoint-*')) and newest_checkpoint(tmp_path/'run') is None
    train(replace(cfg, resume_from_checkpoint='auto'))  # begins again, and clears up
    assert newest_checkpoint(tmp_path/'run').name == 'checkpoint-4' and not (tmp_path/'run'/'.saving').exists()
    assert [m['step'] for m in steps(tmp_path/'run')] == [1, 2, 3, 4]

def test_weights_that_come_back_different_are_noticed(cfg, monkeypatch):
    from peft import PeftModel
    saved = PeftModel.save_pretrained
    def spoil(self, out, **kwargs):
        saved(self, out, **kwargs)
        state = load_file(f'{out}/adapter_model.safetensors')
        next(iter(state.values()))[0] += 1
        save_file(state, f'{out}/adapter_model.safetensors')
    monkeypatch.setattr(PeftModel, 'save_pretrained', spoil)
    with pytest.raises(OSError, match='does not hold what was written: base_model.*Check the disk'): train(cfg)
    assert newest_checkpoint(cfg.output_dir) is None

def test_old_checkpoints_are_deleted(cfg, tmp_path):
    train(replace(cfg, max_steps=5, save_steps=1, save_total_limit=2))
    assert sorted(p.name for p in (tmp_path/'run').glob('checkpoint-*')) == ['checkpoint-4', 'checkpoint-5']

def test_newest_checkpoint_is_the_highest_number(tmp_path):
    for name in ('checkpoint-9', 'checkpoint-10', 'checkpoint-x', '.saving/checkpoint-11'): (tmp_path/name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == 'checkpoint-10' and newest_checkpoint(tmp_path/'none') is None


# --- resuming --------------------------------------------------------------------------------------------------------

def same_numbers(ours, theirs):
    "Losses, gradient norms and rates are equal, step by step."
    pick = lambda rows: [(m['step'], m['loss'], m['grad_norm'], m['learning_rate']) for m in rows]
    return pick(ours) == pick(theirs)

def interrupted_copy(folder, to):
    "The run folder as it was when the run died soon after checkpoint-2."
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns('checkpoint-4', 'final'))
    (to/'status.json').write_text(json.dumps(dict(state='failed')))
    return to

@pytest.mark.parametrize('kind', ['LORA', 'FULL'])
def test_resumed_run_goes_on_as_if_nothing_had_happened(finished, kind, tmp_path):
    # Dropout is on, so the state of the random numbers must have come back too.
    whole, again = finished(kind), interrupted_copy(finished(kind), tmp_path/'again')
    cfg = load_config(whole/'config.json')
    train(replace(cfg, output_dir=str(again), resume_from_checkpoint='auto'))
    assert same_numbers(steps(again), steps(whole))  # also: no step twice, none missing
    for file in whole.glob('final/*.safetensors'):
        ours, theirs = load_file(again/'final'/file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert status(again)['state'] == 'done'

def rates_in_use(seen):
    class Sees(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kw): seen.append({g['name']: (g['lr'], g['weight_decay']) for g in optimizer.param_groups})
    return Sees

def test_what_may_change_when_a_run_goes_on(cfg, capsys):
    how = replace(cfg, tune_vision=False, lr_scheduler_type='constant', max_steps=2, warmup_ratio=0.0)
    train(how)
    seen = []
    train(replace(how, resume_from_checkpoint='auto', max_steps=4, learning_rate=1e-5, resampler_learning_rate=1e-6, weight_decay=0.0), callbacks=(rates_in_use(seen),))
    assert seen == [{'language model': (1e-5, 0.0), 'resampler': (1e-6, 0.0), 'resampler, no decay': (1e-6, 0.0)}]*2
    assert 'from here on, language model: lr 0.001 -> 1e-05, weight_decay 0.1 -> 0' in capsys.readouterr().out
    assert [m['learning_rate'] for m in steps(Path(cfg.output_dir))] == [1e-3, 1e-3, 1e-5, 1e-5]
    kept = load_config(Path(cfg.output_dir)/'config.json') # what the newest steps were made with, to be resumed once more
    assert (kept.learning_rate, kept.max_steps, kept.resume_from_checkpoint) == (1e-5, 4, None)
    assert 'data_sha256' in json.loads((Path(cfg.output_dir)/'config.json').read_text())

@pytest.mark.slow
def test_another_rate_under_zero_2(tiny, drawn, tmp_path):
    argv = lambda **also: flags(model_name_or_path=tiny, data_path=drawn, output_dir=tmp_path/'run', lr_scheduler_type='constant', save_steps=2, deepspeed='ds_config_zero2.json', **LORA, **SPEED, **also)
    run_ranks(argv(max_steps=2, learning_rate=1e-3))
    said = run_ranks(argv(max_steps=4, learning_rate=1e-5, resume_from_checkpoint='auto')).stdout
    assert 'from here on, language model: lr 0.001 -> 1e-05' in said
    assert [m['learning_rates'] for m in steps(tmp_path/'run')] == [[1e-3]*3]*2 + [[1e-5]*3]*2

def test_more_steps_follow_the_schedule_of_all_of_them(cfg):
    how = replace(cfg, warmup_steps=0, max_steps=2)
    train(how)
    train(replace(how, resume_from_checkpoint='auto', max_steps=4))
    assert [m['learning_rate'] for m in steps(Path(cfg.output_dir))][2:] == pytest.approx([cosine(n, 1e-3, 0, 4) for n in (3, 4)])

def test_a_run_that_has_all_its_steps_only_wants_its_final(finished, tmp_path):
    whole, again = finished('LORA'), tmp_path/'again'
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns('final'))
    train(replace(load_config(whole/'config.json'), output_dir=str(again), resume_from_checkpoint='auto'))
    assert same_numbers(steps(again), steps(whole)) and newest_checkpoint(again).name == 'checkpoint-4'
    ours, theirs = (load_file(f/'final'/'adapter_model.safetensors') for f in (again, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)

def test_later_checkpoints_are_set_aside(cfg, capsys):
    run = Path(cfg.output_dir)
    train(cfg)
    class Dies(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(replace(cfg, resume_from_checkpoint=str(run/'checkpoint-2'), save_total_limit=1), callbacks=(Dies,))
    assert 'The run goes on from step 2. Set aside, and yours to delete: left-checkpoint-4' in capsys.readouterr().out
    assert newest_checkpoint(run).name == 'checkpoint-2' and (run/'left-checkpoint-4'/'adapter_model.safetensors').is_file()
    train(replace(cfg, resume_from_checkpoint='auto', save_total_limit=1))
    assert sorted(p.name for p in run.glob('*checkpoint*')) == ['checkpoint-4', 'left-checkpoint-4']

@pytest.mark.parametrize('changes, said', [(dict(lora_r=4), 'was trained with lora_r=8, and now it is lora_r=4'), (dict(lora_target_modules='llm.mlp'), "and now it is lora_target_modules='llm.mlp'"),
    (dict(tune_resampler=False), 'tune_resampler=True'), (dict(loraplus_ratio=4.0), 'loraplus_ratio=None'), (dict(optim='sgd'), "optim='adamw_torch'"),
    (dict(lr_scheduler_type='greedy'), "lr_scheduler_type='cosine'"), (dict(deepspeed='zero2'), 'was written without ZeRO.*set deepspeed=None')])
def test_what_may_not_change_when_a_run_goes_on(finished, changes, said, monkeypatch):
    monkeypatch.setattr(training, 'make_trainer', lambda cfg: pytest.fail('something was loaded'))
    cfg = replace(load_config(finished('LORA')/'config.json'), resume_from_checkpoint='auto', **changes)
    with pytest.raises(ValueError, match=said): train(cfg)
    assert status(finished('LORA'))['state'] == 'done' # nothing is said of the run that is there

@pytest.mark.parametrize('changes', [dict(optim='adamw_torch_fused'), dict(lr_scheduler_type='linear'), dict(q_lora=True), dict(tune_vision=True, lora_target_modules='llm.mlp llm.attention'), dict(hang_timeout=5, lora_dropout=.1)])
def test_what_is_the_same_to_the_optimizer_may_change(cfg, changes):
    run = Path(cfg.output_dir)
    (run/'checkpoint-2').mkdir(parents=True)
    for name in ('trainer_state.json', 'optimizer.pt'): (run/'checkpoint-2'/name).touch()
    old = replace(cfg, resume_from_checkpoint='auto', tune_vision='tune_vision' in changes, lora_target_modules='llm.attention llm.mlp')
    save_config(old, run/'config.json')
    check_resume(replace(old, **changes))
    (run/'config.json').write_text('[]') # nothing is known of it
    check_resume(replace(old, lora_r=4))

def test_checkpoints_on_another_disk(cfg, eval_file, tmp_path):
    cfg = replace(cfg, eval_data_path=str(eval_file), do_eval=True, eval_steps=2)
    train(cfg)
    best = json.loads((Path(cfg.output_dir)/'checkpoint-4/trainer_state.json').read_text())['best_global_step']
    there = (tmp_path/'other').resolve(); there.mkdir()
    shutil.move(Path(cfg.output_dir)/'checkpoint-4', there/'checkpoint-4'); (Path(cfg.output_dir)/'checkpoint-4').symlink_to(there/'checkpoint-4')
    class Sees(TrainerCallback):
        def on_train_begin(self, args, state, control, **kw): assert state.best_global_step == best; seen.append(best)
    seen = []
    train(replace(cfg, resume_from_checkpoint='auto', max_steps=5), callbacks=(Sees,))
    assert seen == [best] and best

def test_saving_and_logging_as_often_as_now(cfg):
    run = Path(cfg.output_dir)
    train(replace(cfg, max_steps=2))
    train(replace(cfg, resume_from_checkpoint='auto', max_steps=6, save_steps=1, logging_steps=2))
    assert [p.name for p in checkpoints(run)] == [f'checkpoint-{n}' for n in (2, 3, 4, 5, 6)] and [m['step'] for m in steps(run)] == [1, 2, 4, 6]

def test_a_trainer_of_its_own_goes_on(cfg):
    train(replace(cfg, max_steps=2))
    trainer = make_trainer(replace(cfg, max_steps=3))
    trainer.train(resume_from_checkpoint=str(Path(cfg.output_dir)/'checkpoint-2'))
    assert trainer.state.global_step == 3

def test_settings_are_kept_when_training_begins_and_not_before(cfg, monkeypatch):
    train(replace(cfg, max_steps=2))
    monkeypatch.setattr(FineTuner, 'train', lambda *args, **kw: (_ for _ in ()).throw(RuntimeError('never began')))
    with pytest.raises(RuntimeError, match='never began'): train(replace(cfg, max_steps=9, resume_from_checkpoint='auto'))
    assert load_config(Path(cfg.output_dir)/'config.json').max_steps == 2

def test_left_checkpoints_are_never_deleted(tmp_path):
    for n in (1, 2):
        (tmp_path/'checkpoint-4').mkdir()
        assert set_aside(tmp_path, 0) == [f'left-checkpoint-4{"" if n == 1 else "-2"}']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['left-checkpoint-4', 'left-checkpoint-4-2']

def test_a_split_optimizer_wants_its_processes(tmp_path):
    folder = tmp_path/'checkpoint-3'; (folder/'global_step3').mkdir(parents=True)
    (folder/'trainer_state.json').write_text('{}')
    for rank in range(2): (folder/f'global_step3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt').touch()
    cfg = Config('model', 'data', use_lora=True, resume_from_checkpoint=str(folder), deepspeed='ds_config_zero2.json')
    check_resume(cfg, 2); check_resume(cfg)
    with pytest.raises(ValueError, match='split over 2 processes, and DeepSpeed cannot split it anew for 4: set gpus=2'): check_resume(cfg, 4)
    with pytest.raises(ValueError, match='cannot split it anew for 4: take machines that have 2 together'): check_resume(replace(cfg, nnodes=2), 4)
    with pytest.raises(ValueError, match='was written with bf16=False'): check_resume(replace(cfg, bf16=True), 2)
    for other, how in (('ds_config_zero3.json', 'by ZeRO-2'), (None, 'by ZeRO-2')):
        with pytest.raises(ValueError, match=f"was written {how}.*set deepspeed='ds_config_zero2.json'"): check_resume(replace(cfg, deepspeed=other), 2)

def test_the_mean_of_a_log_line_with_more_ranks(cfg, tmp_path, monkeypatch):
    for rank, total in enumerate((3., 5.)): (tmp_path/f'loss_{rank}.json').write_text(json.dumps(dict(sum=total, logged=2)))
    monkeypatch.setattr(training.Trainer, '_load_rng_state', lambda *args: None)
    def kept(rank, world):
        trainer = object.__new__(FineTuner)
        trainer.args, trainer._tr_loss = SimpleNamespace(process_index=rank, world_size=world), torch.zeros(())
        trainer._load_rng_state(tmp_path)
        return trainer
    assert [kept(rank, 2)._tr_loss.item() for rank in range(2)] == [3., 5.]
    assert {kept(rank, 4)._tr_loss.item() for rank in range(4)} == {4.} and kept(0, 1)._globalstep_last_logged == 2

@pytest.mark.parametrize('changes, said', [(dict(lr_scheduler_type='cosin'), 'Did you mean cosine'), (dict(lr_scheduler_type='warmup_stable_decay'), 'needs settings that are not part'), (dict(optim='adam'), 'Did you mean adamw_torch'),
    (dict(lora_target_modules='foo'), 'matches no linear layer'), (dict(lora_target_modules='resampler'), 'tune_resampler=False')])
def test_what_cannot_work_is_said_before_the_model_is_loaded(cfg, changes, said, monkeypatch):
    monkeypatch.setattr(training, 'prepare_model', lambda *args: pytest.fail('the model was loaded'))
    with pytest.raises(ValueError, match=said): train(replace(cfg, **changes))

def test_paths_from_home(cfg, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    there = training.with_folder(replace(cfg, data_path='~/a.json', deepspeed='~/zero2.json', resume_from_checkpoint='~/run/checkpoint-1', output_dir='~/run'))
    assert (there.data_path, there.deepspeed, there.resume_from_checkpoint, there.output_dir) == tuple(f'{tmp_path}/{p}' for p in ('a.json', 'zero2.json', 'run/checkpoint-1', 'run'))

def test_random_numbers_matter_here(finished, tmp_path):
    # The test above would also pass without restoring them, if nothing depended on them.
    again = interrupted_copy(finished('LORA'), tmp_path/'again')
    torch.save(torch.load(again/'checkpoint-2'/'rng_state.pth', weights_only=False) | dict(cpu=torch.Generator().manual_seed(5).get_state()), again/'checkpoint-2'/'rng_state.pth')
    train(replace(load_config(again/'config.json'), output_dir=str(again), resume_from_checkpoint='auto'))
    assert not same_numbers(steps(again)[2:], steps(finished('LORA'))[2:])


# --- what is logged --------------------------------------------------------------------------------------------------

def test_every_step_is_logged(finished):
    rows = steps(finished('LORA'))
    assert [m['step'] for m in rows] == [1, 2, 3, 4]
    for m in rows:
        assert {'loss', 'grad_norm', 'learning_rate', 'learning_rates', 'tokens_per_second', 'samples_per_second', 'memory_gb', 'epoch', 'time'} <= m.keys()
        assert min(m['grad_norm'], m['tokens_per_second'], m['samples_per_second'], m['memory_gb']) > 0

def cosine(step, rate, warmup, total):
    "The rate with which a step is made, counted from 1: up in a straight line, then half a cosine down."
    done = step - 1
    if done < warmup: return rate*done/warmup
    return rate*0.5*(1 + math.cos(math.pi*(done-warmup)/(total-warmup)))

def rates_follow(rows, rate, warmup):
    want = [cosine(m['step'], rate, warmup, len(rows)) for m in rows]
    assert [m['learning_rate'] for m in rows] == pytest.approx(want, rel=1e-5, abs=1e-20)
    for m, w in zip(rows, want): assert m['learning_rates'] == pytest.approx([w]*len(m['learning_rates']), rel=1e-5, abs=1e-20)

def test_cosine_schedule(finished): rates_follow(steps(finished('FULL')), 1e-3, 2)

def test_warmup_over_the_whole_run(cfg, tmp_path):
    # A share of 1 is all steps, not one step.
    train(replace(cfg, warmup_ratio=1.0, save_strategy='no'))
    assert [m['learning_rate'] for m in steps(tmp_path/'run')] == pytest.approx([0, .25e-3, .5e-3, .75e-3])

def test_schedule_and_evaluation_under_zero_2(tiny, drawn, eval_file, direct_loss, tmp_path):
    # A scheduler in DeepSpeed's JSON would replace the one asked for without a word; ours has none.
    argv = flags(model_name_or_path=tiny, data_path=drawn, eval_data_path=eval_file, do_eval='true', eval_steps=6, per_device_eval_batch_size=2, output_dir=tmp_path, max_steps=6,
        learning_rate=1e-9, lr_scheduler_type='cosine', warmup_steps=2, use_cpu='true', use_lora='true', dataloader_num_workers=0, save_strategy='no', deepspeed='ds_config_zero2.json')
    run_ranks(argv, 2)
    rates_follow(steps(tmp_path), 1e-9, 2)
    assert [m['eval_loss'] for m in read_metrics(tmp_path) if 'eval_loss' in m] == pytest.approx([direct_loss], abs=1e-5)

@pytest.mark.slow
def test_evaluation_under_zero_3(tiny, drawn, eval_file, direct_loss, tmp_path):
    argv = flags(model_name_or_path=tiny, data_path=drawn, eval_data_path=eval_file, do_eval='true', eval_steps=1, per_device_eval_batch_size=2, output_dir=tmp_path, max_steps=1,
        learning_rate=1e-9, use_cpu='true', use_lora='true', dataloader_num_workers=0, save_strategy='no', deepspeed='ds_config_zero3.json')
    run_ranks(argv, 2)
    assert [m['eval_loss'] for m in read_metrics(tmp_path) if 'eval_loss' in m] == pytest.approx([direct_loss], abs=1e-5)


# --- what is saved ---------------------------------------------------------------------------------------------------

def test_adapter_has_the_official_names(golden, drawn, tmp_path):
    # Against an adapter that the original code wrote with PEFT 0.11.
    cfg = Config(str(golden), str(drawn), output_dir=str(tmp_path), tune_vision=True, tune_embeddings=True, **LORA, **SPEED)
    save_final(make_trainer(cfg))
    shapes = lambda folder: {n: t.shape for n, t in load_file(folder/'adapter_model.safetensors').items()}
    ours, official = shapes(tmp_path/'final'), shapes(GOLDENS/'adapter_2.5')
    assert ours == official and any('.vpm.' in n for n in ours) and any('.resampler.' in n for n in ours)
    read = lambda folder: json.loads((folder/'adapter_config.json').read_text())
    for key in ('r', 'lora_alpha', 'target_modules', 'peft_type', 'bias', 'use_dora', 'use_rslora'): assert read(tmp_path/'final')[key] == read(GOLDENS/'adapter_2.5')[key]
    assert set(read(tmp_path/'final')['modules_to_save']) == set(read(GOLDENS/'adapter_2.5')['modules_to_save'])

def test_adapter_in_plain_peft_gives_the_logits_of_training(cfg, tiny, drawn):
    from peft import PeftModel
    trainer = make_trainer(replace(cfg, tune_vision=True, learning_rate=1e-2, save_strategy='no'))
    trainer.train()
    batch, _ = one_batch(tiny, drawn)
    trained = trainer.model.eval()
    read = PeftModel.from_pretrained(load(tiny), save_final(trainer)).eval()
    with torch.no_grad(): theirs, ours, untrained = (m(**batch)['logits'] for m in (trained, read, load(tiny)))
    assert torch.equal(ours, theirs) and (ours - untrained).abs().max() > 0.1

def test_full_training_gives_a_checkpoint_in_official_layout(finished, tiny, drawn):
    final, batch = finished('FULL')/'final', one_batch(tiny, drawn)[0]
    assert load_file(final/'model.safetensors').keys() == load_file(tiny/'model.safetensors').keys()
    with torch.no_grad(): trained, untrained = (load(f)(**batch)['logits'] for f in (final, tiny))
    assert (trained - untrained).abs().max() > 1e-3

def test_frozen_parts_stay_as_they_were(cfg, tiny, tmp_path):
    train(replace(cfg, use_lora=False, tune_resampler=True, save_strategy='no'))
    before, after = load_file(tiny/'model.safetensors'), load_file(tmp_path/'run'/'final'/'model.safetensors')
    moved = {n.split('.')[0] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {'resampler'}

def test_run_folder_says_how_to_repeat_the_run(finished, tiny, drawn):
    facts = json.loads((finished('LORA')/'config.json').read_text())
    assert facts['versions']['torch'] == version('torch') and len(facts['data_sha256']['data_path']) == 64
    again = load_config(finished('LORA')/'config.json')
    assert (again.model_name_or_path, again.data_path, again.max_steps) == (str(tiny), str(drawn), 4)

def test_commit_of_a_hub_model_is_recorded(cfg, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'resolve', lambda name, revision: (tiny, '0123abc'))
    train(replace(cfg, model_name_or_path='owner/model', max_steps=1, save_strategy='no'))
    assert json.loads((tmp_path/'run'/'config.json').read_text())['model_commit'] == '0123abc'


# --- precision -------------------------------------------------------------------------------------------------------

def test_fp16_without_a_gpu_is_float32(cfg, capsys):
    trainer = make_trainer(replace(cfg, fp16=True))
    assert capsys.readouterr().out.splitlines().count('fp16 needs a GPU: training in float32.') == 1
    assert not trainer.args.fp16 and {p.dtype for p in trainer.model.parameters()} == {torch.float32}

def test_fp16_with_a_gpu_stays(cfg):
    half = replace(cfg, fp16=True)
    assert fit_precision(half, gpu=True) == (half, [])

def test_bf16_on_a_gpu_without_it(cfg):
    with pytest.raises(ValueError, match='This GPU has no bfloat16: set fp16=True, bf16=False.'): fit_precision(replace(cfg, bf16=True), gpu=True, gpu_bf16=False)

def test_bf16_keeps_what_trains_in_float32(cfg):
    trainer = make_trainer(replace(cfg, bf16=True))
    kinds = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert math.isfinite(trainer.train().training_loss)

@pytest.mark.parametrize('stage, marked', [(2, set()), (3, {'TowerLayer', 'LlamaDecoderLayer'})])
def test_zero_3_gathers_layer_by_layer(cfg, tiny, stage, marked):
    from deepspeed.utils import get_z3_leaf_modules
    model = training.prepare_model(replace(cfg, deepspeed=f'ds_config_zero{stage}.json', lora_target_modules='llm.attention vision'), tiny)
    assert {type(m).__name__ for m in get_z3_leaf_modules(model)} == marked

def test_zero_3_that_would_keep_the_weights_is_refused(tmp_path):
    from minicpmv_nb.config import deepspeed_json, full
    (tmp_path/'mine.json').write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(ValueError, match='set stage3_gather_16bit_weights_on_model_save to true'): deepspeed_json(full('m', 'd', deepspeed=str(tmp_path/'mine.json')))

def test_a_run_inside_the_model_folder_is_not_copied_into_itself(tiny, tmp_path):
    import shutil
    from minicpmv_nb.model import load, write_checkpoint
    base = shutil.copytree(tiny, tmp_path/'base'); (base/'checkpoint-7').mkdir(); (base/'optimizer.pt').write_bytes(b'')
    out = base/'out'/'final'
    write_checkpoint(load(base).state_dict(), base, out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in tiny.iterdir())


# --- one folder, one run ---------------------------------------------------------------------------------------------

def test_a_used_folder_is_not_trained_in_again(cfg):
    train(cfg)
    before = {p: p.read_bytes() for p in Path(cfg.output_dir).rglob('*') if p.is_file()}
    with pytest.raises(FileExistsError, match='holds another run already. Use another output_dir, or go on with that one'): train(replace(cfg, learning_rate=1e-5))
    assert before == {p: p.read_bytes() for p in before} # nor is anything said of it
    (Path(cfg.output_dir)/'checkpoint-4').rename(Path(cfg.output_dir)/'checkpoint-4-good')
    assert newest_checkpoint(cfg.output_dir).name == 'checkpoint-2' # a copy is the user's

def test_a_failure_in_this_process_is_in_the_status(cfg):
    class Breaks(TrainerCallback):
        def on_step_end(self, *args, **kw): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(cfg, callbacks=(Breaks,))
    said = read_status(cfg.output_dir)
    assert said['state'] == 'failed' and 'KeyboardInterrupt' in said['error']

def test_evaluating_does_not_count_against_the_throughput(cfg, eval_file, monkeypatch):
    marks = [] # from when on the log counts: moved by as long as evaluating took
    class Slow(training.RunLog):
        def on_prediction_step(self, *args, **kw): marks.append(self.mark); time.sleep(.05)
        def on_evaluate(self, *args, **kw): marks.append(self.mark)
    monkeypatch.setattr(training, 'RunLog', Slow)
    train(replace(cfg, max_steps=1, do_eval=True, eval_data_path=str(eval_file), eval_steps=1))
    assert len(marks) > 2 and len(set(marks[:-1])) == 1 and marks[-1]-marks[0] >= .05*(len(marks)-1)
