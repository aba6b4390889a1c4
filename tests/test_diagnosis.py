"A healthy folder is found healthy, every sickness has its row, and no weight is read."
import json, os, shutil, struct, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpmv_nb.quantizing import quantize
from minicpmv_nb.tuning import memory
from minicpmv_nb.estimating import estimate
from minicpmv_nb.diagnosis import CHECKS, COMPILER, EXTRAS, HEADER, MACHINE_CHECKS, METHODS, NINJA, ON_TOP, Folder, Machine, both_ways, build_tools, doctor, faults, fits, main, memory_table, needed, this_machine, training_counts
from minicpmv_nb.families import FAMILIES
from minicpmv_nb.model import load, save, write_checkpoint
from minicpmv_nb.training import prepare_model
from support import golden_checkpoint

CARDS = Machine((('card', 80.0),)*2, True, 100, 1000)
every_family = pytest.mark.parametrize('name', FAMILIES)


@pytest.fixture(scope='module')
def healthy(bases): return bases

@pytest.fixture(scope='module')
def sharded(healthy, tmp_path_factory):
    "The one of 2.6 in several files."
    return save(load(healthy['2.6']).state_dict(), healthy['2.6'], tmp_path_factory.mktemp('sharded')/'2.6', max_shard='1MB')

@pytest.fixture
def sick(healthy, tmp_path):
    "A copy of 2.6 to be broken."
    return Path(shutil.copytree(healthy['2.6'], tmp_path/'sick'))

@pytest.fixture
def shards(sharded, tmp_path):
    "A copy of the one in several files."
    return Path(shutil.copytree(sharded, tmp_path/'sick'))

def rows(folder, what, verdict='wrong'): return [r['found'] for r in doctor(folder, machine=CARDS).rows if (r['what'], r['verdict']) == (what, verdict)]

def wrong(folder):
    "What is wrong, by what was looked at."
    return {r['what']: r['found'] for r in doctor(folder, machine=CARDS).rows if r['verdict'] == 'wrong'}

def change(file, drop=(), **values):
    content = json.loads(file.read_text(encoding='utf-8')) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}), encoding='utf-8')

def change_tensors(folder, edit):
    state = load_file(folder/'model.safetensors')
    edit(state)
    save_file(state, folder/'model.safetensors')

def change_tokens(folder, edit):
    content = json.loads((folder/'tokenizer.json').read_text(encoding='utf-8'))
    edit({t['content']: t for t in content['added_tokens']}, content['added_tokens'])
    (folder/'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')


# --- healthy folders -------------------------------------------------------------------------------------------------

@every_family
def test_healthy(healthy, name):
    d = doctor(healthy[name], machine=CARDS)
    assert d.ok and d.complaints() == '' and len(d.needs) == 9
    seen = {r['what'] for r in d.rows if r['about'] == 'folder'}
    assert seen == set(CHECKS)

@pytest.mark.parametrize('version', ['2.0', '2.5', '2.6', '4.0', '4.5'])
def test_golden_folders_are_healthy(tmp_path, version):
    assert wrong(golden_checkpoint(tmp_path/version, version)) == {}

def test_several_files(sharded):
    assert doctor(sharded, machine=CARDS).ok and len(list(sharded.glob('*.safetensors'))) > 1
    assert rows(sharded, 'index', 'ok')[0].startswith('89 tensors in')

def test_what_training_saves_is_healthy(healthy, tmp_path):
    write_checkpoint(load(healthy['2.6']).state_dict(), healthy['2.6'], tmp_path/'saved', max_slices=4)
    assert 'max_slice_nums 4' in rows(tmp_path/'saved', 'pictures', 'ok')[0]

def test_result_is_plain_data(healthy):
    d = doctor(healthy['2.6'], machine=CARDS)
    assert json.loads(json.dumps([d.rows, d.needs])) == [d.rows, d.needs]
    assert all(set(r) == {'about', 'what', 'verdict', 'found', 'do'} and r['verdict'] in ('ok', 'note', 'wrong') for r in d.rows)

def test_text_and_html(sick):
    change(sick/'config.json', version='<b>')
    d = doctor(sick, machine=CARDS)
    assert max(len(line) for line in str(d).splitlines()) <= max(100, 21 + len(str(sick)) + 40)
    assert '<b>&#x27;' not in d._repr_html_() and '&lt;b&gt;' in d._repr_html_() and '1 wrong' in str(d).splitlines()[0]

