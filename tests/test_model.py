"The model's own messages: broken files, wrong bounds, leftovers; and where an answer ends."
import json, shutil
from pathlib import Path

import pytest
import torch

from minicpmv_nb.model import aside, code_note, complete, copy_rest, fingerprint, generate, load, place, save
from support import QUESTION

BATCH = dict(pixel_values=torch.zeros(1, 3, 14, 84, dtype=torch.uint8), target_sizes=torch.tensor([[2, 3]]), slices_per_sample=torch.tensor([1]))


@pytest.mark.parametrize('read', [load, fingerprint])
def test_truncated_shard_is_named(tiny, tmp_path, read):
    folder = save(load(tiny).state_dict(), tiny, tmp_path/'sharded', max_shard='1MB')
    shard = sorted(folder.glob('*.safetensors'))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f'{shard.name} is not a complete safetensors file .*: download it again'): read(folder)

def test_the_best_message_about_a_folder_comes_first(tmp_path):
    with pytest.raises(FileNotFoundError, match='Give the path of a downloaded checkpoint'): load(tmp_path/'nowhere')
    (tmp_path/'adapter_config.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='is an adapter, not a checkpoint'): load(tmp_path)

def test_without_end_tokens_an_answer_goes_on(tiny):
    # transformers fills what a call leaves open from the model's own settings, which come from config.json.
    config = json.loads((tiny/'config.json').read_text())
    model = load(tiny)
    assert config['eos_token_id'] is not None and model.llm.generation_config.eos_token_id is None
    inputs = BATCH | dict(input_ids=torch.arange(40)[None], image_bound=torch.tensor([[5, 21]]))
    first = generate(model, inputs, [], max_new_tokens=6)
    assert len(first) == 6 and generate(model, inputs, [first[2]], max_new_tokens=6) == first[:first.index(first[2])]

@pytest.mark.parametrize('bound', [[5, 20], [5, 22]])
def test_bounds_of_another_length(tiny, bound):
    with pytest.raises(ValueError, match=f'A piece has {bound[1]-5} placeholders .*, and this model gives it 16 vectors'): load(tiny)(input_ids=torch.arange(40)[None], image_bound=torch.tensor([bound]), **BATCH)

def test_bounds_of_another_count(tiny):
    with pytest.raises(ValueError, match='image_bound has 2 rows, and the tower saw 1 pieces'): load(tiny)(input_ids=torch.arange(40)[None], image_bound=torch.tensor([[1, 17], [20, 36]]), **BATCH)
    with pytest.raises(ValueError, match='image_bound has 1 rows'): place(torch.zeros(1, 6, 1), torch.zeros(2, 2, 1), torch.tensor([[1, 3]]))

def test_what_lies_beside_is_left_alone(tmp_path):
    mine = tmp_path/'out.part'; mine.mkdir(); (mine/'thesis.txt').write_text('x')
    part = aside(tmp_path/'out')
    assert part.parent == tmp_path and part != mine and (mine/'thesis.txt').is_file()
    (part/'a').write_text('x'); base = shutil.copytree(tmp_path, tmp_path.with_name('base'))
    copy_rest(base, tmp_path.with_name('copy'))
    assert not list(tmp_path.with_name('copy').rglob('a'))

def test_runs_inside_a_base_are_left_alone(tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path/'base')); run = base/'runs'/'one'
    (run/'final').mkdir(parents=True); (base/'assets').mkdir()
    for file in (run/'status.json', run/'log.txt', run/'final'/'adapter_config.json', base/'assets'/'logo.txt'): file.write_text('{}')
    copy_rest(base, tmp_path/'copy')
    assert not list(tmp_path.glob('copy/**/log.txt')) and not list(tmp_path.glob('copy/**/adapter_config.json')) and (tmp_path/'copy'/'assets'/'logo.txt').is_file()

def test_after_an_error_nothing_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete(tmp_path/'out'): raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())

def test_home_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    assert save(load(tiny).state_dict(), tiny, '~/copy') == tmp_path/'copy' and (tmp_path/'copy'/'config.json').is_file() and not (tmp_path/'~').exists()

def test_what_a_download_left_out_is_said(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path/'base'))
    assert code_note(folder) is None # nothing is named
    def name(file, **maps): (folder/file).write_text(json.dumps(json.loads((folder/file).read_text()) | dict(auto_map=maps)))
    name('config.json', AutoConfig='configuration_minicpm.MiniCPMVConfig', AutoModel='modeling_minicpmv.MiniCPMV', AutoModelForCausalLM='modeling_minicpmv.MiniCPMV')
    name('tokenizer_config.json', AutoTokenizer=['tokenization_minicpmv_fast.Fast', None]); name('preprocessor_config.json', AutoProcessor='openbmb/MiniCPM-V-2_6--processing_minicpmv.Processor')
    found, do = code_note(folder, 'my model')
    assert 'configuration_minicpm.py, modeling_minicpmv.py, tokenization_minicpmv_fast.py.' in found and do.endswith("hf download openbmb/MiniCPM-Llama3-V-2_5 --include '*.py' --local-dir 'my model'")
    for file in ('configuration_minicpm.py', 'modeling_minicpmv.py', 'tokenization_minicpmv_fast.py'): (folder/file).touch()
    assert code_note(folder) is None
