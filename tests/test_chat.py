"Answers that are not lost, and adapters of another base."
import json

import pytest

from minicpmv_nb.chat import Chat, answer_file, main
from minicpmv_nb.config import lora
from minicpmv_nb.model import NOTES, fingerprint, load, tiny_checkpoint
from minicpmv_nb.quantizing import quantize
from minicpmv_nb.tuning import tune
from support import ANSWERS, QUESTION

SAID = 'One\n"two"\u2028drei'


@pytest.fixture
def asked(tiny, monkeypatch):
    "A chat that says the same to everyone."
    monkeypatch.setattr(Chat, 'answer', lambda *a, **k: SAID)
    return Chat.load(tiny)

def test_answers_are_written_as_they_come(asked, drawn, tmp_path):
    out, seen = tmp_path/'answers.json', []
    out.write_text('an older file'*1000)
    def watch(found, entries):
        assert out.read_text(encoding='utf-8') == json.dumps(found, indent=1, ensure_ascii=False)
        seen.append(len(found))
    answers = answer_file(asked, drawn, limit=3, watch=watch, out=out)
    assert seen == [1, 2, 3] and json.loads(out.read_text(encoding='utf-8')) == answers and answers[0]['answer'] == SAID

def test_answers_survive_an_interruption(asked, tiny, drawn, tmp_path, monkeypatch):
    replies = iter(['one', 'two'])
    def answer(*a, **k):
        for said in replies: return said
        raise KeyboardInterrupt
    monkeypatch.setattr(Chat, 'answer', answer)
    with pytest.raises(KeyboardInterrupt): main([str(tiny), str(drawn), '--out', str(tmp_path/'new'/'answers.json')])
    assert [a['answer'] for a in json.loads((tmp_path/'new'/'answers.json').read_text())] == ['one', 'two']

def test_what_cannot_be_written_is_noticed_before_loading(tiny, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(Chat, 'load', lambda *a, **k: pytest.fail('loaded'))
    (tmp_path/'file').write_text('x')
    for out in (tmp_path, tmp_path/'file'/'answers.json'):
        with pytest.raises(OSError): main([str(tiny), str(drawn), '--out', str(out)])

@pytest.mark.parametrize('limit', [0, -1])
def test_limit_below_1(asked, tiny, drawn, monkeypatch, capsys, limit):
    with pytest.raises(ValueError, match=f'limit is {limit}: ask 1 entry at least'): answer_file(asked, drawn, limit=limit)
    monkeypatch.setattr(Chat, 'load', lambda *a, **k: pytest.fail('loaded'))
    with pytest.raises(SystemExit): main([str(tiny), str(drawn), f'--limit={limit}'])
    assert f'--limit is {limit}: ask 1 entry at least' in capsys.readouterr().err

def test_adapter_of_another_base(tiny, tmp_path, capsys):
    tune(load(tiny), lora(str(tiny), 'train.json', lora_r=2, tune_vision=False)).save_pretrained(tmp_path/'adapter', save_embedding_layers=False)
    other = tiny_checkpoint(tmp_path/'other', [QUESTION, *ANSWERS], seed=1)
    note = 'was trained on other weights than those in'
    said = lambda folder: (Chat.load(folder, tmp_path/'adapter'), capsys.readouterr().out)[1]
    assert note not in said(other) # nothing is recorded
    (tmp_path/'adapter'/NOTES).write_text(json.dumps(dict(base=fingerprint(tiny))))
    assert note not in said(tiny) and f"Note: {tmp_path/'adapter'} {note} {other}" in said(other)
    assert note not in said(quantize(tiny, tmp_path/'int4'))
