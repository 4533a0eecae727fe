"""Every kind of bad data is found before training, or named when it is read."""
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from tiny import make_data
from torch.utils.data import DataLoader

from replk_mm.data import checks
from replk_mm.data.checks import check_data, check_dataset, survey
from replk_mm.data.datasets import as_list, datasets_of
from replk_mm.data.files import damage, sample
from replk_mm.data.transforms import ShrinkLabels
from replk_mm.errors import UserError, message_of
from replk_mm.registry import TRANSFORMS

NAMES = [f'demo_train_{i:06d}' for i in range(4)]
PREFIX = dict(img_path='images/training', seg_map_path='annotations/training')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('checks') / 'data', 4, 1)


@pytest.fixture
def data(scenes, tmp_path) -> Path:
    """A data set to spoil."""
    return Path(shutil.copytree(scenes, tmp_path / 'data'))


def leaf(root, **changes) -> dict:
    return dict(type='BaseSegDataset', reduce_zero_label=True, data_root=str(root), data_prefix=dict(PREFIX),
                pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]) | changes


def check(root, classes: int | None = 8, **changes) -> str:
    return check_dataset(leaf(root, **changes), 'mmseg', classes)


def refused(root, *named, classes: int | None = 8, **changes) -> str:
    """The message of the refusal; its first line holds all of ``named``."""
    with pytest.raises(UserError) as info:
        check(root, classes, **changes)
    first = str(info.value).splitlines()[0]
    for text in named:
        assert str(text) in first
    assert len(str(info.value).splitlines()) > 1, 'no remedy'
    return str(info.value)


def image(root, i: int = 1) -> Path:
    return root / PREFIX['img_path'] / f'{NAMES[i]}.jpg'


def label(root, i: int = 1) -> Path:
    return root / PREFIX['seg_map_path'] / f'{NAMES[i]}.png'


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def write_label(path: Path, ids, size=(64, 64), dtype=np.uint8) -> None:
    pixels = np.ones(size, dtype)
    pixels.flat[:len(ids)] = ids
    Image.fromarray(pixels).save(path)


# -- folders ----------------------------------------------------------------------------------------------------------
def test_good_data_passes_and_says_how_much_was_looked_at(data):
    line = check(data)
    assert '4 images' in line
    assert str(data) in line


def test_missing_root(tmp_path):
    assert '--data-root' in refused(tmp_path / 'gone', tmp_path / 'gone', 'no such folder')


def test_root_one_level_too_high(data, tmp_path):
    message = refused(tmp_path, tmp_path / PREFIX['img_path'], 'data')
    assert f'Did you mean --data-root {data}?' in message


def test_advice_on_the_root_can_be_pasted(data, tmp_path):
    data.rename(tmp_path / 'my data')
    assert f"Did you mean --data-root '{tmp_path}/my data'?" in refused(tmp_path)


def test_root_one_level_too_low(data):
    assert f'Did you mean --data-root {data}?' in refused(data / 'images', data / 'images', 'training')


def test_empty_root(tmp_path):
    assert 'images/training' in refused(tmp_path, tmp_path, 'nothing')


def test_folder_without_images(data):
    for path in (data / PREFIX['img_path']).iterdir():
        path.rename(path.with_suffix('.webp'))
    refused(data, data / PREFIX['img_path'], '.jpg', f'{NAMES[0]}.webp')


def test_images_without_labels_are_counted_and_named(data):
    label(data, 1).unlink()
    label(data, 3).unlink()
    message = refused(data, data / PREFIX['seg_map_path'], '2 of 4', NAMES[1], NAMES[3])
    assert NAMES[0] not in message


def test_label_folder_missing(data):
    shutil.rmtree(data / PREFIX['seg_map_path'])
    refused(data, data / PREFIX['seg_map_path'], 'no such folder', '4 images')


def test_labels_without_images_do_no_harm(data):
    image(data).unlink()
    assert '3 images' in check(data)


def test_missing_annotation_file(data):
    refused(data, data / 'train.txt', 'no such annotation file', ann_file='train.txt')


def test_annotation_file_says_which_images_count(data):
    label(data, 3).unlink()  # not listed
    (data / 'train.txt').write_text(f'{NAMES[0]}\n{NAMES[1]}\n')
    assert '2 images' in check(data, ann_file='train.txt')
    (data / 'train.txt').write_text(f'{NAMES[0]}\nghost\n')
    refused(data, data / 'train.txt', '1 of 2', 'ghost', ann_file='train.txt')


def test_unknown_type_of_data_set(data):
    refused(data, 'ADE20KDatset', data, type='ADE20KDatset')


