"Every bad entry is named, with its reason and what to do; good entries pass unchanged and in order."
import json, os, re, subprocess, sys
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from support import QUESTION, entry, talk, write_data
from minicpmv_nb.batches import SampleDataset, load_data
from minicpmv_nb.prompts import Processor
from minicpmv_nb.samples import DataError, Picture, Report, check, open_picture, read_entries


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
    found = problems(tmp_path, dict(image='none.png', conversations=talk(answer='')))
    assert [reason for _, reason, _ in found] == ['No id.', f'The picture {tmp_path/"none.png"} does not exist.', 'Turn 1 is empty.']


# --- the picture -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('image, kind', [(['dot.png'], 'list'), (3, 'int'), (True, 'bool')])
def test_image_is_neither_string_nor_dictionary(tmp_path, image, kind):
    assert problems(tmp_path, entry(image=image)) == [
        (0, f'image is a {kind}.', 'Give one path as a string, or several as {"<image_00>": path, "<image_01>": path, ...}.')]

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

@pytest.mark.parametrize('error', [ValueError, RuntimeError])
def test_whatever_a_decoder_says_becomes_a_row(tmp_path, monkeypatch, error):
    # Pillow's plugins for PNG and AVIF raise these for some torn headers.
    def torn(path): raise error('torn')
    file = write_data(tmp_path, [entry()])
    monkeypatch.setattr(Image, 'open', torn)
    assert [p.reason for p in check(file)[1].problems] == [f'{tmp_path/"dot.png"} is not a readable picture ({error.__name__}).']

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

def test_what_is_known_of_a_file_is_not_measured_again(tmp_path, tiny, monkeypatch):
    from minicpmv_nb import batches
    processor = Processor.from_folder(tiny)
    file = write_data(tmp_path, [entry('good'), entry('long', conversations=talk(answer='red '*300)), entry('torn', image='none.png'), entry('other')])
    samples, report = load_data(file, processor, 200, 'skip')
    kept = Report.from_dict(json.loads(json.dumps(asdict(report))))
    assert [p.entry for p in report.problems] == [1, 2] and kept == report
    measured, find_long = [], batches.find_long
    monkeypatch.setattr(batches, 'find_long', lambda *args: measured.append(1) or find_long(*args))
    again = lambda **how: load_data(file, processor, **dict(max_length=200, bad_samples='skip', known=kept) | how)
    assert again() == (samples, report)
    Image.new('RGB', (60, 40)).save(tmp_path/'none.png') # too late for this run
    assert again() == (samples, report) and not measured
    for how in (dict(max_length=100), dict(decode=True)): assert again(**how)[1] != report
    with pytest.raises(DataError, match='more than model_max_length 200'): again(bad_samples='error')
    Image.new('RGB', (400, 300)).save(tmp_path/'dot.png') # larger than it was
    assert again(max_length=300)[1].tokens['longest'] > report.tokens['longest'] and len(measured) == 4
    (tmp_path/'dot.png').unlink()
    assert [x.id for x in again()[0]] == ['torn']

def test_a_dataset_tokenises_what_is_asked_for(tmp_path, tiny, monkeypatch):
    from minicpmv_nb import batches
    processor = Processor.from_folder(tiny)
    samples, _ = load_data(write_data(tmp_path, [entry('0'), entry('1')]), processor)
    asked, encode = [], batches.encode
    monkeypatch.setattr(batches, 'encode', lambda turns, *rest: asked.append(turns) or encode(turns, *rest))
    data = SampleDataset(samples, processor)
    data[1]
    assert asked == [samples[1].turns]

def test_picture_that_vanished_is_named_when_a_batch_opens_it(tmp_path, tiny):
    processor = Processor.from_folder(tiny)
    samples, _ = load_data(write_data(tmp_path, [entry('gone')]), processor)
    (tmp_path/'dot.png').unlink()
    with pytest.raises(ValueError, match=r'sample gone \(entry 0\): .*dot\.png cannot be read'): SampleDataset(samples, processor)[0]