def test_unconfirmed_family_and_parts_left_out_are_notes(healthy):
    assert 'Not compared with the published files' in rows(healthy['o-2.6'], 'config.json', 'note')[0]
    assert rows(healthy['o-2.6'], 'tensors', 'note') == ['3 tensors of apm, audio_projection_layer, tts are left out here; saving and merging keep them.']
    assert rows(healthy['2.6'], 'config.json', 'note') == []

def published(folder, tiny, family):
    "A checkpoint of the published sizes in two files, whose data is a hole."
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns('*.safetensors'))
    (folder/'config.json').write_text(json.dumps(family.official))
    if family.processor_file: change(folder/'preprocessor_config.json', scale_resolution=448, image_feature_size=family.official['query_num'])
    shapes = list(Folder(folder).model.state_dict().items())
    names = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    for name, part in zip(names, (shapes[::2], shapes[1::2])):
        header, end = {}, 0
        for n, p in part:
            header[n] = dict(dtype='BF16', shape=list(p.shape), data_offsets=[end, end := end + 2*p.numel()])
        text = json.dumps(header).encode()
        with open(folder/name, 'wb') as f: f.write(struct.pack('<Q', len(text)) + text); f.truncate(8 + len(text) + end)
    index = dict(metadata=dict(total_size=2*sum(p.numel() for _, p in shapes)), weight_map={n: names[i % 2] for i, (n, _) in enumerate(shapes)})
    (folder/'model.safetensors.index.json').write_text(json.dumps(index))
    return folder

@pytest.mark.parametrize('name', ['2.0', '4.5'])
def test_published_sizes_without_reading_a_weight(healthy, tmp_path, name):
    f = FAMILIES[name]
    d = doctor(published(tmp_path/name, healthy[name], f), machine=CARDS)
    assert d.ok, d.complaints()
    found = {r['what']: r['found'] for r in d.rows}
    assert found['parameters'] == f'{f.parameters:,} in the files, the published number.' and found['precision'] == f'Parameters: {f.parameters:,} in bfloat16.'
    assert f'{f.parameters*2/1e9:.1f} GB' in found['weight files'] and found['settings'].startswith('The published sizes')

def test_no_tensor_is_read(sharded, tmp_path, monkeypatch):
    # What is behind the header is a hole: a read would give zeros, which nobody would notice. So reading is watched too.
    folder = Path(shutil.copytree(sharded, tmp_path/'hollow'))
    before = str(doctor(folder, machine=CARDS))
    for file in folder.glob('*.safetensors'):
        size, data = file.stat().st_size, 8 + struct.unpack('<Q', file.read_bytes()[:8])[0]
        os.truncate(file, data); os.truncate(file, size)
    def refuse(*args, **kwargs): raise AssertionError('a tensor was read')
    for name in ('load_file', 'load'): monkeypatch.setattr(f'safetensors.torch.{name}', refuse)
    monkeypatch.setattr('minicpmv_nb.model.load', refuse); monkeypatch.setattr('minicpmv_nb.merging.rows', refuse)
    assert str(doctor(folder, machine=CARDS)) == before and 'nothing is wrong' in before

def test_code_in_the_folder_is_not_run(sick):
    for name in ('modeling_minicpmv.py', 'tokenization_minicpmv_fast.py'): (sick/name).write_text('raise SystemExit("run")')
    change(sick/'config.json', auto_map=dict(AutoModel='modeling_minicpmv.MiniCPMV')); change(sick/'tokenizer_config.json', auto_map=dict(AutoTokenizer=['tokenization_minicpmv_fast.X', None]))
    assert rows(sick, 'other files', 'note') == ['2 Python files (modeling_minicpmv.py, tokenization_minicpmv_fast.py). They are never run here; saving and merging copy them for other programs.']
    assert wrong(sick) == {}


# --- config.json -----------------------------------------------------------------------------------------------------

def test_no_such_folder(tmp_path):
    d = doctor(tmp_path/'none', machine=CARDS)
    assert not d.ok and 'There is no folder' in d.complaints()

def test_no_config(sick):
    (sick/'config.json').unlink()
    found = wrong(sick)
    assert found.keys() == {'config.json'} and 'has no config.json, so it is not a checkpoint folder' in found['config.json']
    assert 'settings' in rows(sick, 'not examined', 'note')[0] and rows(sick, 'weight files', 'ok')

