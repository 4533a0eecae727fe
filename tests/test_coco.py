"""Annotation files: what is none is named with the place, commands that mend one do, and each is read once."""
import json

import pytest
from coco_cases import check, file, paste, refused  # noqa: F401 (a fixture)
from coco_files import change

from replk_mm.data import coco

# ruff: noqa: F811 (fixtures that come from another file)


# -- the file ---------------------------------------------------------------------------------------------------------
def test_cut_off_file_is_named_with_the_place(file):
    text = file.read_text()
    file.write_text(text[:700])
    message = refused(file, 'cut off', 'line 1, column')
    with pytest.raises(json.JSONDecodeError) as info:
        json.loads(text[:700])
    assert f'character {info.value.pos:,} of 700' in message


@pytest.mark.parametrize(('content', 'said'), [
    (b'', 'the file is empty'), (b'{"images": [],, }', "line 1, column 15"), (b'\x89PNG\r\n\xff\xfe', 'not a text file'),
    (b'version https://git-lfs.github.com/spec/v1', 'version https'), (b'[]', 'holds a list'), (b'3', 'holds a int')])
def test_what_is_no_annotation_file(file, content, said):
    file.write_bytes(content)
    refused(file, said)


@pytest.mark.parametrize('section', ['images', 'categories'])
def test_section_missing_or_no_list(file, section):
    change(file, lambda d: d.pop(section))
    refused(file, f'{section!r} is missing')
    change(file, lambda d: d.update({section: {}}))
    refused(file, f'{section!r} is a dict')


@pytest.mark.parametrize(('section', 'key'), [(s, k) for s, keys in coco.KEYS.items() for k in keys])
def test_missing_keys_are_counted_and_named(file, section, key):
    change(file, lambda d: [entry.pop(key) for entry in d[section][1:3]])
    count = len(json.loads(file.read_text())[section])
    message = refused(file, f'2 of {count} {section} have no {key!r}')
    assert (f'{section}[1], {section}[2]' if key == 'id' else 'id ') in message


def test_entries_that_are_no_objects(file):
    change(file, lambda d: d['annotations'].insert(1, 'x'))
    refused(file, '1 of 13 annotations are no objects: annotations[1]')


@pytest.mark.parametrize(('section', 'key', 'value'), [
    ('images', 'width', '80'), ('images', 'file_name', 3), ('categories', 'id', '5'), ('annotations', 'category_id', 'car'),
    ('annotations', 'image_id', None), ('annotations', 'id', [1])])
def test_wrong_types_are_named(file, section, key, value):
    change(file, lambda d: d[section][0].update({key: value}))
    refused(file, f'{section} have a {key!r}', repr(value))


@pytest.mark.parametrize('key', ['area', 'iscrowd'])
def test_command_that_adds_a_missing_key_does(file, key):
    change(file, lambda d: [a.pop(key) for a in d['annotations']])
    message = refused(file, f"12 of 12 annotations have no '{key}'")
    paste(message)
    assert check(file)
    if key == 'area':
        assert {a['area'] for a in json.loads(file.read_text())['annotations']} == {16 * 12}


@pytest.mark.parametrize(('folder', 'name'), [("o'neil's data", 'x.json'), ('a "b" $HOME `c`', 'x.json'), ('a b', 'y!z.json')])
def test_command_that_mends_a_file_pastes_whatever_its_name(file, folder, name):
    place = file.parent / folder
    place.mkdir()
    (file.parent / 'images').rename(place / 'images')
    file = file.rename(place / name)
    change(file, lambda d: [a.pop('iscrowd') for a in d['annotations']])
    paste(refused(file, "no 'iscrowd'"))
    assert check(file)


@pytest.mark.parametrize('name', ["driver's cab", 'the "cab"', 'a\\b', '$5', 'plain'])
def test_command_that_renames_a_category_pastes_whatever_its_name(file, name):
    names = {'car': name}
    paste(coco.mend(file, f"[c.update(name={names!r}.get(c['name'], c['name'])) for c in d['categories']]", 'Rename'))
    assert [c['name'] for c in json.loads(file.read_text())['categories']] == ['person', name, 'dog']


# -- read once --------------------------------------------------------------------------------------------------------
def test_a_file_is_read_once_and_given_once(file, monkeypatch):
    calls = []
    original = coco._parse
    monkeypatch.setattr(coco, '_parse', lambda path: calls.append(path) or original(path))
    coco.forget()
    first = coco.read(file)
    assert coco.read(file) is first and len(calls) == 1
    assert coco.take(str(file)) is first and coco.take(file) is None
    coco.read(file)
    change(file, lambda d: d['images'].pop())
    assert coco.take(file) is None, 'an outdated content was given'