def picture(path, orientation=None, frames=1, **how):
    "A picture file of 60x40 pixels."
    exif = Image.Exif()
    if orientation is not None: exif[0x0112] = orientation
    first, *more = [Image.new('RGB', (60, 40), colour) for colour in ('red', 'blue', 'green')[:frames]]
    first.save(path, exif=exif, **(dict(save_all=True, append_images=more) if more else {}), **how)
    return path

@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_exif_rotation_is_counted_and_not_applied(tmp_path, suffix):
    picture(tmp_path/f'turned.{suffix}', 6)
    samples, report = check(write_data(tmp_path, [entry('a', f'turned.{suffix}'), entry('b')]))
    assert report.rotated == 1 and str(report).endswith('; 1 picture carries an EXIF rotation, which is not applied')
    assert [(p.width, p.height) for p in samples[0].pictures] == [(60, 40)]

@pytest.mark.parametrize('orientation', [None, 0, 1, 9])
def test_upright_or_meaningless_orientation_is_not_counted(tmp_path, orientation):
    picture(tmp_path/'a.jpg', orientation)
    _, report = check(write_data(tmp_path, [entry(image='a.jpg')]))
    assert report.rotated == 0 and 'EXIF' not in str(report)

def test_rotation_that_pillow_applies_is_not_counted(tmp_path):
    picture(tmp_path/'a.tiff', 6)
    samples, report = check(write_data(tmp_path, [entry(image='a.tiff')]))
    with Image.open(tmp_path/'a.tiff') as im: assert im.convert('RGB').size == (samples[0].pictures[0].width, samples[0].pictures[0].height) == (40, 60)
    assert report.rotated == 0

@pytest.mark.parametrize('suffix', ['gif', 'png', 'webp', 'tiff'])
@pytest.mark.parametrize('decode', [False, True])
def test_animation_is_counted(tmp_path, suffix, decode):
    picture(tmp_path/f'moves.{suffix}', frames=3)
    _, report = check(write_data(tmp_path, [entry('a', f'moves.{suffix}'), entry('b')]), decode=decode)
    assert report.animated == 1 and report.problems == [] and str(report).endswith('; 1 animation, first frame used')

def test_single_frame_and_preview_are_no_animation(tmp_path):
    picture(tmp_path/'one.gif'); picture(tmp_path/'camera.mpo', frames=2)
    _, report = check(write_data(tmp_path, [entry('a', 'one.gif'), entry('b', 'camera.mpo')]))
    assert report.animated == 0 and report.kept == 2

def test_files_are_counted_once_and_in_the_plural(tmp_path):
    picture(tmp_path/'a.jpg', 3); picture(tmp_path/'b.jpg', 8); picture(tmp_path/'a.gif', frames=2); picture(tmp_path/'b.gif', frames=3)
    _, report = check(write_data(tmp_path, [entry(str(i), image) for i, image in enumerate(['a.jpg', 'b.jpg', 'a.jpg', 'a.gif', 'b.gif', 'b.gif'])]))
    assert str(report).endswith('; 2 pictures carry an EXIF rotation, which is not applied; 2 animations, first frame used')

def test_broken_exif_or_second_frame_is_no_problem(tmp_path):
    # Neither is ever looked at.
    file = picture(tmp_path/'exif.webp', 6)
    file.write_bytes(re.sub(rb'EXIF(....)(Exif\0\0)?(MM|II)', rb'EXIF\1\2??', file.read_bytes(), flags=re.S))
    file = picture(tmp_path/'torn.gif', frames=3)
    with Image.open(file) as im: im.seek(1); second = im.tile[0].offset
    file.write_bytes(file.read_bytes()[:second - 8])
    for decode in (False, True):
        _, report = check(write_data(tmp_path, [entry('a', 'exif.webp'), entry('b', 'torn.gif')]), decode=decode)
        assert report.problems == [] and (report.rotated, report.animated) == (0, 0)

