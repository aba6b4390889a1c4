"Every bad entry is named, with its reason and what to do; good entries pass unchanged and in order."
import json, os, re, subprocess, sys
from pathlib import Path

import pytest
from PIL import Image

from support import QUESTION, entry, talk, write_data
from minicpmv_nb.batches import SampleDataset, load_data
from minicpmv_nb.prompts import Processor
from minicpmv_nb.samples import DataError, check, read_entries


def problems(folder, *entries, **options):
    "What `check` finds, as (entry, reason, fix)."
    _, report = check(write_data(folder, list(entries)), **options)
    return [(p.entry, p.reason, p.fix) for p in report.problems]

def without(key): return {k: v for k, v in entry().items() if k != key}

def truncated(path):
    "A picture whose header is good and whose pixels end early."
    Image.effect_noise((200, 200), 100).convert('RGB').save(path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


# --- the entry -------------------------------------------------------------------------------------------------------

def test_good_entry(tmp_path):
    samples, report = check(write_data(tmp_path, [entry()]))
    assert (samples[0].id, report.entries, report.kept, report.problems, report.tags_added) == ('0', 1, 1, [], 0)
    assert samples[0].pictures[0].width == 60 and samples[0].pictures[0].height == 40

@pytest.mark.parametrize('bad', [without('id'), entry(id=None)])
def test_no_id(tmp_path, bad):
    assert problems(tmp_path, bad) == [(0, 'No id.', 'Give every entry a unique id.')]

def test_duplicate_id_names_the_first(tmp_path):
    assert problems(tmp_path, entry('a'), entry('b'), entry('a')) == [(2, 'The id is already used by entry 0.', 'Give every entry a unique id.')]

def test_ids_are_compared_as_text(tmp_path):
    assert problems(tmp_path, entry('1'), entry(1)) == [(1, 'The id is already used by entry 0.', 'Give every entry a unique id.')]

def test_id_of_a_bad_entry_is_taken_too(tmp_path):
    found = problems(tmp_path, entry('a', image='none.png'), entry('a'))
    assert found[1] == (1, 'The id is already used by entry 0.', 'Give every entry a unique id.')

@pytest.mark.parametrize('bad, kind', [('text', 'str'), (['a'], 'list'), (None, 'NoneType'), (7, 'int')])
def test_entry_is_not_an_object(tmp_path, bad, kind):
    assert problems(tmp_path, bad) == [(0, f'The entry is a {kind}.', 'Write an object with id, image and conversations.')]

def test_several_problems_of_one_entry_are_all_named(tmp_path):
    found = problems(tmp_path, dict(conversations=talk(answer='')))
    assert [reason for _, reason, _ in found] == ['No id.', 'No image.', 'Turn 1 is empty.']


# --- the picture -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [without('image'), entry(image=None)])
def test_no_image(tmp_path, bad):
    assert problems(tmp_path, bad) == [(0, 'No image.', 'Add "image": the path of its picture.')]

@pytest.mark.parametrize('image, kind', [(['dot.png'], 'list'), ({'<image_00>': 'dot.png'}, 'dict'), (3, 'int')])
def test_image_is_not_a_string(tmp_path, image, kind):
    assert problems(tmp_path, entry(image=image)) == [(0, f'image is a {kind}.', 'Give one path as a string: each entry has one picture.')]

def test_picture_does_not_exist(tmp_path):
    assert problems(tmp_path, entry(image='none.png')) == [
        (0, f'The picture {tmp_path/"none.png"} does not exist.', f'Paths are relative to {tmp_path}: correct the path or add the file.')]

@pytest.mark.parametrize('image', ['', '.'])
def test_a_folder_is_not_a_picture(tmp_path, image):
    assert 'does not exist' in problems(tmp_path, entry(image=image))[0][1]

@pytest.mark.parametrize('content', [b'', b'no picture at all', b'\x89PNG\r\n\x1a\n' + b'\0'*40])
def test_unreadable_picture(tmp_path, content):
    (tmp_path/'bad.png').write_bytes(content)
    [(_, reason, fix)] = problems(tmp_path, entry(image='bad.png'))
    assert re.fullmatch(rf'{re.escape(str(tmp_path/"bad.png"))} is not a readable picture \(\w+\)\.', reason)
    assert fix == 'Replace the file, with 8 bits per colour, or remove the entry.'

def test_picture_too_large_to_be_true(tmp_path, monkeypatch):
    # Pillow refuses a "decompression bomb"; its limit is lowered instead of drawing one.
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert 'is not a readable picture (DecompressionBombError).' in problems(tmp_path, entry())[0][1]

def test_truncated_picture_is_found_by_decoding(tmp_path):
    file = truncated(tmp_path/'cut.png')
    assert problems(tmp_path, entry(image='cut.png')) == []  # its header is good
    [(_, reason, fix)] = problems(tmp_path, entry(image='cut.png'), decode=True)
    assert reason == f'{file} is not a readable picture (OSError).' and fix == 'Replace the file, with 8 bits per colour, or remove the entry.'

def test_truncated_picture_is_named_when_a_batch_opens_it(tmp_path, tiny):
    file, processor = truncated(tmp_path/'cut.png'), Processor.from_folder(tiny)
    samples, _ = load_data(write_data(tmp_path, [entry('good'), entry('torn', image='cut.png')]), processor)
    data = SampleDataset(samples, processor)
    assert data[0]['id'] == 'good'
    with pytest.raises(ValueError) as e: data[1]
    assert str(e.value).startswith(f'sample torn (entry 1): {file} cannot be read (') and 'Replace the file' in str(e.value)

def test_picture_that_vanished_is_named_when_a_batch_opens_it(tmp_path, tiny):
    processor = Processor.from_folder(tiny)
    samples, _ = load_data(write_data(tmp_path, [entry('gone')]), processor)
    (tmp_path/'dot.png').unlink()
    with pytest.raises(ValueError, match=r'sample gone \(entry 0\): .*dot\.png cannot be read'): SampleDataset(samples, processor)[0]

def test_paths_are_relative_to_the_data_file(tmp_path, monkeypatch):
    (tmp_path/'data').mkdir(); (tmp_path/'elsewhere').mkdir()
    file = write_data(tmp_path/'data', [entry(), entry('1', image=str(tmp_path/'data'/'dot.png'))])
    monkeypatch.chdir(tmp_path/'elsewhere')
    for path in (file, Path(os.path.relpath(file))):
        samples, report = check(path)
        assert report.problems == [] and all(Path(s.pictures[0].path).samefile(tmp_path/'data'/'dot.png') for s in samples)


# --- the conversation ------------------------------------------------------------------------------------------------

SHAPE = 'Add "conversations": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'

@pytest.mark.parametrize('bad', [without('conversations'), entry(conversations=[]), entry(conversations='Hello'), entry(conversations=dict(role='user', content='x'))])
def test_no_conversations(tmp_path, bad):
    assert problems(tmp_path, bad) == [(0, 'No conversations.', SHAPE)]

@pytest.mark.parametrize('turn', ['Red.', dict(content='Red.'), dict(role='assistant'), {'from': 'gpt', 'value': 'Red.'}])
def test_turn_without_role_or_content(tmp_path, turn):
    assert problems(tmp_path, entry(conversations=[talk()[0], turn])) == [(0, 'Turn 1 has no role and content.', 'Write {"role": ..., "content": ...}.')]

ALTERNATE = 'Roles alternate: user, assistant, user, ...'

def test_roles_do_not_alternate(tmp_path):
    twice = [*talk(), dict(role='assistant', content='Really.')]
    assert problems(tmp_path, entry(conversations=twice)) == [(0, "Turn 2 has role 'assistant', expected 'user'.", ALTERNATE)]

def test_system_turn(tmp_path):
    found = problems(tmp_path, entry(conversations=[dict(role='system', content='Be brief.'), *talk()]))
    assert found[0] == (0, "Turn 0 has role 'system', expected 'user'.", ALTERNATE)

def test_assistant_begins(tmp_path):
    found = problems(tmp_path, entry(conversations=talk()[::-1]))
    assert found == [(0, "Turn 0 has role 'assistant', expected 'user'.", ALTERNATE), (0, "Turn 1 has role 'user', expected 'assistant'.", ALTERNATE)]

@pytest.mark.parametrize('content', ['', ' \n', None, 7, ['Red.']])
def test_content_is_empty_or_no_string(tmp_path, content):
    assert problems(tmp_path, entry(conversations=talk(answer=content))) == [(0, 'Turn 1 is empty.', 'Write its text, or remove the turn and its partner.')]

def test_no_answer(tmp_path):
    assert problems(tmp_path, entry(conversations=talk()[:1])) == [(0, 'No answer.', 'Add an assistant turn: it is what the model learns.')]

def test_question_after_the_last_answer_is_no_problem(tmp_path):
    # It is read and not taught, as in the official script.
    assert problems(tmp_path, entry(conversations=[*talk(), dict(role='user', content='And now?')])) == []


# --- the tag ---------------------------------------------------------------------------------------------------------

MISPLACED = 'Put it at the beginning of the first turn, or declare it text with extra_image_tags="literal".'

def test_missing_tag_is_put_first_and_counted(tmp_path):
    samples, report = check(write_data(tmp_path, [entry('a', conversations=talk(question=QUESTION)), entry('b')]))
    assert report.tags_added == 1 and report.problems == [] and '1 without <image>, picture put first' in str(report)
    assert samples[0].turns == samples[1].turns

@pytest.mark.parametrize('question', [f'<image>\n{QUESTION}', f'<image>{QUESTION}'])
def test_tag_and_its_line_break_are_not_text(tmp_path, question):
    samples, _ = check(write_data(tmp_path, [entry(conversations=talk(question=question))]))
    assert samples[0].turns[0].parts[1:] == (QUESTION,)

def test_tag_alone_is_a_question(tmp_path):
    samples, report = check(write_data(tmp_path, [entry(conversations=talk(question='<image>\n'))]))
    assert report.problems == [] and len(samples[0].turns[0].parts) == 1

@pytest.mark.parametrize('question', [f'{QUESTION}\n<image>', f'\n<image>\n{QUESTION}', f'<image>\n<image>\n{QUESTION}'])
def test_tag_elsewhere_in_the_first_turn(tmp_path, question):
    assert problems(tmp_path, entry(conversations=talk(question=question))) == [(0, '<image> inside turn 0.', MISPLACED)]

def test_tag_in_an_answer(tmp_path):
    assert problems(tmp_path, entry(conversations=talk(answer='Write <image> there.'))) == [(0, '<image> inside turn 1.', MISPLACED)]

def test_tag_in_a_later_question(tmp_path):
    more = talk() + talk(question='<image>\nAnd this?')
    assert problems(tmp_path, entry(conversations=more)) == [(0, '<image> inside turn 2.', MISPLACED)]

def test_literal_tags_are_text(tmp_path, tiny):
    # Only the first one is the picture; the others reach the tokenizer as the letters they are.
    file = write_data(tmp_path, [entry(conversations=talk('Write <image> there.', f'<image>\n<image> means what?'))])
    processor = Processor.from_folder(tiny)
    samples, report = load_data(file, processor, extra_image_tags='literal')
    assert report.problems == [] and samples[0].turns[0].parts[1] == '<image> means what?'
    data = SampleDataset(samples, processor)
    assert data.encoded[0].input_ids.count(processor.special_ids['<image>']) == 1 == len(data[0]['target_sizes'])
    assert 'Write <image> there.' in processor.tokenizer.decode(data.encoded[0].input_ids)


# --- the file --------------------------------------------------------------------------------------------------------

def test_file_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError) as e: read_entries(tmp_path/'none.json')
    assert str(e.value) == f'There is no data file {tmp_path/"none.json"}.'

