"A checkpoint is known by its config.json; a hub id by the local cache."
import json, os, shutil, subprocess, sys

import pytest

from minicpmv_nb.families import FAMILIES, check_llm_type, find_family, read_config, resolve, vision_config

SUPPORTED = 'Supported: 2.0 (MiniCPM-V 2.0), 2.5 (MiniCPM-Llama3-V 2.5), 2.6 (MiniCPM-V 2.6), o-2.6 (MiniCPM-o 2.6), 4.0 (MiniCPM-V 4.0), 4.5 (MiniCPM-V 4.5).'
HUB_ID, COMMIT = 'openbmb/MiniCPM-Llama3-V-2_5', '0123456789abcdef0123456789abcdef01234567'


@pytest.mark.parametrize('version', ['2.5', 2.5])
def test_version_as_text_or_number(version): assert find_family(dict(model_type='minicpmv', version=version)) is FAMILIES['2.5']

@pytest.mark.parametrize('name', FAMILIES)
def test_published_config_is_known(name): assert find_family(FAMILIES[name].official) is FAMILIES[name]

def test_hub_ids():
    assert [f.hub_id for f in FAMILIES.values()] == ['openbmb/MiniCPM-V-2', 'openbmb/MiniCPM-Llama3-V-2_5', 'openbmb/MiniCPM-V-2_6', 'openbmb/MiniCPM-o-2_6', 'openbmb/MiniCPM-V-4', 'openbmb/MiniCPM-V-4_5']

@pytest.mark.parametrize('version', ['9.9', 3, 'llama'])
def test_unknown_version(version):
    with pytest.raises(ValueError) as e: find_family(dict(model_type='minicpmv', version=version), 'x/config.json')
    assert str(e.value).startswith(f'x/config.json: version is {version!r}. Unknown version. {SUPPORTED}')

@pytest.mark.parametrize('config, title', [(dict(model_type='minicpmv', version=4.6), 'MiniCPM-V 4.6'), (dict(model_type='minicpmv4_6'), 'MiniCPM-V 4.6'), (dict(model_type='minicpmv4_7', version='4.7'), 'MiniCPM-V 4.7'),
    (dict(model_type='minicpmv', version='4.7'), 'MiniCPM-V 4.7'), (dict(model_type='minicpmo', version=4.5), 'MiniCPM-o 4.5')])
def test_version_that_comes_later(config, title):
    with pytest.raises(ValueError) as e: find_family(config, 'x/config.json')
    assert str(e.value) == f'x/config.json: this is {title}, which comes later. {SUPPORTED}'

def test_version_that_was_lost():
    with pytest.raises(ValueError) as e: find_family(dict(model_type='minicpmv', slice_config={}))
    assert str(e.value).startswith('config.json: there is no version, but a slice_config, which came with 2.5.')

def test_unknown_tower():
    with pytest.raises(ValueError) as e: vision_config(dict(vision_encoder='resnet50'))
    assert str(e.value).startswith("config.json: vision_encoder is 'resnet50', whose sizes are not known here.")

@pytest.mark.parametrize('config', [dict(model_type='llama', version='2.5'), dict(version='2.5'), {}])
def test_unknown_model_type(config):
    with pytest.raises(ValueError) as e: find_family(config, 'x/config.json')
    assert str(e.value) == f"x/config.json: model_type is {config.get('model_type')!r}, not 'minicpmv' or 'minicpmo'. {SUPPORTED.replace('Supported', 'Supported checkpoints')}"

@pytest.mark.parametrize('name', ['./none', '/none/at/all', 'a/b/c', 'none'])
def test_no_such_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f'There is no folder .*none.*|There is no folder a/b/c') as e: resolve(name)
    assert f'or a hub id such as {HUB_ID}' in str(e.value)

def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError) as e: resolve(str(tmp_path))
    assert str(e.value) == f'{tmp_path} has no config.json, so it is not a checkpoint folder. Is it the right one? If so, download the model again, all files.'

def test_broken_config(tmp_path):
    (tmp_path/'config.json').write_text('{"version": "2.5",\n')
    with pytest.raises(ValueError, match=r'config\.json is not valid JSON \(line 2\): download it again\.'): read_config(tmp_path)

def test_folder_is_taken_as_it_is(tiny): assert resolve(str(tiny)) == (tiny, None)

def test_folder_that_looks_like_a_hub_id(tmp_path, tiny, monkeypatch):
    # A folder wins over the hub, as for everything else that takes such names.
    shutil.copytree(tiny, tmp_path/'owner'/'model')
    monkeypatch.chdir(tmp_path)
    assert resolve('owner/model')[1] is None

