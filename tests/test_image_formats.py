"""Images of several pictures and label maps of many bits, against what training's own readers make of them."""
from pathlib import Path

import mmcv
import numpy as np
import pytest
from PIL import Image

from replk_mm.data import image_files
from replk_mm.data.pairs import Rules, Task, inspect

NOISE = np.random.default_rng(0)


def noise(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 255, (height, width, 3), np.uint8))


def write(path: Path, kind: str, **options) -> Path:
    noise().save(path, kind, save_all=True, append_images=[noise()], **options)
    return path


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('decode', [True, False])
def test_photographs_of_phones_are_jpegs(tmp_path, decode, orientation):
    """MPO: a JPEG with a preview or a second view behind it."""
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = orientation
    path = write(tmp_path / 'x.jpg', 'mpo', exif=exif)
    with Image.open(path) as opened:
        assert opened.format == 'MPO' and opened.n_frames == 2
    problems, picture = image_files.inspect(str(path), decode)
    assert not problems and picture.size[::-1] == mmcv.imread(path).shape[:2]


def test_broken_photograph_of_a_phone_is_found(tmp_path):
    path = write(tmp_path / 'x.jpg', 'mpo')
    path.write_bytes(path.read_bytes()[:1500])
    assert [p.kind for p in image_files.inspect(str(path), True)[0]] == ['cut-off']


@pytest.mark.parametrize('kind', ['gif', 'png', 'tiff', 'webp'])
def test_several_pictures_in_one_file_are_said_to_be(tmp_path, kind):
    path = write(tmp_path / f'x.{kind}', kind)
    problems = {p.kind: p for p in image_files.inspect(str(path), True)[0]}
    assert problems['image-animated'].text == '2 pictures; allowed: one'


@pytest.mark.parametrize(('ids', 'dtype'), [
    ((1, 2), np.uint16), ((0, 255), np.uint16), ((1, 256), np.uint16), ((1, 300), np.uint16), ((0, 255), np.int32),
    ((3, -1), np.int32)])
def test_ids_of_many_bits_are_said_to_be_read_as_they_are_if_they_are(tmp_path, ids, dtype):
    from mmseg.datasets.transforms import LoadAnnotations
    pixels = np.resize(np.array(ids, dtype), (64, 64))
    path = tmp_path / 'x.tiff'
    Image.fromarray(pixels).save(path)
    read = LoadAnnotations()(dict(seg_map_path=str(path), reduce_zero_label=False, seg_fields=[]))['gt_seg_map']
    noise(64, 64).save(tmp_path / 'x.png')
    (problem,) = (p for p in inspect(Task(str(tmp_path / 'x.png'), str(path)), Rules()).problems if p.kind == 'label-depth')
    assert ('and are read so' in problem.advice) == np.array_equal(read, pixels)
    assert 'Write these label maps as PNG' in problem.advice