def test_open_picture_gives_the_stored_size(tmp_path):
    assert open_picture(picture(tmp_path/'a.jpg', 6)) == Picture(str(tmp_path/'a.jpg'), 60, 40)

def test_paths_are_relative_to_the_data_file(tmp_path, monkeypatch):
    (tmp_path/'data').mkdir(); (tmp_path/'elsewhere').mkdir()
    file = write_data(tmp_path/'data', [entry(), entry('1', image=str(tmp_path/'data'/'dot.png'))])
    monkeypatch.chdir(tmp_path/'elsewhere')
    for path in (file, Path(os.path.relpath(file))):
        samples, report = check(path)
        assert report.problems == [] and all(Path(s.pictures[0].path).samefile(tmp_path/'data'/'dot.png') for s in samples)


# --- several pictures ------------------------------------------------------------------------------------------------

TWO = {'<image_00>': 'dot.png', '<image_01>': 'other.png'}
BOTH = '<image_00>\n<image_01>\nWhat differs?'
DECLARE = 'or declare it text with extra_image_tags="literal".'

@pytest.fixture
def album(tmp_path):
    "A folder with other.png; dot.png comes with the data file."
    picture(tmp_path/'other.png')
    return tmp_path

def several(*questions, answer='Red.', image=TWO, **other):
    return entry(image=image, conversations=[turn for q in questions for turn in talk(answer, q)], **other)

def shown(sample):
    "The parts of every user turn, pictures by file name."
    return [[Path(p.path).name if isinstance(p, Picture) else p for p in t.parts] for t in sample.turns if t.role == 'user']

def read_one(folder, one, **options):
    samples, report = check(write_data(folder, [one]), **options)
    assert report.problems == []
    return samples[0]

def test_pictures_come_in_the_order_of_the_text(album):
    sample = read_one(album, several('<image_01>\nand\n<image_00>\nWhat differs?'))
    assert shown(sample) == [['other.png', 'and', 'dot.png', 'What differs?']]
    assert [Path(p.path).name for p in sample.pictures] == ['other.png', 'dot.png']

def test_pictures_of_any_user_turn(album):
    sample = read_one(album, several('Hello!', '<image_01>\nWhat is it?', 'And this: <image_00>'))
    assert shown(sample) == [['Hello!'], ['other.png', 'What is it?'], ['And this: ', 'dot.png']]

@pytest.mark.parametrize('text, parts', [
    ('<image_00><image_01>', ['dot.png', 'other.png']),
    ('<image_00>\n<image_01>\nQ', ['dot.png', 'other.png', 'Q']),
    ('<image_00>\n\n<image_01>\n \n', ['dot.png', 'other.png']),
    ('\nQ\n\n<image_00>\n\nR\n\n<image_01>\n\nS\n', ['\nQ\n', 'dot.png', '\nR\n', 'other.png', '\nS\n']),
    ('a <image_00> b <image_01> c', ['a ', 'dot.png', ' b ', 'other.png', ' c'])])
def test_one_line_break_on_each_side_goes_with_the_tag(album, text, parts):
    assert shown(read_one(album, several(text))) == [parts]

def test_two_tags_may_name_one_file(album):
    sample = read_one(album, several(BOTH, image=dict.fromkeys(TWO, 'dot.png')))
    assert shown(sample) == [['dot.png', 'dot.png', 'What differs?']]

def test_dictionary_of_one_is_read_as_such(album):
    sample = read_one(album, several('Look:\n<image_7>', image={'<image_7>': 'dot.png'}))
    assert shown(sample) == [['Look:', 'dot.png']]

def test_plain_tag_alone_in_a_dictionary_means_the_string(album):
    plain, named = read_one(album, entry()), read_one(album, entry(image={'<image>': 'dot.png'}))
    assert plain == named

def test_tag_that_no_text_uses(album):
    assert problems(album, several('<image_00>\nWhat is it?')) == [
        (0, '<image_01> is in image, but not in the text.', 'Write <image_01> into a user turn, where the picture belongs, or remove it from image.')]