@pytest.mark.parametrize('llm_type', [None, 'llama3'])
def test_llm_type_agrees(llm_type): check_llm_type(FAMILIES['2.5'], llm_type)

@pytest.mark.parametrize('llm_type', ['qwen', 'minicpm', ''])
def test_llm_type_disagrees(llm_type):
    with pytest.raises(ValueError) as e: check_llm_type(FAMILIES['2.5'], llm_type)
    assert str(e.value) == f"llm_type is {llm_type!r}, but the checkpoint is MiniCPM-Llama3-V 2.5, whose llm_type is 'llama3'. Correct the flag or leave it out."


# --- hub ids ---------------------------------------------------------------------------------------------------------

def resolve_offline(cache, name, revision=None):
    "What `resolve` says in a process without a network, whose hub cache is this folder."
    code = ('import sys\nfrom minicpmv_nb.families import resolve\n'
            f'try: print(*resolve({name!r}, {revision!r}), sep="\\n")\nexcept FileNotFoundError as e: sys.exit(str(e))')
    env = os.environ | dict(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE='1')
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)

@pytest.fixture
def cache(tmp_path):
    "A hub cache as huggingface_hub lays it out, with one model."
    model = tmp_path/'hub'/f'models--{HUB_ID.replace("/", "--")}'
    (model/'snapshots'/COMMIT).mkdir(parents=True)
    (model/'snapshots'/COMMIT/'config.json').write_text(json.dumps(dict(model_type='minicpmv', version='2.5')))
    (model/'refs').mkdir()
    for ref in ('main', 'v1'): (model/'refs'/ref).write_text(COMMIT)
    return tmp_path/'hub'

@pytest.mark.parametrize('revision', [None, 'v1', COMMIT])
def test_hub_id_in_the_cache(cache, revision):
    done = resolve_offline(cache, HUB_ID, revision)
    folder, commit = done.stdout.split()
    assert commit == COMMIT and folder == str(cache/f'models--{HUB_ID.replace("/", "--")}'/'snapshots'/COMMIT)

def test_hub_id_that_is_not_there(tmp_path):
    done = resolve_offline(tmp_path, HUB_ID)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'{HUB_ID} is neither a folder here nor in the local cache' in done.stderr
    assert f"hf download {HUB_ID} --exclude '*.py' --exclude '*.bin' --local-dir MiniCPM-Llama3-V-2_5" in done.stderr

def test_revision_that_is_not_there(cache):
    done = resolve_offline(cache, HUB_ID, 'other')
    assert done.returncode == 1 and f'hf download {HUB_ID}' in done.stderr and '--revision other' in done.stderr

def test_an_adapter_is_no_checkpoint(tmp_path):
    (tmp_path/'adapter_config.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='is an adapter, not a checkpoint: give the base it was trained on'): read_config(tmp_path)

def looked_up(cache, monkeypatch, name):
    "What `look_up` finds in this cache."
    import huggingface_hub.constants, huggingface_hub.file_download
    from minicpmv_nb.families import look_up
    for module in (huggingface_hub.constants, huggingface_hub.file_download): monkeypatch.setattr(module, 'HF_HUB_CACHE', str(cache), raising=False)
    return look_up(name)

def test_a_cache_with_nothing_but_the_config(cache, monkeypatch):
    # Whoever needs the tokenizer would look for it in such a folder.
    assert looked_up(cache, monkeypatch, HUB_ID) == (dict(model_type='minicpmv', version='2.5'), None)
    snapshot = cache/f'models--{HUB_ID.replace("/", "--")}'/'snapshots'/COMMIT
    (snapshot/'tokenizer.json').write_text('{}')
    assert looked_up(cache, monkeypatch, HUB_ID)[1] == snapshot

@pytest.mark.parametrize('name', ['bad name/x y', '~/none/at/all', './none'])
def test_looking_up_says_what_resolving_says(tmp_path, monkeypatch, name):
    from minicpmv_nb.families import look_up
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='There is no folder') as looked: look_up(name)
    with pytest.raises(FileNotFoundError) as resolved: resolve(name)
    assert str(looked.value) == str(resolved.value)

def test_a_folder_at_home_that_looks_like_a_hub_id(tmp_path, tiny, monkeypatch):
    from minicpmv_nb.families import look_up
    shutil.copytree(tiny, tmp_path/'model'); monkeypatch.setenv('HOME', str(tmp_path))
    assert resolve('~/model')[0] == look_up('~/model')[1] == tmp_path/'model'