def test_type_names_the_suffixes(data):
    refused(data, '_leafImg8bit.png'.replace('leaf', 'left'), type='CityscapesDataset')


def test_detection_data_need_their_annotation_file_and_images(data):
    boxes = dict(type='CocoDataset', data_prefix=dict(img='images/training'), ann_file='boxes.json', _scope_='mmdet')
    refused(data, 'boxes.json', **boxes)


# -- contents ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('spoil', [image, label])
def test_cut_off_file(data, spoil):
    cut(spoil(data))
    refused(data, spoil(data), 'cut off')


@pytest.mark.parametrize('spoil', [image, label])
def test_empty_file(data, spoil):
    spoil(data).write_bytes(b'')
    refused(data, spoil(data), 'empty')


@pytest.mark.parametrize('spoil', [image, label])
def test_file_of_text(data, spoil):
    spoil(data).write_text('<html>404</html>')
    refused(data, spoil(data), 'cannot be decoded')


def test_png_broken_inside(data):
    content = bytearray(label(data).read_bytes())
    middle = content.index(b'IDAT') + 8
    content[middle:middle + 12] = b'\0' * 12
    label(data).write_bytes(content)
    refused(data, label(data), 'cannot be decoded')


def test_many_bad_files_are_counted(data):
    for i in range(4):
        cut(image(data, i))
        label(data, i).write_bytes(b'')
    message = refused(data, image(data, 0))
    assert '... and 3 more' in message


def test_sizes_differ(data):
    write_label(label(data), [], size=(32, 48))
    refused(data, label(data), '48x32', '64x64')


def test_label_file_with_colours(data):
    Image.new('RGB', (64, 64), (9, 9, 9)).save(label(data))
    refused(data, label(data), '3 channels')


def test_label_file_with_a_palette_is_good(data):
    picture = Image.fromarray(np.ones((64, 64), np.uint8), 'L')
    picture = picture.convert('P')
    picture.putpalette([200] * 768)
    picture.save(label(data))
    assert check(data)


@pytest.mark.parametrize(('reduce', 'good', 'bad', 'said'), [
    (True, [0, 1, 8, 255], [9, 150], '1..8'), (False, [0, 1, 7, 255], [8, 200], '0..7')])
def test_label_ids_beyond_the_classes(data, reduce, good, bad, said):
    for i in range(4):
        write_label(label(data, i), good)
    assert check(data, reduce_zero_label=reduce)
    write_label(label(data, 2), good + bad)
    message = refused(data, label(data, 2), ', '.join(map(str, bad)), said, '8 classes', reduce_zero_label=reduce)
    assert f'reduce_zero_label={reduce}' in message
    assert f'ids {bad[0]}' in message, 'a good id was named'
    assert check(data, None, reduce_zero_label=reduce)


def test_sixteen_bit_label_ids_do_not_wrap_around(data):
    write_label(label(data), [257], dtype=np.uint16)
    refused(data, label(data), '257')


def test_type_says_whether_zero_is_a_class(data):
    """ADE20K's own type ignores 0 and has ids up to 150, said nowhere in the config."""
    dataset = leaf(data, type='ADE20KDataset')
    del dataset['reduce_zero_label']
    write_label(label(data), [0, 150])
    assert check_dataset(dataset, 'mmseg', 150)
    write_label(label(data), [151])
    with pytest.raises(UserError, match='151'):
        check_dataset(dataset, 'mmseg', 150)


@pytest.mark.slow
def test_type_is_found_before_its_package_is_imported(data):
    """In a process that has imported nothing yet; the registry alone would not find the type there."""
    code = (f'from replk_mm.data.checks import check_dataset\n'
            f'check_dataset({leaf(data, type="ADE20KDataset")!r}, "mmseg", 150)\nprint("fine")')
    found = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == 'fine', found.stderr


def test_pipeline_and_data_set_disagree_on_zero(data):
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True)]
    refused(data, 'reduce_zero_label=True', 'LoadAnnotations', 'BaseSegDataset', pipeline=steps, reduce_zero_label=False)


def test_some_classes_of_a_type_may_be_picked(data):
    """The files still hold the ids of all classes; mmseg maps them."""
    picked = dict(type='ADE20KDataset', metainfo=dict(classes=('wall', 'sky')))
    assert check(data, 2, **picked)
    refused(data, 'martian', 'ADE20KDataset', classes=2, type='ADE20KDataset', metainfo=dict(classes=('wall', 'martian')))


