"The guide's own shape of data, six two-turn conversations about three photographs' sizes, learnt by heart and said again by the merged checkpoint."
import json, math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from minicpmv_nb.chat import Chat
from minicpmv_nb.config import lora
from minicpmv_nb.jobs import launch
from minicpmv_nb.merging import merge
from minicpmv_nb.model import tiny_checkpoint
from minicpmv_nb.samples import Turn, check

SIZES = [(300, 168), (300, 199), (300, 166)]
TALKS = [
    [('Who are they?', "They're two sailors from the harbour of Lisbon."), ('What are they doing?', 'They are mending a net on the quay.')],
    [('Who is he?', "He's the cook of the little blue boat."), ('Why is he on the deck?', "Because he's looking for his spoon.")],
    [('Please describe this image', 'A lighthouse keeper is reading a letter.'), ('What has she done?', 'She kept the lamp burning through forty winters, and in the spring of the last one she painted the tower again, white and red, all by herself, from the rail down to the rocks.')],
    [('他们是谁？', '他们是里斯本港的两个水手。'), ('他们在做什么？', '他们在码头上补网。')],
    [('他是谁？', '他是小蓝船上的厨师。'), ('他为什么在甲板上？', '因为他在找他的勺子。')],
    [('请描述这张图片', '灯塔看守人正在读信。'), ('她做过什么？', '她让灯在四十个冬天里一直亮着，并在最后一个春天独自把塔重新漆成红白两色。')],
]

def write(folder:Path)->Path:
    "Three drawn pictures, six entries."
    (folder/'images').mkdir(parents=True)
    for i, size in enumerate(SIZES):
        im = Image.new('RGB', size, ('#cfe8ef', '#f7e1c4', '#d9ead3')[i]); d = ImageDraw.Draw(im)
        for k in range(5): d.ellipse((20+50*k, 20+17*((k*(i+2)) % 7), 60+50*k, 60+17*((k*(i+2)) % 7)), fill=('#1d3557', '#d62728', '#2ca02c', '#ff9f1c', '#6a4c93')[(k+i) % 5])
        im.save(folder/'images'/f'{i+1}.png')
    turns = lambda talk: [dict(role=r, content=c) for j, (q, a) in enumerate(talk) for r, c in (('user', ('<image>\n' if j == 0 else '') + q), ('assistant', a))]
    (folder/'six.json').write_text(json.dumps([dict(id=str(i), conversations=turns(t), image=f'images/{i % 3 + 1}.png') for i, t in enumerate(TALKS)], ensure_ascii=False), encoding='utf-8')
    return folder/'six.json'

def said(chat:Chat, file:Path)->list[bool]:
    "Whether each answer is given word by word, after the right answers before it."
    right = []
    for s in check(file)[0]:
        pictures = [Image.open(p.path) for p in s.pictures]
        for i in range(1, len(s.turns), 2): right.append(chat.answer(s.turns[:i], pictures, max_new_tokens=200) == s.turns[i].parts[0])
    return right

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp('six')/'base', [t for talk in TALKS for pair in talk for t in pair], hidden_size=256, num_hidden_layers=2)

@pytest.mark.slow
@pytest.mark.parametrize('stage', [2, 3])
def test_six_conversations_are_learnt_by_heart(base, tmp_path, stage):
    file = write(tmp_path/'data')
    cfg = lora(str(base), str(file), output_dir=str(tmp_path/'run'), use_cpu=True, gpus=2, fp16=False, deepspeed=f'ds_config_zero{stage}.json', max_steps=130, save_steps=1000,
        per_device_train_batch_size=3, gradient_accumulation_steps=1, learning_rate=5e-3, lora_dropout=0.0, weight_decay=0.0, tune_vision=False, gradient_checkpointing=False, dataloader_num_workers=0, report_to='none')
    assert not any(said(Chat.load(base), file))
    run = launch(cfg).wait(timeout=600)
    chat = Chat.load(merge(base, run.final, tmp_path/'merged', check=False))
    assert all(said(chat, file)), run.metrics()[-1]