@pytest.mark.parametrize('questions', [(BOTH + '<image_01>',), (BOTH, 'Again: <image_01>')])
def test_tag_used_twice(album, questions):
    assert problems(album, several(*questions)) == [(0, '<image_01> is used 2 times.', 'Use it once; a second tag in image may name the same file.')]

def test_tag_without_a_picture(album):
    assert problems(album, several(BOTH, '<image_02> or <image_02>?')) == [(0, '<image_02> inside turn 2 is not in image.', f'Add its path to image, correct the tag, {DECLARE}')]

def test_every_wrong_tag_is_named(album):
    found = problems(album, several('<image_00>, <image_00>, <image_2>, <image_3>'))
    assert [reason for _, reason, _ in found] == ['<image_2> inside turn 0 is not in image.', '<image_3> inside turn 0 is not in image.',
        '<image_00> is used 2 times.', '<image_01> is in image, but not in the text.']

@pytest.mark.parametrize('question', ['<image_00>\nWhat is it?', BOTH])
@pytest.mark.parametrize('literal', ['report', 'literal'])
def test_tag_in_an_answer_is_no_picture(album, question, literal):
    assert problems(album, several(question, answer='As in <image_01>.'), extra_image_tags=literal)[0] == (
        0, "<image_01> inside turn 1, which is of role 'assistant'.", 'Only a user turn shows pictures: move the tag there, or remove it.')

def test_tag_in_a_system_turn_is_no_picture(album):
    system = [dict(role='system', content='Compare with <image_01>.')]
    assert problems(album, entry(image=TWO, conversations=system + talk(question='<image_00>\nWhat is it?'))) == [
        (0, "<image_01> inside turn 0, which is of role 'system'.", 'Only a user turn shows pictures: move the tag there, or remove it.')]

@pytest.mark.parametrize('question, answer, turn', [('<image>\n' + BOTH, 'Red.', 0), (BOTH, 'Write <image>.', 1)])
def test_plain_tag_among_numbered_ones(album, question, answer, turn):
    assert problems(album, several(question, answer=answer)) == [
        (0, f'<image> inside turn {turn}.', f'The entry has several pictures: write the tag of one, such as <image_00>, {DECLARE}')]

def test_literal_keeps_the_tags_of_the_dictionary(album):
    sample = read_one(album, several('<image> and <image_9>\n' + BOTH, answer='No <image_9>, no <image>.'), extra_image_tags='literal')
    assert shown(sample) == [['<image> and <image_9>', 'dot.png', 'other.png', 'What differs?']] and sample.turns[1].parts == ('No <image_9>, no <image>.',)
    assert problems(album, several('<image_00>, <image_00>'), extra_image_tags='literal') == [
        (0, '<image_00> is used 2 times.', 'Use it once; a second tag in image may name the same file.'),
        (0, '<image_01> is in image, but not in the text.', 'Write <image_01> into a user turn, where the picture belongs, or remove it from image.')]

@pytest.mark.parametrize('key', ['image_00', '<image_>', '<image_0a>', ' <image_01>', '', '<image>'])
def test_key_that_is_no_tag(album, key):
    assert problems(album, several(BOTH, image={'<image_00>': 'dot.png', key: 'other.png'})) == [
        (0, f'{key!r} in image is not a tag.', 'Name several pictures <image_00>, <image_01>, ..., as in the text.')]

def test_empty_dictionary(album):
    assert problems(album, several('What is it?', image={})) == [(0, 'image is an empty dictionary.', 'Remove image from an entry that is text only, or name its pictures.')]

@pytest.mark.parametrize('path, kind', [(None, 'NoneType'), (['dot.png'], 'list'), (3, 'int')])
def test_path_is_not_a_string(album, path, kind):
    assert problems(album, several(BOTH, image={**TWO, '<image_01>': path})) == [(0, f'<image_01>: The path is a {kind}.', 'Give it as a string.')]
    assert problems(album, entry(image={'<image>': path})) == [(0, f'<image>: The path is a {kind}.', 'Give it as a string.')]