@pytest.mark.parametrize('text, place', [('[\n {"id": "0",}\n]', 'line 2, column'), ('{"id": 1}\n{"id": 2}\n', 'line 2, column 1'), ("['a']", 'line 1, column 2'), ('', 'line 1, column 1')])
def test_broken_json_gives_line_and_column(tmp_path, text, place):
    (tmp_path/'data.json').write_text(text)
    with pytest.raises(ValueError) as e: check(tmp_path/'data.json')
    assert f'data.json is not valid JSON: {place}' in str(e.value) and 'JSON needs double quotes' in str(e.value)

@pytest.mark.parametrize('value, kind', [({'id': '0'}, 'dict'), ('text', 'str'), (None, 'NoneType')])
def test_not_a_list(tmp_path, value, kind):
    with pytest.raises(ValueError) as e: check(write_data(tmp_path, value))
    assert f'holds a JSON {kind}, not a list of conversations. Put the entries into [ ].' in str(e.value)

def test_empty_list(tmp_path):
    with pytest.raises(ValueError, match='is an empty list: there is nothing to train on'): check(write_data(tmp_path, []))

def test_not_utf8(tmp_path):
    (tmp_path/'data.json').write_bytes('[{"id": "Käse"}]'.encode('latin-1'))
    with pytest.raises(ValueError, match=r'data\.json is not UTF-8 text \(byte 10\)\. Save it as UTF-8\.'): check(tmp_path/'data.json')

