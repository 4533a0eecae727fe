"""EXIF orientation: the annotation decides whether the image or its tag is right, and the advice leads there."""

from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from replk_mm.data.checks.dataset import LabelFormat, Sample
from replk_mm.data.checks.images import ORIENTATION, inspect_sample, read_size
from replk_mm.data.findings import CODES, Finding
from replk_mm.data.transforms import CheckedLoad
from replk_mm.errors import UserError

#: Height and width as stored, and the rows and columns of a red object.
SIZE, BOX = (48, 64), (slice(6, 20), slice(5, 45))


def write_photograph(path: Path, orientation: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Write a red object; return its mask ``(H, W)`` over the pixels as stored."""
    pixels, mask = np.full((*size, 3), 40, np.uint8), np.zeros(size, np.uint8)
    pixels[BOX], mask[BOX] = (250, 40, 40), 1
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return mask


def remove_tag(path: Path) -> None:
    """What ``exiftool -Orientation=`` does: pixels stay as they are."""
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=Image.Exif(), **(dict(quality='keep') if path.suffix == '.jpg' else {}))


def inspect(path: Path, mask: np.ndarray, kind: str) -> list[Finding]:
    """The findings for an annotation that fits a mask: a label map, or the width and height of an annotation file."""
    sample = Sample(str(path), stated_size=(float(mask.shape[1]), float(mask.shape[0])))
    if kind == 'label map':
        label = path.with_name('label.png')
        Image.fromarray(mask).save(label)
        sample = Sample(str(path), str(label))
    return inspect_sample(sample, LabelFormat(2)).findings


KINDS = pytest.mark.parametrize('kind', ['label map', 'annotation file'])


@KINDS
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_annotations_of_stored_pixels_need_the_tag_removed(tmp_path, kind, suffix, orientation):
    path = tmp_path / f'x.{suffix}'
    mask = write_photograph(path, orientation)
    (finding,) = inspect(path, mask, kind)
    assert (finding.code, finding.severity, finding.path) == ('exif-turned', 'error', str(path))
    assert '64x48' in finding.message and 'exiftool -Orientation=' in finding.fix
    remove_tag(path)
    assert not inspect(path, mask, kind)
    red = mmcv.imread(path)[..., 2]
    assert red[mask == 1].mean() > 230 and red[mask == 0].mean() < 60  # what training reads


@KINDS
@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', [SIZE, (48, 48)])
def test_annotations_of_the_rotated_image_fit(tmp_path, kind, orientation, size):
    path = tmp_path / 'x.jpg'
    write_photograph(path, orientation, size)
    mask = (mmcv.imread(path)[..., 2] > 150).astype(np.uint8)
    hidden = orientation in (2, 3, 4) or orientation > 4 and size[0] == size[1]
    assert [finding.code for finding in inspect(path, mask, kind)] == ['exif-orientation'] * hidden
    assert CODES['exif-orientation'][0] == 'warning'


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tiff'])
def test_orientation_in_xmp_is_not_applied(tmp_path, suffix):
    """Pillow reads it where EXIF has none; OpenCV does not."""
    rdf, tiff = 'http://www.w3.org/1999/02/22-rdf-syntax-ns#', 'http://ns.adobe.com/tiff/1.0/'
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}"><rdf:Description xmlns:tiff="{tiff}" '
    xmp += 'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    path = tmp_path / f'x.{suffix}'
    info = PngInfo()
    info.add_itxt('XML:com.adobe.xmp', xmp)
    image = Image.fromarray(np.zeros((*SIZE, 3), np.uint8))
    image.save(path, **(dict(pnginfo=info) if suffix == 'png' else dict(xmp=xmp.encode())))
    with Image.open(path) as opened:
        assert suffix == 'tiff' or opened.getexif()[ORIENTATION] == 6
    assert read_size(str(path)).size[::-1] == mmcv.imread(path).shape[:2] == SIZE


@pytest.mark.parametrize('kind', ['label map', 'annotation file'])
@pytest.mark.parametrize(
    ('orientation', 'size', 'fragment'), [(6, SIZE, 'exiftool'), (1, (40, 64), ''), (1, SIZE, None)]
)
def test_training_rejects_every_image_that_does_not_fit(tmp_path, kind, orientation, size, fragment):
    """The checks before a run inspect a sample of the images only."""

    def load_labels(results: dict) -> dict:
        return {**results, 'gt_seg_map': np.zeros(size, np.uint8)}

    path, label = tmp_path / 'x.jpg', tmp_path / 'label.png'
    write_photograph(path, orientation)
    Image.fromarray(np.zeros(size, np.uint8)).save(label)
    found = dict(img_path=str(path), seg_map_path=str(label))
    load_image, load_label = CheckedLoad(LoadImageFromFile()), CheckedLoad(load_labels, 2)
    if kind == 'annotation file':
        found |= dict(instances=[], height=size[0], width=size[1])
    if fragment is None:
        assert 'gt_seg_map' in load_label(load_image(found))
        return
    with pytest.raises(UserError) as info:
        load_label(load_image(found))
    at = path if fragment or kind == 'annotation file' else label
    assert str(info.value).startswith(f'{at}: ') and fragment in str(info.value)