@pytest.mark.parametrize('content', ['{"version": 2.6,', '[]', 'null', '\x00\xff'])
def test_broken_config(sick, content):
    (sick/'config.json').write_text(content, encoding='latin-1')
    assert wrong(sick).keys() == {'config.json'}

@pytest.mark.parametrize('changes, said', [(dict(version=9.9), 'version is 9.9. Unknown version. Supported: 2.0'), (dict(model_type='llama'), "model_type is 'llama', not 'minicpmv' or 'minicpmo'")])
def test_unknown_family(sick, changes, said):
    change(sick/'config.json', **changes)
    d = doctor(sick, machine=CARDS)
    assert not d.ok and f'{sick}/config.json' in wrong(sick)['config.json'] and said in wrong(sick)['config.json'] and not d.needs

@pytest.mark.parametrize('key', ['hidden_size', 'query_num', 'rope_theta'])
def test_missing_setting(sick, key):
    change(sick/'config.json', drop=(key,))
    assert wrong(sick) == {'settings': f'config.json has no {key}.'}

def test_missing_vision_setting(sick):
    vision = json.loads((sick/'config.json').read_text())['vision_config']
    change(sick/'config.json', vision_config={k: v for k, v in vision.items() if k != 'patch_size'})
    assert wrong(sick) == {'settings': 'config.json has no vision_config.patch_size.'}

def test_unknown_vision_encoder(healthy, tmp_path):
    sick = Path(shutil.copytree(healthy['2.0'], tmp_path/'sick'))
    change(sick/'config.json', drop=('vision_config',), vision_encoder='vit_giant')
    assert "vision_encoder is 'vit_giant', whose sizes are not known here" in wrong(sick)['settings']

def test_sizes_no_model_can_have(sick):
    change(sick/'config.json', hidden_size='many')
    assert wrong(sick).keys() == {'settings'}

def test_nothing_to_train(sick):
    change(sick/'config.json', num_hidden_layers=0)
    d = doctor(sick, machine=CARDS)
    assert 'matches no linear layer' in wrong(sick)['training'] and not d.needs and not d.ok

def test_not_the_published_size(sick):
    assert rows(sick, 'settings', 'note')[0].startswith('Not the published sizes: hidden_size 128 instead of 3584')


# --- weight files ----------------------------------------------------------------------------------------------------

def test_missing_shard(shards):
    (shards/'model-00002-of-00004.safetensors').unlink()
    assert wrong(shards).keys() == {'weight files'}
    assert 'lacks model-00002-of-00004.safetensors, named in model.safetensors.index.json' in wrong(shards)['weight files']
    assert len(doctor(shards, machine=CARDS).needs) == 9 # known all the same

def test_no_weights(sick):
    (sick/'model.safetensors').unlink()
    assert 'has no model.safetensors.' in wrong(sick)['weight files']

def test_only_pickles(sick):
    (sick/'model.safetensors').rename(sick/'pytorch_model.bin')
    assert 'It has .bin files, which are pickles and not read here: convert them to safetensors.' in wrong(sick)['weight files']
    assert '1 .bin files (pytorch_model.bin)' in rows(sick, 'other files', 'note')[0]

def test_truncated(sick):
    file = sick/'model.safetensors'
    size = file.stat().st_size
    os.truncate(file, size-1)
    assert wrong(sick) == {'weight files': f'model.safetensors is cut off: {size-1:,} of {size:,} bytes.'}

def test_truncated_and_missing_shards_are_both_named(shards):
    os.truncate(shards/'model-00001-of-00004.safetensors', 20_000); (shards/'model-00003-of-00004.safetensors').unlink()
    found = rows(shards, 'weight files')
    assert len(found) == 2 and found[0].startswith('model-00001-of-00004.safetensors is cut off: 20,000 of') and 'lacks model-00003' in found[1]

def test_longer_than_its_header_says(sick):
    with open(sick/'model.safetensors', 'ab') as f: f.write(b'more')
    assert wrong(sick) == {'weight files': 'model.safetensors is 4 bytes longer than its header says.'}