def test_classes_may_be_picked_in_a_file(data, tmp_path):
    file = tmp_path / 'names.txt'

    def picked(*names: str) -> dict:
        file.write_text('\n'.join(names))
        return dict(type='ADE20KDataset', metainfo=dict(classes=str(file)))

    write_label(label(data), [0, 150])
    assert check(data, 2, **picked('wall', 'sky'))
    refused(data, 'martian', 'ADE20KDataset', classes=2, **picked('wall', 'martian'))
    everything = DATASETS.get('mmseg.ADE20KDataset').METAINFO['classes']
    assert 'bed ' in everything, 'its space is gone, and so is the reason to compare without'
    assert check(data, 150, **picked(*everything)) and check(data, 4, **picked(*everything[5:9]))


def test_segmentation_data_that_serve_two_splits_are_checked_once(data, monkeypatch):
    calls = []
    monkeypatch.setattr(checks, 'survey', lambda dataset, *rest, **more: calls.append(dataset) or survey(
        dataset, *rest, **more))
    loader = dict(dataset=leaf(data))
    cfg = Config(dict(default_scope='mmseg', val_dataloader=loader, test_dataloader=loader, val_evaluator=dict(
        type='IoUMetric')))
    assert len(check_data(cfg, ('val', 'test'), 8)) == len(calls) == 1


def test_splits_are_checked_once_each(data):
    train, val = leaf(data), leaf(data, data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'))
    cfg = Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=train), val_dataloader=dict(dataset=val),
                      test_dataloader=dict(dataset=val)))
    assert len(check_data(cfg, ('train', 'val', 'test'), 8)) == 2
    cut(label(data))
    assert len(check_data(cfg, ('val',), 8)) == 1
    with pytest.raises(UserError):
        check_data(cfg, ('train',), 8)


def test_leaves_of_wrapped_sets():
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='Repeat', dataset=dict(
        type='Concat', datasets=[dict(type='A'), dict(type='B')]))), val_dataloader=None))
    assert [d.type for d in datasets_of(cfg)] == ['A', 'B']
    assert as_list(None) == []
    assert as_list((1, 2)) == [1, 2]


def test_photographs_are_whole(reference):
    for path in sorted((reference / 'data').rglob('*.jpg')) + sorted((reference / 'data').rglob('*.png')):
        assert damage(path) is None, path