def test_unusable_picture_is_named_by_its_tag(album):
    (album/'text.png').write_text('no picture')
    assert problems(album, several(BOTH, image={'<image_00>': 'none.png', '<image_01>': 'text.png'})) == [
        (0, f'<image_00>: The picture {album/"none.png"} does not exist.', f'Paths are relative to {album}: correct the path or add the file.'),
        (0, f'<image_01>: {album/"text.png"} is not a readable picture (UnidentifiedImageError).', 'Replace the file, with 8 bits per colour, or remove the entry.')]

def test_unusable_picture_does_not_hide_wrong_tags(album):
    found = problems(album, several('<image_00>', image={**TWO, '<image_00>': 'none.png'}))
    assert [reason for _, reason, _ in found] == [f'<image_00>: The picture {album/"none.png"} does not exist.', '<image_01> is in image, but not in the text.']


# --- no picture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('extra', [{}, dict(image=None)])
def test_text_only_is_counted(tmp_path, extra):
    texts = [dict(id=str(i), conversations=talk(question=QUESTION)) | extra for i in range(3)]
    samples, report = check(write_data(tmp_path, [*texts, entry('x')]))
    assert report.text_only == 3 and str(report).endswith('; 3 without a picture')
    assert samples[0].pictures == [] and samples[0].turns[0].parts == (QUESTION,)

def test_no_text_only_no_word(tmp_path):
    assert str(check(write_data(tmp_path, [entry()]))[1]).endswith('1 entries, 1 good, 0 bad')

@pytest.mark.parametrize('tag', ['<image>', '<image_00>'])
@pytest.mark.parametrize('conversations', [talk(question='{}\nWhat is it?'), talk('{} {}', 'What is it?')])
def test_tag_without_an_image(tmp_path, tag, conversations):
    conversations = [turn | dict(content=turn['content'].replace('{}', tag)) for turn in conversations]
    bad = without('image') | dict(conversations=conversations)
    assert problems(tmp_path, bad) == [(0, f'The text has {tag}, but the entry has no image.', f'Add image, or remove the tag, {DECLARE}')]
    samples, report = check(write_data(tmp_path, [bad]), extra_image_tags='literal')
    assert report.text_only == 1 and [t.parts for t in samples[0].turns] == [(t['content'],) for t in conversations]

@pytest.mark.parametrize('key', ['images', 'img', 'Image', 'image_path', 'image_file', 'picture', 'iamge', 'image1'])
@pytest.mark.parametrize('extra', [{}, dict(image=None)])
def test_misspelt_image(tmp_path, key, extra):
    assert problems(tmp_path, without('image') | extra | {key: 'dot.png'}) == [(0, f'No image, but a key {key}.', f'Rename {key} to image.')]

@pytest.mark.parametrize('other', [dict(message='x'), dict(image_id='x'), dict(image_size='x'), dict(page='x'), dict(language='x'), dict(source='x'), dict(images=[]), dict(img=None)])
def test_other_keys_are_not_image(tmp_path, other):
    assert problems(tmp_path, dict(id='0', conversations=talk(question=QUESTION)) | other) == []


# --- the conversation ------------------------------------------------------------------------------------------------

SHAPE = 'Add "conversations": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'

@pytest.mark.parametrize('bad', [without('conversations'), entry(conversations=[]), entry(conversations='Hello'), entry(conversations=dict(role='user', content='x'))])
def test_no_conversations(tmp_path, bad):
    assert problems(tmp_path, bad) == [(0, 'No conversations.', SHAPE)]

@pytest.mark.parametrize('turn', ['Red.', dict(content='Red.'), dict(role='assistant'), {'from': 'gpt', 'value': 'Red.'}])
def test_turn_without_role_or_content(tmp_path, turn):
    assert problems(tmp_path, entry(conversations=[talk()[0], turn])) == [(0, 'Turn 1 has no role and content.', 'Write {"role": ..., "content": ...}.')]