def test_byte_order_mark_is_read(tmp_path):
    file = write_data(tmp_path, [entry()])
    file.write_text(file.read_text(), encoding='utf-8-sig')
    assert len(check(file)[0]) == 1

def test_utf8_is_read_whatever_the_locale(tmp_path):
    file = write_data(tmp_path, [entry('Käse')])
    file.write_text(json.dumps([entry('Käse')], ensure_ascii=False), encoding='utf-8')
    code = f'from minicpmv_nb.samples import check; print(ascii(check({str(file)!r})[0][0].id))'
    done = subprocess.run([sys.executable, '-X', 'utf8=0', '-c', code], env=os.environ | dict(LC_ALL='C', PYTHONCOERCECLOCALE='0'), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii('Käse')


# --- length, and what becomes of bad entries -------------------------------------------------------------------------

@pytest.fixture
def mixed(tmp_path):
    "Good and bad entries in turn; the last but one is too long."
    return write_data(tmp_path, [entry('a'), entry('b', image='none.png'), 'text', entry('d'), entry('e', conversations=talk()[:1]),
                                 entry('f', conversations=talk('red '*400)), entry('g')])

def test_long_sample_is_named_by_its_place_in_the_file(mixed, tiny):
    with pytest.raises(DataError) as e: load_data(mixed, Processor.from_folder(tiny), max_length=300)
    report = e.value.report
    assert [(p.entry, p.id) for p in report.problems] == [(1, 'b'), (2, ''), (4, 'e'), (5, 'f')]
    long = report.problems[-1]
    length = int(long.reason.split()[0])
    assert length > 300 and re.fullmatch(rf'{length} tokens \(\d+ for pictures\), more than model_max_length 300\.', long.reason)
    assert long.fix == f'Set model_max_length to {length}, lower max_slice_nums, or shorten the text.'

def test_the_length_that_is_asked_for_is_enough(tmp_path, tiny):
    file, processor = write_data(tmp_path, [entry()]), Processor.from_folder(tiny)
    with pytest.raises(DataError) as e: load_data(file, processor, max_length=10)
    length = int(e.value.report.problems[0].reason.split()[0])
    samples, report = load_data(file, processor, max_length=length)
    assert len(samples) == 1 and report.tokens == dict(longest=length, mean=length, model_max_length=length)
    with pytest.raises(DataError): load_data(file, processor, max_length=length - 1)

def test_error_lists_every_bad_entry(mixed, tiny):
    with pytest.raises(DataError) as e: load_data(mixed, Processor.from_folder(tiny), max_length=300)
    said = str(e.value)
    assert f'{mixed}: 7 entries, 3 good, 4 bad' in said
    assert 'entry 4 (id e): No answer. Add an assistant turn: it is what the model learns.' in said
    assert said.endswith('Mend these entries, or train on the others with bad_samples="skip".')

def test_skip_keeps_exactly_the_good_ones_in_order(mixed, tiny):
    samples, report = load_data(mixed, Processor.from_folder(tiny), max_length=300, bad_samples='skip')
    assert [(s.id, s.entry) for s in samples] == [('a', 0), ('d', 3), ('g', 6)]
    assert (report.entries, report.kept, len(report.problems)) == (7, 3, 4)

def test_kept_samples_are_whole(mixed, tiny):
    # Neither swapped for a neighbour nor cut: each text is the file's, to the last letter.
    samples, _ = load_data(mixed, Processor.from_folder(tiny), max_length=300, bad_samples='skip')
    entries = json.loads(mixed.read_text())
    for s in samples: assert [t.parts[-1] for t in s.turns[1:]] == [t['content'] for t in entries[s.entry]['conversations'][1:]]

def test_nothing_left(tmp_path, tiny):
    file = write_data(tmp_path, [entry('a', image='none.png'), entry('b', conversations=talk('red '*400))])
    with pytest.raises(DataError, match='2 entries, 0 good, 2 bad'): load_data(file, Processor.from_folder(tiny), max_length=300, bad_samples='skip')

def test_many_problems_are_summed_up(tmp_path):
    _, report = check(write_data(tmp_path, [without('id') for _ in range(50)]))
    assert '... and 30 more: No id.' in str(report) and len(report.rows()) == 50
    assert '<table>' in report._repr_html_()

def test_report_escapes_what_the_file_says(tmp_path):
    _, report = check(write_data(tmp_path, [entry('<b>x</b>', image='none.png')]))
    assert '<b>' not in report._repr_html_()


# --- entries that once slipped through, or stopped the check without a name ---------------------------------------------

def test_empty_id_is_no_id(tmp_path):
    assert problems(tmp_path, entry('')) == [(0, 'No id.', 'Give every entry a unique id.')]

def test_picture_inside_the_data_file_is_named(tmp_path):
    # A path of this length makes the file system itself complain.
    [(_, reason, fix)] = problems(tmp_path, entry(image='data:image/png;base64,' + 'iVBORw0KGgo'*800))
    assert len(reason) < 300 and fix

def test_half_a_character_is_named(tmp_path, tiny):
    # JSON can write half of an emoji; no tokenizer takes it.
    with pytest.raises(DataError) as e: load_data(write_data(tmp_path, [entry('a'), entry('b', conversations=talk('\ud83d'))]), Processor.from_folder(tiny))
    assert [(p.entry, p.id) for p in e.value.report.problems] == [(1, 'b')]
