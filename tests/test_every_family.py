"What holds for every family: its prompts, a step, saving, loading, merging, asking; and that only `families` knows them apart."
import json, re, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from minicpmv_nb import model as model_module, vision
from minicpmv_nb.batches import SampleDataset, collate, load_data
from minicpmv_nb.chat import Chat, answer_file
from minicpmv_nb.config import full, lora
from minicpmv_nb.families import FAMILIES
from minicpmv_nb.merging import merge
from minicpmv_nb.model import adapter_notes, fingerprint, load, save, tiny_checkpoint
from minicpmv_nb.prompts import Processor, conversation_spans, encode, jinja
from minicpmv_nb.samples import DataError, Picture, Turn
from minicpmv_nb.training import train
from minicpmv_nb.tuning import add_adapter
from support import ANSWERS, GOLDENS, QUESTION, draw_mixed

every_family = pytest.mark.parametrize('name', FAMILIES)


@pytest.fixture(scope='module')
def mixed(tmp_path_factory): return draw_mixed(tmp_path_factory.mktemp('mixed'), 6)

def processor(name): return Processor.from_folder(GOLDENS/name)

def decoded(p, ids): return p.tokenizer.decode(ids)


# --- prompts ---------------------------------------------------------------------------------------------------------

SMALL, SLICED = Picture('', 100, 100), Picture('', 120, 260)  # one piece; an overview and two slices, one above the other
P = '<image>' + '<unk>'*8 + '</image>'
S = '<slice>' + '<unk>'*8 + '</slice>'
ASKED = (Turn('user', (SMALL, SLICED, 'Compare.')), Turn('assistant', ('One is red.',)), Turn('user', ('And now?',)))
PICTURES = f'<image_id>0</image_id>{P}\n<image_id>1</image_id>{P}{S}\n{S}\nCompare.'


def old(n): return '<image>' + '<unk>'*n + '</image>'

def test_prompt_of_2_0_as_a_whole():
    # The official chat() writes this string and tokenises it as it is, with <s> in front.
    p = processor('2.0')
    text = f"<用户>{old(16)}\n{old(16)}<slice>{old(16)}\n{old(16)}</slice>\nCompare.<AI>One is red.<用户>And now?<AI>"
    assert encode(ASKED, p, ask=True).input_ids == p.tokenizer(text)['input_ids']
    assert decoded(p, encode(ASKED, p, ask=True).input_ids) == '<s>' + text

@pytest.mark.parametrize('name, text', [
    ('2.6', f'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{PICTURES}<|im_end|>\n<|im_start|>assistant\nOne is red.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n'),
    ('4.0', f'<s><|im_start|>user\n{PICTURES}<|im_end|>\n<|im_start|>assistant\nOne is red.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n'),
    ('4.5', f'<|im_start|>user\n{PICTURES}<|im_end|>\n<|im_start|>assistant\nOne is red.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n')])
def test_prompts_with_numbered_pictures(name, text): assert decoded(processor(name), encode(ASKED, processor(name), ask=True).input_ids) == text

@pytest.mark.parametrize('name, start', [('2.0', '<s><用户>Be brief.\nHi.<AI>'), ('2.6', '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n'),
    ('2.5', '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>'),
    ('4.0', '<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n'), ('4.5', '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n')])
def test_system_prompt(name, start):
    turns = (Turn('system', ('Be brief.',)), Turn('user', ('Hi.',)))
    assert decoded(processor(name), encode(turns, processor(name), ask=True).input_ids).startswith(start)

@pytest.mark.parametrize('name', ['2.0', '2.5', '2.6', '4.0', '4.5'])
def test_names_of_special_tokens_are_text(name):
    p = processor(name)
    names = sorted(n for n in p.tokenizer.get_added_vocab().keys() - set(p.family.markup.inline) if n != '!') # 2.5 fills up with it
    rude = ' '.join([*names, '<image_id>', '<think>', '<|im_end|>', '<<image>', '<im<image>age>', '<image_00>'])
    turns = lambda text: (Turn('user', (SMALL, text)), Turn('assistant', (text.replace('think', 'thinks'),)))
    special = lambda e: [i for i in e.input_ids if i in p.tokenizer.added_tokens_decoder]
    plain, quoted = encode(turns('x'), p), encode(turns(rude), p)
    assert special(quoted) == special(plain) and len(quoted.image_bound) == 1
    assert decoded(p, quoted.input_ids).count(rude) >= 1

