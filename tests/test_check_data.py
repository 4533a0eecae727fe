"""The whole check of label maps finds every kind of planted fault, in its file, and nothing else."""
import contextlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from check_data_cases import found, full, kinds, line, seg_config
from PIL import Image
from tiny import make_data

from replk_mm.data import image_files, pairs
from replk_mm.data.audit import audit
from replk_mm.data.checks import check_data
from replk_mm.data.demo_writer import write_demo_data
from replk_mm.data.problem_kinds import KINDS
from replk_mm.errors import UserError

NOISE = np.random.default_rng(0)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp('planted') / 'data', 44, 4)


@pytest.fixture
def data(scenes, tmp_path) -> Path:
    """A data set to spoil."""
    return Path(shutil.copytree(scenes, tmp_path / 'data'))


def image(root: Path, i: int, split: str = 'train') -> Path:
    return root / 'images' / {'train': 'training', 'val': 'validation'}[split] / f'demo_{split}_{i:06d}.jpg'


def label(root: Path, i: int, split: str = 'train') -> Path:
    return root / 'annotations' / {'train': 'training', 'val': 'validation'}[split] / f'demo_{split}_{i:06d}.png'


def noise(height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 255, (height, width, 3), np.uint8))


def ids(*values: int, size: tuple[int, int] = (64, 64), dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.resize(np.array(values, dtype), size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def break_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = content.index(b'IDAT') + 8
    content[middle:middle + 12] = bytes(12)
    path.write_bytes(content)


def turned(path: Path, orientation: int, height: int = 64, width: int = 64) -> None:
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = orientation
    noise(height, width).save(path, exif=exif)


def bomb(path: Path, side: int = 20_000) -> None:
    """A PNG of a few bytes that says it is 20,000 pixels wide and high."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0))
                     + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


def with_colours(path: Path) -> None:
    picture = ids(1, 2, 3).convert('P')
    picture.putpalette([channel for i in range(256) for channel in (i, 255 - i, 7)])
    picture.save(path)


def plant(root: Path) -> dict[str, list[Path]]:
    """One fault after the other, each in a pair of its own; the files that each kind is to be found in."""
    cut(image(root, 0))
    cut(label(root, 1))
    image(root, 2).write_bytes(b'')
    label(root, 3).write_bytes(b'')
    image(root, 4).write_text('<html>404 not found</html>')
    label(root, 5).write_text('<html>404 not found</html>')
    break_inside(label(root, 6))
    noise().save(image(root, 7), 'png')
    break_inside(image(root, 7))
    ids(1, size=(32, 48)).save(label(root, 8))
    noise().save(label(root, 9), 'png')
    noise().convert('RGBA').save(label(root, 10), 'png')
    with_colours(label(root, 11))
    ids(1, 2, dtype=np.uint16).save(label(root, 12))
    ids(1, 257, dtype=np.uint16).save(label(root, 13))
    Image.fromarray(np.full((64, 64), 1.5, np.float32)).save(label(root, 14), 'tiff')
    ids(1, 9, 200).save(label(root, 15))
    ids(0, 255).save(label(root, 16))
    ids(3).save(label(root, 17), 'jpeg')
    noise().convert('CMYK').save(image(root, 18))
    Image.fromarray(NOISE.integers(0, 60_000, (64, 64), np.uint16)).save(image(root, 19), 'png')
    noise().save(image(root, 20), 'gif', save_all=True, append_images=[noise()])
    turned(image(root, 21), 6, 48, 64)
    ids(1, size=(48, 64)).save(label(root, 21))
    turned(image(root, 22), 3)
    noise().save(image(root, 23), 'png')
    bomb(image(root, 24))
    bomb(label(root, 25))
    noise(16, 16).save(image(root, 26))
    ids(1, size=(16, 16)).save(label(root, 26))
    label(root, 27).unlink()
    image(root, 28).unlink()
    image(root, 29).unlink()
    image(root, 29).symlink_to('gone.jpg')
    label(root, 30).unlink()
    label(root, 30).symlink_to('gone.png')
    shutil.copy(image(root, 31), image(root, 32))
    shutil.copy(image(root, 33), image(root, 1, 'val'))
    odd = os.fsdecode(b'caf\xe9')
    image(root, 34).rename(image(root, 34).with_name(f'{odd}.jpg'))
    label(root, 34).rename(label(root, 34).with_name(f'{odd}.png'))
    image(root, 35).rename(image(root, 35).with_suffix('.JPEG'))
    noise().convert('RGBA').save(image(root, 36), 'png')
    label(root, 37).unlink()
    label(root, 37).mkdir()
    return {
        'cut-off': [image(root, 0), label(root, 1)], 'empty-file': [image(root, 2), label(root, 3)],
        'not-an-image': [image(root, 4), label(root, 5)], 'undecodable': [label(root, 6), image(root, 7)],
        'size-mismatch': [label(root, 8)], 'label-channels': [label(root, 9), label(root, 10)],
        'label-palette': [label(root, 11)], 'label-depth': [label(root, 12), label(root, 13)],
        'label-out-of-range': [label(root, 13), label(root, 15)], 'label-fractions': [label(root, 14)],
        'label-all-ignored': [label(root, 16)], 'label-lossy': [label(root, 17)], 'image-cmyk': [image(root, 18)],
        'image-16-bit': [image(root, 19)], 'image-animated': [image(root, 20)], 'exif-turned': [image(root, 21)],
        'exif-orientation': [image(root, 22)], 'too-large': [image(root, 24), label(root, 25)],
        'format-suffix': [image(root, i) for i in (7, 19, 20, 23, 36)], 'image-tiny': [image(root, 26)],
        'label-missing': [label(root, 27), label(root, 37)], 'label-without-image': [label(root, 28), label(root, 35)],
        'broken-link': [image(root, 29), label(root, 30)], 'duplicate-image': [image(root, 32)],
        'leak': [image(root, 1, 'val')], 'name-not-text': [image(root, 34).with_name(f'{odd}.jpg')],
        'suffix-ignored': [image(root, 35).with_suffix('.JPEG')], 'image-alpha': [image(root, 36)]}


def test_every_planted_fault_is_found_and_nothing_else(data):
    planted = plant(data)
    assert len(planted) >= 25
    result = full(seg_config(data), jobs=2)
    assert found(result) == {(kind, str(path)) for kind, paths in planted.items() for path in paths}
    assert {problem.kind: problem.weight for _, problem in result.found()} == {kind: KINDS[kind].severity for kind in planted}
    for kind in planted:
        if KINDS[kind].severity == 'error':
            pass


def test_one_process_and_several_find_the_same(data):
    plant(data)
    assert list(full(seg_config(data), 1).found()) and found(full(seg_config(data), 1)) == found(full(seg_config(data), 3))


@pytest.mark.parametrize('layout', ['ade20k', 'cityscapes'])
def test_generated_scenes_are_clean(tmp_path, layout):
    for seed in range(2):
        root = tmp_path / str(seed)
        write_demo_data(root, layout, train=4, val=2, seed=seed, size=(64, 64))
        changes, classes = {}, 8
        if layout == 'cityscapes':
            changes = dict(type='CityscapesDataset', reduce_zero_label=False)
            classes = 19
        cfg = seg_config(root, classes, **changes)
        if layout == 'cityscapes':
            for split in ('train', 'val'):
                cfg[f'{split}_dataloader'].dataset.data_prefix = dict(img_path=f'leftImg8bit/{split}',
                                                                      seg_map_path=f'gtFine/{split}')
        result = full(cfg)
        assert not kinds(result, 'error', 'warning') and [one.tally.looked for one in result.sets] == [4, 2]


@pytest.mark.parametrize(('layout', 'kind', 'classes'), [
    ('ade', 'ADE20KDataset', 150), ('cityscapes', 'CityscapesDataset', 19)])
def test_photographs_have_notes_only(reference, layout, kind, classes):
    root = reference / 'data/camvid' / layout
    cfg = seg_config(root, classes, type=kind, reduce_zero_label=kind == 'ADE20KDataset')
    for split in ('train', 'val') if layout == 'cityscapes' else ():
        cfg[f'{split}_dataloader'].dataset.data_prefix = dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}')
    result = full(cfg)
    assert kinds(result) == {'count-differs', 'class-absent'} == kinds(result, 'note')
    assert [one.tally.looked for one in result.sets] == [32, 16]


def test_class_frequencies_and_sizes_are_those_of_a_count(data):
    noise(64, 80).save(image(data, 3))
    ids(1, 8, size=(64, 80)).save(label(data, 3))
    result = full(seg_config(data, metainfo=dict(classes=tuple('abcdefgh'))))
    maps = [np.asarray(Image.open(path)) for path in sorted(label(data, 0).parent.iterdir())]
    assert result.sets[0].classes == {name: sum(int((m == i).sum()) for m in maps) for i, name in enumerate('abcdefgh', 1)}
    assert result.sets[0].tally.sizes == {(64, 64): 43, (80, 64): 1}


def test_classes_that_do_not_occur_are_named_if_all_has_been_seen(data, monkeypatch):
    for path in (*label(data, 0).parent.iterdir(), *label(data, 0, 'val').parent.iterdir()):
        ids(1, 2, 8).save(path)
    cfg = seg_config(data, metainfo=dict(classes=tuple('abcdefgh')))
    assert line(full(cfg), 'class-absent').endswith('5 of 8 classes do not occur: c, d, e, f, g')
    assert kinds(audit(cfg, jobs=1)) == {'class-absent'}
    monkeypatch.setattr('replk_mm.data.files.SAMPLE', 2)
    assert not kinds(audit(cfg, jobs=1))


@pytest.mark.parametrize(('given', 'reduce', 'classes', 'kind'), [
    ((0, 1, 7, 255), True, 8, 'reduce-zero-on'), ((1, 2, 7), True, 8, 'reduce-zero-on'),
    (tuple(range(8)), True, 8, 'reduce-zero-on'), ((0, 1, 8), True, 8, None), ((0, 1, 7), True, 8, None),
    ((0, 1, 6, 255), True, 8, None), ((0, 1, 8), False, 8, 'reduce-zero-off'), ((0, 1, 7, 255), False, 8, None),
    ((0, 1, 9), False, 8, None), ((0, 3, 20), False, 150, 'reduce-zero-off'), ((1, 3, 20), False, 150, None)])
def test_doubts_whether_zero_is_a_class(data, given, reduce, classes, kind):
    for path in (*label(data, 0).parent.iterdir(), *label(data, 0, 'val').parent.iterdir()):
        ids(*given).save(path)
    cfg = seg_config(data, classes, reduce_zero_label=reduce)
    assert kinds(full(cfg)) & {'reduce-zero-on', 'reduce-zero-off'} == ({kind} if kind else set())


@pytest.mark.parametrize('given', [(1, 2, 7), (0, 1, 7, 255), tuple(range(8))])
@pytest.mark.parametrize('highest', [8, 7])
def test_a_class_that_one_of_two_sets_lacks_is_no_reason_to_doubt(data, given, highest):
    """Both of one root: what training has, validation need not have too."""
    for path in label(data, 0).parent.iterdir():
        ids(1, 2, highest).save(path)
    for path in label(data, 0, 'val').parent.iterdir():
        ids(*given).save(path)
    cfg = seg_config(data)
    assert ('reduce-zero-on' in kinds(full(cfg))) == (highest == 7)
    warned = [text for text in check_data(cfg, ('train', 'val'), 8) if 'reduce_zero_label=True with 8 classes, but' in text]
    assert len(warned) == (2 if highest == 7 else 0)


def test_doubt_is_said_when_training_starts(data):
    for path in label(data, 0).parent.iterdir():
        ids(0, 1, 7, 255).save(path)
    lines = check_data(seg_config(data), ('train',), 8)
    assert len(lines) == 2 and lines[1].startswith('warning: ') and 'the highest id is 7, and 255 occurs' in lines[1]


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_as_large_as_training_reads_them(tmp_path, orientation):
    import mmcv
    turned(tmp_path / 'x.jpg', orientation, 48, 64)
    problems, picture = image_files.inspect(str(tmp_path / 'x.jpg'), decode=True)
    assert not problems and picture.size[::-1] == mmcv.imread(tmp_path / 'x.jpg').shape[:2]


def test_what_is_said_to_be_unreadable_is_what_opencv_does_not_read(tmp_path):
    import mmcv
    unreadable, written = [], 0
    for suffix in ('jpg', 'png', 'webp', 'tiff', 'bmp', 'gif', 'jp2', 'ppm'):
        for mode in ('1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'F', 'I;16'):
            picture = ids(1, 200, 7, dtype=np.uint16) if mode == 'I;16' else noise().convert(mode)
            path = tmp_path / f'{mode[0]}.{suffix}'
            try:
                picture.save(path)
            except (OSError, KeyError, ValueError):
                continue  # the format has no such mode
            written += 1
            problems, _ = image_files.inspect(str(path), decode=True)
            try:
                read = mmcv.imfrombytes(path.read_bytes(), backend='cv2')  # as mmseg and mmdet read images
            except Exception:
                read = None
            unreadable += [path.name] if read is None else []
            assert ('undecodable' in {p.kind for p in problems}) == (path.name in unreadable), path
    assert written > 30 and unreadable


def test_file_that_may_not_be_read(data, monkeypatch):
    opened = Path.open

    def refusing(self, *args, **kwargs):
        if self == image(data, 1):
            raise PermissionError(13, 'Permission denied')
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, 'open', refusing)
    result = full(seg_config(data))
    assert found(result) == {('unreadable', str(image(data, 1)))}


@pytest.mark.parametrize('folder', [False, True])
def test_image_without_its_label_is_looked_at_all_the_same(data, folder):
    cut(image(data, 1))
    if folder:
        shutil.rmtree(label(data, 1).parent)
    else:
        label(data, 1).unlink()
    lost = ('folder-missing', str(label(data, 1).parent)) if folder else ('label-missing', str(label(data, 1)))
    result = full(seg_config(data))
    assert found(result) == {('cut-off', str(image(data, 1))), lost} and result.sets[0].tally.looked == 44


@pytest.mark.parametrize('refused', ['.', 'images', 'images/training', 'annotations'])
@pytest.mark.parametrize('how', ['stat', 'scandir', 'listdir'])
def test_folder_that_may_not_be_entered_or_listed(data, monkeypatch, refused, how):
    """The system's calls refuse, as they do to who is not root; some folders are only asked whether they are there."""
    denied, original = data / refused, getattr(os, how)

    def refusing(path='.', *args, **kwargs):
        inside = how == 'stat' and denied in Path(os.fsdecode(path)).parents if not isinstance(path, int) else False
        if inside or how != 'stat' and Path(path) == denied:
            raise PermissionError(13, 'Permission denied', str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, how, refusing)
    result = full(seg_config(data))
    assert kinds(result) <= {'unreadable'}
    with contextlib.suppress(UserError):
        check_data(seg_config(data), ('train', 'val'), 8)
    asked = how == 'stat' or (how, refused) == ('scandir', 'images/training')
    assert kinds(result) == ({'unreadable'} if asked else set())
    if how == 'stat' and refused == '.':
        pass


def test_folder_that_may_not_be_listed_is_told_from_one_that_is_missing(data, monkeypatch):
    shutil.rmtree(label(data, 0).parent)
    iterdir = Path.iterdir

    def refusing(self):
        if self == data:
            raise PermissionError(13, 'Permission denied', str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, 'iterdir', refusing)
    assert kinds(full(seg_config(data))) == {'folder-missing'}


def test_folder_that_is_a_link_to_itself(data):
    shutil.rmtree(image(data, 0).parent)
    image(data, 0).parent.symlink_to('training')
    assert kinds(full(seg_config(data))) == {'folder-missing'}


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    (tmp_path / 'folder.jpg').mkdir()
    for name, kind in (('pipe.jpg', 'not-a-file'), ('folder.jpg', 'not-a-file'), ('gone.jpg', 'image-missing')):
        assert [p.kind for p in image_files.inspect(str(tmp_path / name), True)[0]] == [kind]


def test_bomb_is_not_unpacked(tmp_path):
    bomb(tmp_path / 'x.png')
    (problem,), _ = image_files.inspect(str(tmp_path / 'x.png'), True)
    assert (problem.found, problem.allowed) == ('400,000,000 pixels', 'at most 178,956,970 pixels')


def test_palette_that_the_pipeline_reads_as_colours(data):
    with_colours(label(data, 0))
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', imdecode_backend='cv2')]
    assert found(full(seg_config(data, pipeline=steps))) == {('label-channels', str(label(data, 0)))}


def test_a_library_that_fails_on_a_file_does_not_stop_the_others(data, monkeypatch):
    inspect = pairs.inspect

    def failing(task, rules):
        if task.image == str(image(data, 2)):
            raise RuntimeError('a mistake of the library')
        return inspect(task, rules)

    monkeypatch.setattr(pairs, 'inspect', failing)
    result = full(seg_config(data))
    assert found(result) == {('undecodable', str(image(data, 2)))} and result.sets[0].tally.looked == 44


def test_file_that_kills_the_process_is_named(data, monkeypatch):
    inspect = pairs.inspect
    monkeypatch.setattr(pairs, 'inspect', lambda task, rules: os.abort() if task.image == str(image(data, 2)) else inspect(
        task, rules))
    result = full(seg_config(data), jobs=2)
    assert found(result) == {('decoder-crash', str(image(data, 2)))}
    assert [one.tally.looked for one in result.sets] == [44, 4]


# -- Cityscapes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('hidden', [False, True])
def test_raw_label_ids_of_cityscapes(tmp_path, hidden):
    """Under their own name, or under that of the trainIds."""
    cfg = seg_config(tmp_path, 19, type='CityscapesDataset', reduce_zero_label=False)
    cfg.pop('val_dataloader')
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    for i in range(3):
        (tmp_path / 'leftImg8bit/train/a').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'gtFine/train/a').mkdir(parents=True, exist_ok=True)
        noise().save(tmp_path / f'leftImg8bit/train/a/{i}_leftImg8bit.png')
        ids(7, 26, 33).save(tmp_path / f'gtFine/train/a/{i}_gtFine_label{"TrainIds" if hidden else "Ids"}.png')
    result = full(cfg)
    assert kinds(result, 'error') == {'cityscapes-raw-labels'}
    assert {path for kind, path in found(result) if kind == 'cityscapes-raw-labels'} == set(
        map(str, (tmp_path / 'gtFine/train/a').iterdir()))
    assert 'tools/convert_cityscapes.py' in next(p.advice for _, p in result.found() if p.kind == 'cityscapes-raw-labels')
    if hidden:
        pass