ALTERNATE = 'Roles alternate: user, assistant, user, ... after at most one system turn.'

def test_roles_do_not_alternate(tmp_path):
    twice = [*talk(), dict(role='assistant', content='Really.')]
    assert problems(tmp_path, entry(conversations=twice)) == [(0, "Turn 2 has role 'assistant', expected 'user'.", ALTERNATE)]

SYSTEM = dict(role='system', content='Be brief.')

def test_system_turn_comes_before_the_picture(tmp_path):
    samples, report = check(write_data(tmp_path, [entry('a', conversations=[SYSTEM, *talk()]), entry('b', conversations=[SYSTEM, *talk(question=QUESTION)])]))
    assert report.problems == [] and report.tags_added == 1 and samples[0].turns == samples[1].turns
    assert [t.role for t in samples[0].turns] == ['system', 'user', 'assistant'] and samples[0].turns[0].parts == ('Be brief.',)
    assert isinstance(samples[0].turns[1].parts[0], Picture) and samples[0].turns[1].parts[1:] == (QUESTION,)

def test_system_turn_with_several_pictures_or_none(album):
    assert shown(read_one(album, entry(image=TWO, conversations=[SYSTEM, *talk(question=BOTH)]))) == [['dot.png', 'other.png', 'What differs?']]
    assert shown(read_one(album, without('image') | dict(conversations=[SYSTEM, *talk(question=QUESTION)]))) == [[QUESTION]]

def test_system_turn_elsewhere(tmp_path):
    assert problems(tmp_path, entry(conversations=[*talk(), SYSTEM]))[0] == (0, "Turn 2 has role 'system', expected 'user'.", ALTERNATE)
    assert problems(tmp_path, entry(conversations=[SYSTEM, SYSTEM, *talk()]))[0] == (0, "Turn 1 has role 'system', expected 'user'.", ALTERNATE)

def test_system_turn_is_empty(tmp_path):
    assert problems(tmp_path, entry(conversations=[SYSTEM | dict(content=' '), *talk()])) == [(0, 'Turn 0 is empty.', 'Write its text, or remove the turn.')]

def test_tag_in_a_system_turn(tmp_path):
    assert problems(tmp_path, entry(conversations=[SYSTEM | dict(content='<image>\nBe brief.'), *talk()])) == [(0, '<image> inside turn 0.', MISPLACED)]

def test_assistant_begins(tmp_path):
    found = problems(tmp_path, entry(conversations=talk()[::-1]))
    assert found == [(0, "Turn 0 has role 'assistant', expected 'user'.", ALTERNATE), (0, "Turn 1 has role 'user', expected 'assistant'.", ALTERNATE)]

@pytest.mark.parametrize('content', [7, True, ['Red.'], [], dict(a=1)])
def test_content_is_no_string(tmp_path, content):
    assert problems(tmp_path, entry(conversations=talk(answer=content))) == [(0, f'Turn 1 has a {type(content).__name__} as content.', 'Write it as a string; pictures go into "image".')]

@pytest.mark.parametrize('more, reason', [(dict(images=['a.png']), 'A key images beside image.'), (dict(system='Be brief.'), 'There is a system text beside conversations.')])
def test_what_would_be_dropped_is_reported(tmp_path, more, reason): assert [r for _, r, _ in problems(tmp_path, entry() | more)] == [reason]

def test_misspelt_policies(tmp_path, tiny):
    file = write_data(tmp_path, [entry()])
    with pytest.raises(ValueError, match="extra_image_tags is 'Literal': choose one of report, literal."): check(file, extra_image_tags='Literal')
    with pytest.raises(ValueError, match="bad_samples is 'raise': choose one of error, skip."): load_data(file, Processor.from_folder(tiny), bad_samples='raise')