def test_git_lfs_pointer(shards):
    file = shards/'model-00004-of-00004.safetensors'
    file.write_text(f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0"*64}\nsize 4976687216\n')
    [r] = [r for r in doctor(shards, machine=CARDS).rows if r['verdict'] == 'wrong']
    assert r['found'] == 'model-00004-of-00004.safetensors is a git-lfs pointer of 135 bytes, not the weights.' and 'git lfs pull' in r['do']

@pytest.mark.parametrize('content', [b'', b'<html>404</html>', b'\x10' + b'\0'*7 + b'no json at all!!', b'\x02' + b'\0'*7 + b'[]', struct.pack('<Q', 24) + b'{"a": {"dtype": "F32"}} '])
def test_no_safetensors_file(sick, content):
    (sick/'model.safetensors').write_bytes(content)
    assert wrong(sick).keys() == {'weight files'} and 'model.safetensors' in wrong(sick)['weight files']

def test_header_that_contradicts_itself(sick):
    header = json.dumps(dict(a=dict(dtype='F32', shape=[3], data_offsets=[0, 4]))).encode()
    (sick/'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + b'\0'*4)
    assert 'has a broken header' in wrong(sick)['weight files']

def test_type_of_numbers_that_is_not_known(sick):
    change_tensors(sick, lambda s: s.update(x=torch.zeros(4, dtype=torch.float8_e4m3fn)))
    assert "numbers of a type that is not known here ('F8_E4M3'): checkpoints quantised in this way are not supported" in wrong(sick)['weight files']

def test_broken_index(shards):
    (shards/'model.safetensors.index.json').write_text('{"weight_map":')
    assert 'model.safetensors.index.json is not valid JSON' in wrong(shards)['weight files']

def test_single_file_beside_an_index(shards, healthy):
    shutil.copy(healthy['2.6']/'model.safetensors', shards)
    assert wrong(shards) == {} and 'There is model.safetensors beside the files of the index' in rows(shards, 'weight files', 'note')[0]


# --- tensors ---------------------------------------------------------------------------------------------------------

def test_tensor_missing(sick):
    change_tensors(sick, lambda s: s.pop('llm.model.norm.weight'))
    assert '1 tensor missing: llm.model.norm.weight' in wrong(sick)['tensors']

def test_tensors_unexpected(sick):
    change_tensors(sick, lambda s: s.update({f'extra.{i}': torch.zeros(1) for i in range(7)}))
    assert '7 tensors unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 ...' in wrong(sick)['tensors']

def test_tensor_of_another_shape(sick):
    change(sick/'config.json', query_num=8)
    assert 'resampler.query (16, 128) instead of (8, 128)' in wrong(sick)['tensors'] and 'image_feature_size is 16, config.json says 8' in wrong(sick)['pictures']

def test_index_names_the_wrong_file(shards):
    index = json.loads((shards/'model.safetensors.index.json').read_text())
    name, file = next(iter(index['weight_map'].items()))
    index['weight_map'][name] = next(f for f in index['weight_map'].values() if f != file)
    (shards/'model.safetensors.index.json').write_text(json.dumps(index))
    assert f'1 tensor missing: {name}' in wrong(shards)['tensors']

def test_published_number_of_parameters_is_compared(healthy, tmp_path):
    folder = published(tmp_path/'2.6', healthy['2.6'], FAMILIES['2.6'])
    index = json.loads((folder/'model.safetensors.index.json').read_text())
    index['weight_map'].pop('llm.model.norm.weight')
    (folder/'model.safetensors.index.json').write_text(json.dumps(index))
    assert wrong(folder)['parameters'] == '8,099,171,568 in the files instead of the published 8,099,175,152.'
    assert rows(folder, 'index', 'note')[0].startswith('1 tensors in the files are not in the index, so they are not loaded: llm.model.norm.weight')

def test_several_types_are_a_note(sick):
    change_tensors(sick, lambda s: s.update({'resampler.query': s['resampler.query'].half()}))
    assert wrong(sick) == {} and rows(sick, 'precision', 'note')[0].endswith('2,048 in float16. Loading casts them to one.')

@pytest.mark.parametrize('edit, said', [(lambda f: change_tensors(f, lambda s: s.update({'llm.model.layers.0.mlp.up_proj.weight': torch.zeros(16384, 1, dtype=torch.uint8)})), 'config.json does not say how they were quantised.'),
    (lambda f: change(f/'config.json', quantization_config=dict(quant_method='gptq')), "is quantised by 'gptq', not with nf4 by bitsandbytes")])
def test_quantised_in_another_way(sick, edit, said):
    edit(sick)
    found = wrong(sick)
    assert found.keys() == {'precision'} and said in found['precision']
    assert 'tensors' in rows(sick, 'not examined', 'note')[0]

def test_quantised(healthy, tmp_path):
    folder = quantize(healthy['2.6'], tmp_path/'int4')
    assert wrong(folder) == {}
    assert rows(folder, 'precision', 'note')[0].startswith('A quantised checkpoint: 611,776 in float32, 442,368 in four bits. It can be trained with qlora()')

def test_size_in_the_index(shards):
    change(shards/'model.safetensors.index.json', metadata=dict(total_size=1))
    assert wrong(shards) == {} and rows(shards, 'index', 'note')[0].startswith('The index says 1 bytes, the tensors have ')


# --- tokenizer and prompt --------------------------------------------------------------------------------------------

def test_no_tokenizer(sick):
    (sick/'tokenizer.json').unlink()
    assert 'has no tokenizer.json' in wrong(sick)['tokenizer'] and rows(sick, 'not examined', 'note') == ['prompt, other programs: they build on what is wrong above.']

@pytest.mark.parametrize('content', ['{"added_tokens": [', '{}', '[]', '{"model": {"vocab": {}}}', 'version https://git-lfs.github.com/spec/v1\n'])
def test_broken_tokenizer(sick, content):
    (sick/'tokenizer.json').write_text(content)
    assert wrong(sick).keys() == {'tokenizer'}

def test_tokenizer_of_another_family(sick, healthy):
    for name in ('tokenizer.json', 'tokenizer_config.json'): shutil.copy(healthy['2.5']/name, sick)
    assert f'{sick}/tokenizer.json has no <image_id>, </image_id>, <|im_end|>, <|im_start|>: it does not belong to MiniCPM-V 2.6' in wrong(sick)['tokenizer']

def test_special_token_that_only_the_settings_have(sick):
    # transformers makes up an id for what tokenizer_config.json names.
    change_tokens(sick, lambda by_name, tokens: tokens.remove(by_name['<unk>']))
    assert 'tokenizer.json has no <unk>' in wrong(sick)['tokenizer']

def test_two_tokens_with_one_id(sick):
    change_tokens(sick, lambda by_name, tokens: by_name['<image>'].update(id=by_name['</image>']['id']))
    assert 'Tokens whose id is taken: <image> has id' in wrong(sick)['tokenizer']

def test_token_given_twice(sick):
    change_tokens(sick, lambda by_name, tokens: tokens.append(dict(by_name['<image>'])))
    assert wrong(sick) == {'tokenizer': 'Tokens given twice: <image>.'}

def test_special_tokens_beyond_the_embeddings(sick):
    ids = {t['content']: t['id'] for t in json.loads((sick/'tokenizer.json').read_text())['added_tokens']}
    change(sick/'config.json', vocab_size=ids['<unk>'])
    assert f'Tokens beyond the {ids["<unk>"]} rows of the embeddings: <unk> ({ids["<unk>"]}).' == wrong(sick)['tokenizer'] and 'llm.lm_head.weight' in wrong(sick)['tensors']

def test_other_tokens_beyond_the_embeddings_are_a_note(sick):
    rows_ = json.loads((sick/'config.json').read_text())['vocab_size']
    def fill(by_name, tokens):
        first = max(t['id'] for t in tokens) + 1
        tokens += [dict(by_name['<unk>'], content=f'<far_{i}>', id=i) for i in range(first, rows_+2)]
    change_tokens(sick, fill)
    assert wrong(sick) == {} and f'2 other tokens are beyond the {rows_} rows' in rows(sick, 'tokenizer', 'note')[0]

@every_family
def test_prompt_is_the_tokenizers_own(healthy, name):
    ours, theirs = both_ways(Folder(healthy[name]).processor)
    assert ours == theirs and len(ours) > 100

@pytest.mark.parametrize('name, token, side', [('2.6', '<|im_end|>', 'lstrip'), ('4.0', '<|im_start|>', 'lstrip'), ('2.5', '<image>', 'lstrip')])
def test_prompt_that_the_tokenizer_reads_otherwise(healthy, tmp_path, name, token, side):
    sick = Path(shutil.copytree(healthy[name], tmp_path/'sick'))
    change_tokens(sick, lambda by_name, tokens: by_name[token].update({side: True}))
    found = wrong(sick)
    assert found.keys() == {'prompt'} and found['prompt'].startswith('From token ') and 'of an example on, training would use' in found['prompt']

def test_word_that_became_a_token(healthy, tmp_path):
    # In 2.0 `<AI>` is text. A tokenizer that makes one token of it is not the published one.
    sick = Path(shutil.copytree(healthy['2.0'], tmp_path/'sick'))
    change_tokens(sick, lambda by_name, tokens: tokens.append(dict(by_name['</s>'], content='<AI>', id=max(t['id'] for t in tokens)+1)))
    assert wrong(sick).keys() == {'prompt'} and "the tokenizer gives ['<AI>'" in wrong(sick)['prompt']

@pytest.mark.parametrize('name', ['2.6', '4.5'])
def test_start_token_that_the_family_does_not_have(healthy, tmp_path, name):
    sick = Path(shutil.copytree(healthy[name], tmp_path/'sick'))
    of_other = json.dumps(json.loads((healthy['4.0']/'tokenizer.json').read_text())['post_processor'])
    writes_start = json.loads(of_other.replace('<s>', '<|endoftext|>'))
    own = Folder(sick).processor.vocabulary['<|endoftext|>']
    writes_start['special_tokens']['<|endoftext|>']['ids'] = [own]
    change(sick/'tokenizer.json', post_processor=writes_start)
    assert wrong(sick)['prompt'].startswith('From token 0 of an example on')


# --- pictures --------------------------------------------------------------------------------------------------------

def test_no_preprocessor_config(sick):
    (sick/'preprocessor_config.json').unlink()
    assert 'There is no preprocessor_config.json' in wrong(sick)['pictures']

@pytest.mark.parametrize('key, value', [('max_slice_nums', 4), ('scale_resolution', 448), ('image_feature_size', 64), ('patch_size', 16)])
def test_pictures_would_be_cut_otherwise(sick, key, value):
    change(sick/'preprocessor_config.json', **{key: value})
    assert wrong(sick).keys() == {'pictures'} and f'{key} is {value}, config.json says' in wrong(sick)['pictures']

def test_default_of_the_official_processor(sick):
    change(sick/'preprocessor_config.json', drop=('scale_resolution', 'max_slice_nums'))
    assert wrong(sick) == {'pictures': 'preprocessor_config.json: scale_resolution is 448, config.json says 112.'}

def test_broken_preprocessor_config(sick):
    (sick/'preprocessor_config.json').write_text('{')
    assert 'preprocessor_config.json is not valid JSON' in wrong(sick)['pictures']


# --- what training needs ---------------------------------------------------------------------------------------------

@every_family
def test_published_numbers_of_parameters(name):
    f, counts = FAMILIES[name], training_counts(FAMILIES[name].official)
    total = sum(counts['full'].values())
    assert total == (f.parameters or 8_099_418_864) # of o-2.6 the parts used here
    trained, frozen = counts['LoRA']['trained'], counts['LoRA']['frozen']
    assert total <= frozen < total*1.001 and .04 < trained/frozen < .15
    assert counts['LoRA']['packed'] == 0 and .7 < counts['QLoRA']['packed']/total < .9

def test_memory_by_hand():
    assert memory(10**9, 10**9) == dict(loading=6, weights=6, gradients=4, optimizer=8, together=18)
    assert memory(10**9, 10**9, 2, 4) == dict(loading=4, weights=4, gradients=.5, optimizer=3, together=7.5)
    assert memory(10**9, 10**9, 3, 4) == dict(loading=4, weights=1, gradients=.5, optimizer=3, together=4.5)
    assert memory(0, 10**9, packed=10**9)['weights'] == 4.13/8

def test_one_gpu_shares_with_nobody():
    two, three = memory(10**9, 0, 2, 1), memory(10**9, 0, 3, 1)
    assert two == three and two['together'] == 16

@pytest.mark.parametrize('method', ['LoRA', 'full'])
def test_memory_is_that_of_a_real_run(healthy, method):
    cfg = METHODS[method](str(healthy['2.0']), 'train.json', bf16=True, fp16=False, deepspeed=None, use_cpu=True)
    model = prepare_model(cfg, healthy['2.0'])
    size = sum(p.numel()*p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    need = memory(**training_counts(json.loads((healthy['2.0']/'config.json').read_text()))[method])
    assert size == round(need['weights']*1e9) and sum(p.numel() for p in trained)*8 == round(need['optimizer']*1e9)

def test_verdicts():
    table, cards = memory_table(FAMILIES['2.6'].official, gpus=8), lambda *gb: Machine(tuple(('card', g) for g in gb), True)
    said = lambda machine: [fits(need, machine) for need in table]
    assert [need['method'] for need in table] == ['LoRA']*3 + ['QLoRA']*3 + ['full']*3
    assert said(Machine()) == ['no GPU']*9
    assert [s for s, need in zip(said(cards(80, 24)), table) if need['method'] != 'QLoRA'] == ['does not fit', 'at least 18.2 of 24 GB', 'at least 17.3 of 24 GB', 'does not fit', 'does not fit', 'at least 16.2 of 24 GB'] # the smallest counts
    assert said(cards(17))[2] == 'does not fit' # ZeRO-3 loads everything first
    assert all(s.startswith('at least') for s in said(cards(12))[3:6]) # four bits
    assert said(cards(140))[6] == 'at least 129.6 of 140 GB'

def test_no_verdict_promises_what_an_estimate_denies():
    # 4.0 in full on four GPUs of 24 GB: weights, gradients and optimiser have 22.3 GB, and everything has more than there is
    row = next(r for r in memory_table(FAMILIES['4.0'].official, gpus=4) if (r['method'], r['sharding']) == ('full', 'ZeRO-2'))
    verdict = fits(row, Machine((('card', 24.0),)*4, True))
    assert estimate(METHODS['full'](FAMILIES['4.0'].hub_id, '', deepspeed='ds_config_zero2.json', bf16=True, fp16=False), 4).total > 24 > row['together']
    assert verdict == f"at least {row['together']:.1f} of 24 GB" and 'fits' not in verdict and 'estimate()' in ON_TOP

@pytest.mark.parametrize('gpus', [0, -1])
def test_no_gpu_at_all(gpus):
    with pytest.raises(ValueError, match=f'gpus is {gpus}: give the number of GPUs, at least 1'): doctor(gpus=gpus)

@pytest.mark.parametrize('machine, gpus, said', [(Machine(), None, 8), (CARDS, None, 2), (CARDS, 4, 4)])
def test_number_of_gpus(healthy, machine, gpus, said): assert {r['gpus'] for r in doctor(healthy['2.6'], gpus, machine).needs} == {said}

def test_what_the_machine_has(healthy):
    lines = lambda machine, gpus=None: {(r['what'], r['verdict']): r['found'] + r['do'] for r in doctor(healthy['2.6'], gpus, machine).rows if r['about'] == 'machine'}
    assert lines(Machine())['GPUs', 'note'] == 'None. Only tiny models train on a CPU. The table is for 8 GPUs elsewhere.'
    assert lines(CARDS, 4)['GPUs', 'note'] == 'The table is for 4 GPUs, this machine has 2.' and lines(CARDS)['GPUs', 'ok'] == '2 x card, 80 GB.'
    old = Machine((('old', 16.0),), False, 64, 10, dict(torch='2.13.0', deepspeed=None))
    assert lines(old)['bfloat16', 'note'] == 'Not in hardware.Set fp16=True, bf16=False.' and lines(old)['packages', 'note'] == 'Not installed: deepspeed.pip install deepspeed'
    assert doctor(healthy['2.6'], machine=old).ok # the folder is what is judged

def test_this_machine():
    m = this_machine()
    assert m.ram > 1 and m.disk > 0 and m.packages['torch'] and len(m.gpus) == torch.cuda.device_count()


# --- a machine without a folder --------------------------------------------------------------------------------------

READY = dict(python='3.12.1', cores=8, tools={COMPILER: '/usr/bin/c++', HEADER: '/usr/include/Python.h', NINJA: '/usr/bin/ninja'})

def of_machine(machine, verdict='wrong'):
    "What is wrong with a machine, by what was looked at."
    return {r['what']: f"{r['found']} {r['do']}".strip() for r in doctor(machine=machine).rows if r['verdict'] == verdict}

def test_this_machine_is_ready():
    d = doctor()
    assert d.ok and str(d).startswith('this machine: nothing is wrong') and not d.needs
    assert {r['what'] for r in d.rows} >= {*MACHINE_CHECKS, 'GPUs', 'memory'} and {r['about'] for r in d.rows} == {'machine'}
    assert max(map(len, str(d).splitlines())) <= 100 and 'this machine: nothing is wrong' in d._repr_html_()

def test_what_is_needed_is_what_settings_ask_for():
    ini = ConfigParser(delimiters=['='])
    ini.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
    assert [str(r) for r in needed()] == ini['DEFAULT']['requirements'].split()
    for extra in EXTRAS: assert [r.name for r in needed(extra)] == ini['DEFAULT'][f'{extra}_requirements'].split()

def test_package_too_old_and_package_missing():
    found = doctor(machine=Machine(packages=dict(torch='2.5.1', peft=None), **READY))
    bad = [(r['found'], r['do']) for r in found.rows if r['verdict'] == 'wrong']
    assert bad == [('torch 2.5.1 is installed, and torch>=2.11 is needed.', "pip install 'torch>=2.11'"), ('peft is not installed.', "pip install 'peft>=0.18'")] and not found.ok
    assert str(found).startswith('this machine: 2 wrong')

def test_local_and_early_versions_count():
    assert faults(needed(), {r.name: '99.0' for r in needed()} | dict(torch='2.11.0+cu128', transformers='5.18.0.dev0')) == []

def test_python_too_old(): assert of_machine(Machine(**READY | dict(python='3.9.1')))['Python'].startswith('3.9.1, and >=3.11 is needed. Make a new environment')

@pytest.mark.parametrize('tool, fix', [(COMPILER, 'Install g++'), (HEADER, 'python3.12-dev'), (NINJA, 'pip install ninja')])
def test_nothing_can_be_compiled(tool, fix):
    bare = READY | dict(tools=READY['tools'] | {tool: None})
    assert tool in of_machine(Machine(**bare))['compiling'] and fix in of_machine(Machine(**bare))['compiling']
    on_gpus = Machine(gpus=(('card', 80.0),), bf16=True, **bare) # where only offload compiles
    assert 'compiling' not in of_machine(on_gpus) and 'Runs that offload' in of_machine(on_gpus, 'note')['compiling']

def test_gpus_that_torch_does_not_find():
    assert 'finds no GPU' in of_machine(Machine(driver=True, **READY))['CPU'] and 'CPU' not in of_machine(Machine(driver=False, **READY))

def test_no_bitsandbytes(): assert of_machine(Machine(packages=dict(bitsandbytes=None), **READY), 'note')['four bits'] == "bitsandbytes is not installed: no QLoRA and int4 checkpoints. pip install 'minicpmv_nb[qlora]'"

def test_four_bits_of_gpus_that_are_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    rows = of_machine(Machine(gpus=(('card', 80.0),)*4, bf16=True, **READY), 'ok')
    assert rows['four bits'].endswith('packs weights into four bits on the CPU here, which has no such GPU to try.')

def test_bitsandbytes_that_does_not_work(monkeypatch):
    def broken(weight): raise RuntimeError('CUDA Setup failed')
    monkeypatch.setattr('minicpmv_nb.diagnosis.to_nf4', broken)
    assert of_machine(Machine(**READY))['four bits'].startswith('RuntimeError: CUDA Setup failed The package that says so does not fit')

def test_tools_are_looked_for_where_a_run_looks(monkeypatch, tmp_path):
    assert all(build_tools().values())
    monkeypatch.setenv('PATH', str(tmp_path)); monkeypatch.setenv('CXX', 'no-such-compiler -O2')
    assert build_tools()[COMPILER] is None and build_tools()[NINJA] # beside the interpreter


# --- the command -----------------------------------------------------------------------------------------------------

def test_command(healthy, sick):
    change(sick/'config.json', version=9.9)
    run = lambda *args: subprocess.run([sys.executable, '-m', 'minicpmv_nb.diagnosis', *map(str, args)], capture_output=True, text=True)
    good, bad = run(healthy['2.6'], '--gpus', '4'), run(sick)
    assert good.returncode == 0 and 'nothing is wrong' in good.stdout and 'GB on each of 4 GPUs' in good.stdout, good.stderr
    assert bad.returncode == 1 and 'version is 9.9' in ' '.join(bad.stdout.split()) and 'Traceback' not in bad.stderr

def test_status_in_this_process(healthy, tmp_path, capsys):
    main([str(healthy['2.6'])])
    with pytest.raises(SystemExit) as e: main([str(tmp_path)])
    assert e.value.code == 1 and 'has no config.json' in capsys.readouterr().out.replace('\n' + ' '*21, ' ')
    with pytest.raises(SystemExit) as e: main([str(tmp_path), '--gpus', '0'])
    assert e.value.code == 2