@pytest.mark.parametrize('name', ['2.0', '2.5', '2.6', '4.0', '4.5'])
def test_tokens_for_places_are_tokens(name):
    p = processor(name)
    row = encode((Turn('user', ('Where is <ref>it</ref>?',)), Turn('assistant', ('<box>1 2 3 4</box>',))), p)
    assert all(p.vocabulary[t] in row.input_ids for t in ('<ref>', '</ref>', '<box>', '</box>'))
    assert p.vocabulary['<box>'] in row.labels and p.vocabulary['<ref>'] not in row.labels

@pytest.mark.parametrize('name', ['2.0', '2.6', '4.0', '4.5'])
@pytest.mark.parametrize('case', ['single0', 'single1'])
def test_labels_are_those_of_the_original(name, case):
    # But for one thing: from 2.6 on the original teaches the end token twice.
    p, inputs = processor(name), np.load(GOLDENS/name/'inputs.npz')
    said = json.loads((GOLDENS/name/'meta.json').read_text())['cases'][case]['samples'][0]['conv']
    pictures = {'<image>': Picture('', 300, 200), '<image_00>': SMALL, '<image_01>': SLICED}
    def parts(text): return tuple(pictures.get(t, t) for t in re.split(r'(<image(?:_\d+)?>)', text) if t.strip())
    row = encode(tuple(Turn(t['role'], parts(t['content'])) for t in said), p)
    ours = [l for l in row.labels if l != -100]
    theirs = [l for l in inputs[f'{case}/labels'][0].tolist() if l != -100]
    assert ours == [l for i, l in enumerate(theirs) if l != p.end_ids[0] or theirs[i-1] != l]

def test_thinking_of_4_5():
    p = processor('4.5')
    turns = (Turn('user', ('A?',)), Turn('assistant', ('<think>\nHm.\n</think>\n\nB.',)), Turn('user', ('C?',)), Turn('assistant', ('<think>\nSo.\n</think>\n\nD.',)))
    row = encode(turns, p)
    assert decoded(p, row.input_ids) == '<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n<think>\nSo.\n</think>\n\nD.<|im_end|>\n'
    assert decoded(p, [l for l in row.labels if l != -100]) == 'B.<|im_end|><think>\nSo.\n</think>\n\nD.<|im_end|>'
    assert p.vocabulary['<think>'] in row.labels
    assert decoded(p, encode(turns[:1], p, ask=True, thinking=True).input_ids).endswith('<|im_start|>assistant\n<think>\n')

@pytest.mark.parametrize('name', ['2.0', '2.5', '2.6', '4.0'])
def test_who_cannot_think(name):
    with pytest.raises(ValueError, match='does not think before it answers'): encode(ASKED, processor(name), ask=True, thinking=True)

@pytest.mark.parametrize('name', ['2.6', '4.0', '4.5'])
@pytest.mark.parametrize('end', [1, 2, 3])
def test_written_chat_template_says_what_the_official_one_says(name, end):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDENS/name)
    chat = [dict(role='user', content='A?'), dict(role='assistant', content='B.'), dict(role='user', content='C?')][:end]
    for messages in (chat, [dict(role='system', content='S.'), *chat]):
        how = dict(tokenize=False, add_generation_prompt=chat[-1]['role'] == 'user', enable_thinking=False)
        ours = jinja(FAMILIES[name].template).removeprefix('{{ "<s>" }}')
        assert tokenizer.apply_chat_template(messages, chat_template=ours, **how) == tokenizer.apply_chat_template(messages, **how)


# --- tokenizers of the Llama kind ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def blanks(tmp_path_factory):
    "Tokenizers that put a blank in front of every text, as those of the models that 2.0 and 4.0 are made from do."
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    def made(name):
        folder, kind = tiny_checkpoint(tmp_path_factory.mktemp('blanks')/name, [QUESTION], name), FAMILIES[name].stand_in
        t = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
        words = 'What is this? A red square. user assistant <AI> <用户>'.split()*50 + ['\n']
        t.train_from_iterator(words, trainers.BpeTrainer(vocab_size=330, special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))], show_progress=False))
        t.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in kind.specials])
        t.save(str(folder/'tokenizer.json'))
        return Processor.from_folder(folder)
    return {name: made(name) for name in ('2.0', '4.0')}