@pytest.mark.parametrize('content', ['', ' \n', None])
def test_content_is_empty(tmp_path, content):
    assert problems(tmp_path, entry(conversations=talk(answer=content))) == [(0, 'Turn 1 is empty.', 'Write its text, or remove the turn and its partner.')]

@pytest.mark.parametrize('turns', [talk()[:1], [SYSTEM], [SYSTEM, *talk()[:1]]])
def test_no_answer(tmp_path, turns):
    assert problems(tmp_path, entry(conversations=turns)) == [(0, 'No answer.', 'Add an assistant turn: it is what the model learns.')]

@pytest.mark.parametrize('before', [[], [SYSTEM]])
def test_question_after_the_last_answer(tmp_path, before):
    assert problems(tmp_path, entry(conversations=[*before, *talk(), dict(role='user', content='And now?')])) == [
        (0, 'The last turn is a question without an answer.', 'Add the answer, or remove the turn: it would teach nothing.')]


# --- the tag ---------------------------------------------------------------------------------------------------------

MISPLACED = 'Put it at the beginning of the first user turn, or declare it text with extra_image_tags="literal".'

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
    assert data.encoded(0).input_ids.count(processor.special_ids['<image>']) == 1 == len(data[0]['target_sizes'])
    assert 'Write <image> there.' in processor.tokenizer.decode(data.encoded(0).input_ids)


# --- the file --------------------------------------------------------------------------------------------------------

def test_file_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError) as e: read_entries(tmp_path/'none.json')
    assert str(e.value) == f'There is no data file {tmp_path/"none.json"}.'

@pytest.mark.parametrize('text, place', [('[\n {"id": "0",}\n]', 'line 2, column'), ('{"id": 1}\n\n{"id": 2}\n', 'line 3, column 1'), ("['a']", 'line 1, column 2'), ('', 'line 1, column 1')])
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


def test_report_is_plain_data(tmp_path):
    # A run keeps it as JSON.
    _, report = check(write_data(tmp_path, [entry(), without('id')]))
    assert json.loads(json.dumps(vars(report) | dict(problems=report.rows())))['text_only'] == 0


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

def test_problems_of_a_kind_are_summed_up_together(tmp_path):
    _, report = check(write_data(tmp_path, [entry(str(i), image=f'gone{i}.png') for i in range(250)]))
    assert str(report).splitlines()[-2:] == ['  ... and 230 more: A picture does not exist.', '  230 problems are not shown.']
    assert '50 problems are not shown.' in report._repr_html_()

def test_rejected_samples_are_not_counted(tmp_path, tiny):
    long = {k: v for k, v in entry('b', conversations=talk('red '*400)).items() if k != 'image'}
    samples, report = load_data(write_data(tmp_path, [entry('a'), long]), Processor.from_folder(tiny), max_length=300, bad_samples='skip')
    assert len(samples) == 1 and report.text_only == 0 and report.tokens['longest'] <= 300

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

def test_numbered_tag_beside_one_picture(tmp_path):
    _, report = check(write_data(tmp_path, [entry('0', conversations=talk(question='<image_00>\nWhat?')), entry('1', conversations=talk(question='<image>\n<image_01> q'))]))
    assert [p.reason for p in report.problems] == ['<image_00> inside turn 0.', '<image_01> inside turn 0.']

def test_video(tmp_path):
    _, report = check(write_data(tmp_path, [dict(id='0', video='v.mp4', conversations=talk())]))
    assert report.problems[0].reason == 'There is a video, and videos are not supported.'

def test_json_lines(tmp_path):
    (tmp_path/'d.json').write_text('{"id": "0"}\n{"id": "1"}\n')
    with pytest.raises(ValueError, match='has one JSON object per line'): check(tmp_path/'d.json')

def test_messages(tmp_path):
    _, report = check(write_data(tmp_path, [dict(id='0', image='dot.png', messages=talk())]))
    assert (report.problems[0].reason, report.problems[0].fix) == ('No conversations, but a key messages.', 'Rename messages to conversations.')