@pytest.mark.parametrize(('layout', 'kind', 'prefix', 'classes'), [
    ('ade', 'ADE20KDataset', PREFIX, 150),
    ('cityscapes', 'CityscapesDataset', dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'), 19)])
def test_photographs_pass(reference, layout, kind, prefix, classes):
    dataset = dict(type=kind, data_root=str(reference / 'data/camvid' / layout), data_prefix=dict(prefix), pipeline=[])
    assert '32 images with labels, 32 of them' in check_dataset(dataset, 'mmseg', classes)
    with pytest.raises(UserError, match='beyond the 3 classes'):
        check_dataset(dataset, 'mmseg', 3)


# -- while loading ----------------------------------------------------------------------------------------------------
def load(path, ids_of: int | None = 8, reduce: bool = True) -> dict:
    """What the checked pipeline makes of an image and the label file beside it."""
    results = dict(img_path=str(path[0]), seg_map_path=str(path[1]), seg_fields=[], label_map=None, reduce_zero_label=reduce)
    init_default_scope('mmseg')
    for kind in ('LoadImageFromFile', 'LoadAnnotations'):
        step = TRANSFORMS.build(dict(type='replk_mm.CheckedLoad', load=dict(type=kind), num_classes=ids_of))
        results = step(results)
    return results


@pytest.fixture
def pair(data) -> tuple[Path, Path]:
    return image(data), label(data)


def test_good_files_load(pair):
    out = load(pair)
    assert out['img'].shape == (64, 64, 3)
    pixels = np.asarray(Image.open(pair[1])).astype(int)
    assert np.array_equal(out['gt_seg_map'], np.where(pixels == 0, 255, pixels - 1))


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('spoil', [cut, lambda p: p.write_bytes(b''), lambda p: p.write_text('text'), Path.unlink])
def test_damage_is_named_when_it_is_read(pair, which, spoil):
    spoil(pair[which])
    with pytest.raises(UserError) as info:
        load(pair)
    assert str(info.value).splitlines()[0].startswith(str(pair[which]))


def test_colours_in_a_label_file_are_named_when_it_is_read(pair):
    Image.new('RGB', (64, 64)).save(pair[1])
    with pytest.raises(UserError, match='3 channels') as info:
        load(pair, None)
    assert str(info.value).startswith(str(pair[1]))


@pytest.mark.parametrize(('reduce', 'bad'), [(True, 9), (False, 8)])
def test_wrong_ids_are_named_as_they_stand_in_the_file(pair, reduce, bad):
    write_label(pair[1], [0, 7, 255])
    load(pair, reduce=reduce)
    write_label(pair[1], [0, 7, bad])
    with pytest.raises(UserError, match=f'label ids {bad} are beyond the 8 classes') as info:
        load(pair, reduce=reduce)
    assert str(info.value).startswith(str(pair[1]))


@pytest.mark.parametrize('workers', [0, 1])
def test_damage_beyond_the_sample_is_named_from_a_data_worker_too(data, monkeypatch, workers):
    monkeypatch.setattr('replk_mm.data.files.SAMPLE', 2)  # the first and the last
    cut(label(data, 2))
    assert '2 of them looked into' in check(data)
    init_default_scope('mmseg')
    steps = [dict(type='replk_mm.CheckedLoad', load=step, num_classes=8) for step in leaf(data)['pipeline']]
    loader = DataLoader(DATASETS.build(leaf(data, pipeline=steps)), batch_size=1, num_workers=workers,
                        collate_fn=lambda batch: batch)
    with pytest.raises(UserError) as info:
        list(loader)
    message = message_of(info.value).splitlines()
    assert message[0].startswith(f'{label(data, 2)}: the file is cut off')
    assert len(message) == 2
    assert 'Traceback' not in '\n'.join(message)


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('count', [0, 1, 2, 63, 64, 65, 100, 1000])
def test_a_sample_is_spread_over_all_files(count):
    found = sample(range(count))
    assert len(found) == min(64, count)
    if count:
        assert (found[0], found[-1]) == (0, count - 1)
    steps = np.diff(found)
    assert count < 2 or steps.min() >= 1 and steps.max() - steps.min() <= 1


@pytest.mark.parametrize(('suffix', 'options'), [('jpg', {}), ('jpg', {'progressive': True}), ('png', {}),
                                                 ('png', {'bits': 4})])
def test_whole_files_are_whole_and_any_cut_is_seen(tmp_path, suffix, options):
    path = tmp_path / f'x.{suffix}'
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    Image.fromarray(noise).save(path, **options)
    content = path.read_bytes()
    assert damage(path) is None
    for length in (len(content) - 2 if suffix == 'jpg' else len(content) - 12, len(content) // 2, 20):
        path.write_bytes(content[:length])
        assert 'cut off' in damage(path)
    path.write_bytes(content + b'\0' * 100)  # cameras append something
    assert damage(path) is None


@pytest.mark.parametrize('options', [{}, {'progressive': True}])
@pytest.mark.parametrize('behind', [b'\0' * 5000, bytes(range(200)) * 100], ids=['zeros', 'film'])
def test_photograph_with_a_film_behind_it_is_whole(tmp_path, options, behind):
    """As phones write them; cut off within the photograph it is not, whatever follows."""
    path = tmp_path / 'x.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)).save(path, **options)
    content = path.read_bytes()
    path.write_bytes(content + behind)
    assert damage(path) is None
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(io.BytesIO(content))))
    path.write_bytes(content[:len(content) // 2] + behind)  # unfinished downloads may have zeros where the rest will be
    assert 'cut off' in damage(path)


@pytest.mark.parametrize('options', [{}, {'progressive': True}])
def test_end_of_a_preview_is_not_the_end_of_the_photograph(tmp_path, options):
    path, preview = tmp_path / 'x.jpg', io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8))
    noise.resize((16, 16)).save(preview, 'jpeg')
    noise.save(path, comment=preview.getvalue(), **options)
    content = path.read_bytes()
    path.write_bytes(content[:-5000])
    assert content[:-9096].count(b'\xff\xd9') == 1, 'the preview stands further back than is looked at first'
    assert 'cut off' in damage(path)


def test_other_formats_are_left_to_their_decoder(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'x.bmp')
    assert damage(tmp_path / 'x.bmp') is None


def test_shrunk_labels_are_those_at_the_centres_of_the_blocks():
    labels = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    out = ShrinkLabels(4).transform({'gt_seg_map': labels, 'img': np.zeros((8, 12, 3), np.uint8)})
    assert out['gt_seg_map'].tolist() == [[2 * 12 + 2, 2 * 12 + 6, 2 * 12 + 10], [6 * 12 + 2, 6 * 12 + 6, 6 * 12 + 10]]
    assert out['img'].shape == (8, 12, 3)


def test_shrinking_names_a_map_that_does_not_divide():
    with pytest.raises(UserError, match=r'^a\.png: ShrinkLabels\(factor=4\) met a map of 9x8'):
        ShrinkLabels(4).transform({'gt_seg_map': np.zeros((9, 8), np.uint8), 'seg_map_path': 'a.png'})