TALK = (Turn('user', (SMALL, 'What is this?')), Turn('assistant', ('A red square.',)), Turn('user', ('What?',)), Turn('assistant', ('A square.',)))

def as_one_string(p, turns, ask): return p.tokenizer(''.join(s.text for s in conversation_spans(turns, p, ask)), add_special_tokens=False)['input_ids']

@pytest.mark.parametrize('name, turns, ask', [('4.0', TALK, False), ('4.0', TALK[:3], True), ('4.0', TALK[:1], True), ('2.0', TALK[:1], True), ('2.0', TALK[:3], True)])
def test_blanks_are_where_the_whole_string_has_them(blanks, name, turns, ask):
    assert encode(turns, blanks[name], ask=ask).input_ids == as_one_string(blanks[name], turns, ask)

def test_2_0_tokenises_each_turn_by_itself_in_training(blanks):
    p = blanks['2.0']
    ids = lambda text: p.tokenizer(text, add_special_tokens=False)['input_ids']
    row = encode(TALK, p).input_ids
    assert row == ids(f'<s><用户>{old(16)}\nWhat is this?<AI>') + ids('A red square.') + ids('<用户>What?<AI>') + ids('A square.') + ids('</s>')

def test_blanks_around_names_of_special_tokens(blanks):
    p = blanks['4.0']
    row = encode((Turn('user', ('What is <image>?',)),), p, ask=True)
    assert decoded(p, row.input_ids).count('What is <image>?') == 1 and row.image_bound == []


# --- from a step to an answer ----------------------------------------------------------------------------------------

@every_family
def test_a_batch_changes_nothing(bases, mixed, name):
    # Text only, one picture, several: alone and side by side.
    model, p = load(bases[name]), Processor.from_folder(bases[name])
    samples, report = load_data(mixed, p)
    assert report.text_only and max(len(s.pictures) for s in samples) > 1
    data = SampleDataset(samples, p)
    tensors = lambda items: {k: v for k, v in collate(items).items() if k != 'ids'}
    with torch.no_grad():
        alone = torch.cat([model(**tensors([data[i]]))['row_losses'] for i in range(len(data))])
        together = model(**tensors([data[i] for i in range(len(data))]))['row_losses']
    assert torch.allclose(alone, together, rtol=1e-5)

@every_family
def test_step_save_load_merge_chat(bases, mixed, tmp_path, name):
    base = bases[name]
    common = dict(max_steps=2, learning_rate=0.01, per_device_train_batch_size=3, use_cpu=True, fp16=False, deepspeed=None, report_to='none', dataloader_num_workers=0, gradient_accumulation_steps=1, max_slice_nums=4)
    taught = train(full(str(base), str(mixed), output_dir=str(tmp_path/'full'), **common))
    adapter = train(lora(str(taught), str(mixed), output_dir=str(tmp_path/'lora'), lora_r=4, **common))
    merged = merge(taught, adapter, tmp_path/'merged')
    assert adapter_notes(adapter)['max_slice_nums'] == 4
    assert sorted(f.name for f in merged.iterdir()) == sorted(f.name for f in base.iterdir())
    before, after = load_file(base/'model.safetensors'), load_file(merged/'model.safetensors')
    assert before.keys() == after.keys()
    unchanged = {n for n in before if torch.equal(before[n], after[n])}
    fixed = {n for n in before if n.startswith(FAMILIES[name].left_out) or n == 'resampler.pos_embed'}
    # a frozen table; parts not used here; and biases of keys, which change nothing
    assert fixed <= unchanged and all(n in fixed or n.endswith('k_proj.bias') for n in unchanged)
    plain, chat = Chat.load(taught, adapter), Chat.load(merged)
    assert chat.processor.sizes.max_slices == plain.processor.sizes.max_slices == 4
    assert answer_file(chat, mixed, max_new_tokens=4) == answer_file(plain, mixed, max_new_tokens=4)

@every_family
def test_chat_about_several_pictures_and_none(bases, name):
    chat, red, blue = Chat.load(bases[name]), Image.new('RGB', (60, 40), 'red'), Image.new('RGB', (300, 90), 'blue')
    said, talk = chat.chat([red, blue], 'Compare.', system='Be brief.', max_new_tokens=4)
    assert [len([p for p in t.parts if isinstance(p, Picture)]) for t in talk.turns] == [0, 2, 0] and talk.turns[-1].parts == (said,)
    _, talk = chat.chat(red, 'And this?', talk, max_new_tokens=4)
    assert len(talk.turns) == 5 and talk.pictures == (red, blue, red)
    assert isinstance(chat.chat(None, 'Hello?', max_new_tokens=4)[0], str)
    with pytest.raises(ValueError, match='A system prompt stands at the beginning'): chat.chat(None, 'x', talk, system='Be brief.')

def test_an_answer_with_thinking(bases):
    said, talk = Chat.load(bases['4.5']).chat(None, 'Hello?', thinking=True, max_new_tokens=4)
    assert said.startswith('<think>\n') and talk.turns[-1].parts == ('',) # it did not come to an end

def test_parts_that_are_not_used_are_named_and_kept(bases, tmp_path, capsys):
    model = load(bases['o-2.6'])
    assert 'MiniCPM-o 2.6: 3 tensors of apm, audio_projection_layer, tts are left out here; saving and merging keep them.' in capsys.readouterr().out
    kept = load_file(save(model.state_dict(), bases['o-2.6'], tmp_path/'again')/'model.safetensors')
    had = load_file(bases['o-2.6']/'model.safetensors')
    assert fingerprint(tmp_path/'again') == fingerprint(bases['o-2.6'])
    assert all(torch.equal(kept[n], had[n]) for n in had) and kept.keys() == had.keys()

@pytest.mark.parametrize('name', ['2.0', '4.0', 'o-2.6'])
def test_what_could_not_be_confirmed_is_said(bases, name, capsys):
    load(bases[name])
    assert f'{FAMILIES[name].title}: {FAMILIES[name].unconfirmed}.' in capsys.readouterr().out

@pytest.mark.parametrize('name, other', [('2.5', '2.6'), ('2.6', '2.5'), ('o-2.6', '2.0'), ('4.0', '2.0'), ('4.5', '2.6'), ('2.0', '2.6')])
def test_tokenizer_of_another_family(bases, tmp_path, name, other):
    mixed_up = shutil.copytree(bases[name], tmp_path/'mixed_up')
    shutil.copy(bases[other]/'tokenizer.json', mixed_up)
    with pytest.raises(ValueError) as e: Processor.from_folder(mixed_up)
    assert str(e.value).startswith(f'{mixed_up}/tokenizer.json has no ') and f'it does not belong to {FAMILIES[name].title}, which config.json describes' in str(e.value) and 'Supported: ' in str(e.value)

def test_adapter_of_another_base(bases, mixed, tmp_path):
    adapter = train(lora(str(bases['2.6']), str(mixed), output_dir=str(tmp_path/'run'), max_steps=1, lora_r=2, use_cpu=True, fp16=False, deepspeed=None, report_to='none', dataloader_num_workers=0))
    other = tiny_checkpoint(tmp_path/'other', [QUESTION, *ANSWERS], '2.6', seed=1)
    with pytest.raises(ValueError, match='was trained on other weights than those in'): merge(other, adapter, tmp_path/'merged')

def test_base_of_the_rotary_positions(bases, tmp_path):
    # Libraries have another default, so a config without it would load, and be wrong without a word.
    def changed(name, edit):
        folder = shutil.copytree(bases[name], tmp_path/f'{name}{len(list(tmp_path.iterdir()))}')
        config = json.loads((folder/'config.json').read_text()); edit(config)
        (folder/'config.json').write_text(json.dumps(config))
        return folder
    for name in ('2.5', '2.6'):
        with pytest.raises(ValueError, match='config.json has no rope_theta'): load(changed(name, lambda c: c.pop('rope_theta')))
    batch = dict(input_ids=torch.arange(40)[None], pixel_values=torch.zeros(1, 3, 14, 0), target_sizes=torch.zeros(0, 2, dtype=torch.long), image_bound=torch.zeros(0, 2, dtype=torch.long), slices_per_sample=torch.tensor([0]))
    def logits(folder):
        with torch.no_grad(): return load(folder)(**batch)['logits']
    renamed = lambda c: c.update(rope_parameters=dict(rope_theta=c.pop('rope_theta'), rope_type='default'), rope_scaling=None) # as transformers 5 writes it
    assert torch.equal(logits(changed('2.5', renamed)), logits(bases['2.5']))
    yarn = lambda c: c.update(rope_scaling=dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=32))
    assert not torch.allclose(logits(changed('2.6', yarn)), logits(bases['2.6']))

def test_lora_on_the_head_of_2_0(bases, tmp_path):
    from minicpmv_nb.tuning import tune
    torch.manual_seed(0)
    tuned = tune(load(bases['2.0']), lora(str(bases['2.0']), 'train.json', lora_r=2, lora_target_modules=r'llm\.lm_head|llm\..*q_proj'))
    with torch.no_grad(): [p.add_(torch.randn_like(p)*.05) for n, p in tuned.named_parameters() if 'lora_' in n]
    tuned.save_pretrained(tmp_path/'adapter', save_embedding_layers=False)
    merge(bases['2.0'], tmp_path/'adapter', tmp_path/'merged') # compares logits

def test_question_keeps_its_indentation_in_2_5():
    # The official template trims the whole content of a turn, not its parts.
    text = decoded(processor('2.5'), encode((Turn('user', (SMALL, '    def f(): pass ')),), processor('2.5'), ask=True).input_ids)
    assert '</image>\n    def f(): pass<|eot_id|>' in text

@pytest.mark.parametrize('answer, said', [('Well <think>t</think>ok', 'has text before <think>'), ('<think>a</think>b</think>c', 'has more than one </think>'), ('<think>only</think>', 'thinks, and says nothing'), ('<think>never ended', 'thinks, and says nothing')])
def test_thinking_that_would_lose_something(bases, tmp_path, answer, said):
    file = tmp_path/'d.json'
    file.write_text(json.dumps([dict(id='0', conversations=[dict(role='user', content='Q'), dict(role='assistant', content=answer)])]))
    with pytest.raises(DataError, match=said): load_data(file, Processor.from_folder(bases['4.5']))
    assert load_data(file, Processor.from_folder(bases['2.6']))[1].kept == 1 # there it is text

def test_answers_with_thinking_are_compared_by_what_is_said(bases, tmp_path, monkeypatch):
    file = tmp_path/'d.json'
    file.write_text(json.dumps([dict(id='0', conversations=[dict(role='user', content='Q'), dict(role='assistant', content='<think>\nHm.\n</think>\n\nYes.')])]))
    chat = Chat.load(bases['4.5'])
    monkeypatch.setattr(Chat, 'answer', lambda *a, **k: '<think>\nSo.\n</think>\n\nYes.')
    assert answer_file(chat, file, thinking=True) == [dict(id='0', question='Q', expected='Yes.', answer='Yes.')]

def test_counts_that_differ():
    with pytest.raises(ValueError, match='3 pieces, but slices_per_sample counts 2'): vision.layout([(2, 2)]*3, [2])
    with pytest.raises(ValueError, match='and frame_times 2'): vision.layout([(2, 2)]*3, [3], frame_times=[[0], [1]])

def test_families_are_told_apart_in_one_place():
    # A branch on a family's name, version, title or LLM type anywhere else would belong into `families`.
    package = Path(model_module.__file__).parent
    names = '|'.join(re.escape(n) for f in FAMILIES.values() for n in (f.name, f.title, f.llm_type, f.hub_id, *f.end_tokens))
    quoted = rf"""['"]({names})['"]"""
    branch = re.compile(rf"(==|!=|\bin\b)\s*[(\[{{]?\s*{quoted}|{quoted}\s*(==|!=|\bin\b)|\bcase\s*{quoted}|family\.(name|title|version|model_type|llm_type)\s*(==|!=|\bin\b|\bnot\b)|\bif\b.*(family|\bf)\.(name|version|model_type)\b")
    found = [f'{file.name}: {line.strip()}' for file in package.glob('*.py') if file.name not in ('families.py', '_modidx.py') for line in file.read_text().splitlines() if branch.search(line.partition(' # ')[0])]
    assert found == []
    for line in ("if family.name == '2.6':", "if version in ('2.6', '4.5'):", "x = 1 if config['model_type'] == 'qwen' else 2", 'elif "4.5" != v: pass'): assert branch.search(line), line
