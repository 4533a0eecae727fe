"""One image and its label map, looked at: the checks that start a training and those of the whole data set are these."""
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from replk_mm.data import cityscapes, image_files
from replk_mm.data.files import IGNORED
from replk_mm.data.problem_kinds import KINDS
from replk_mm.data.problems import Problem

#: Ids that fit a byte, as label maps are read.
_BYTE = 256
_SHOWN = 6


@dataclass(frozen=True)
class Rules:
    """What holds for every image of a data set.

    Attributes:
        num_classes: Classes that label maps may hold; None checks no ids.
        reduce_zero: Whether 0 is ignored and 1 the first class.
        decode: Decode images too, not only their label maps.
        hashes: Hash the images, to find some twice.
        pillow_labels: Whether the pipeline reads label maps with Pillow, which takes the indices of a palette.
    """

    num_classes: int | None = None
    reduce_zero: bool = False
    decode: bool = False
    hashes: bool = False
    pillow_labels: bool = True


@dataclass(frozen=True)
class Task:
    """An image to look at, with its label map or what an annotation file states as its width and height."""

    image: str
    label: str | None = None
    stated: tuple[float, float] | None = None


@dataclass
class Seen:
    """What was found in an image and its label map.

    Attributes:
        problems: What is wrong.
        size: Width and height of the image, pixels; None if it cannot be read.
        pixels: Pixels of every id of the label map.
        digest: Hash of the image, if it was asked for and can be read.
    """

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    pixels: Mapping[int, int] = field(default_factory=dict)
    digest: bytes = b''


def inspect(task: Task, rules: Rules) -> Seen:
    """Look at an image, and at its label map if it has one."""
    seen = Seen()
    seen.problems, picture = image_files.inspect(task.image, rules.decode)
    if picture:
        seen.size = picture.size
        seen.problems += _against_stated(task, picture)
        if rules.hashes:
            try:
                seen.digest = image_files.digest(task.image)
            except OSError as error:
                seen.problems.append(Problem('unreadable', task.image, f'cannot be read: {error.strerror or error}'))
    if task.label is not None:
        problems, pixels = _read_label(task.label, rules)
        seen.problems += problems
        if pixels is not None:
            size = pixels.shape[1], pixels.shape[0]
            seen.problems += _against_image(task, size, picture) if picture else []
            problems, seen.pixels = _ids(task.label, pixels, rules)
            seen.problems += problems
    return seen


def _against_stated(task: Task, picture: image_files.Picture) -> list[Problem]:
    if task.stated is None or picture.size == task.stated:
        return []
    width, height = task.stated
    turned = ', as it is turned by its EXIF' if picture.orientation > 4 and picture.stored == task.stated else ''
    return [Problem('stated-size', task.image,
                    f'{picture.size[0]}x{picture.size[1]} pixels{turned}, and {width}x{height} in the file')]


def _against_image(task: Task, size: tuple[int, int], picture: image_files.Picture) -> list[Problem]:
    label = str(task.label)
    if size == picture.size:
        # Turned upside down or by a quarter of a square, the sizes do not tell.
        if picture.orientation in (2, 3, 4) or picture.orientation > 4 and size[0] == size[1]:
            return [Problem('exif-orientation', task.image, f'EXIF orientation {picture.orientation}', allowed='1')]
        return []
    if size == picture.stored:
        return [Problem('exif-turned', task.image, f'{picture.size[0]}x{picture.size[1]} pixels when turned by its EXIF '
                                                   f'(orientation {picture.orientation}), its label {size[0]}x{size[1]}')]
    return [Problem('size-mismatch', label,
                    f'{size[0]}x{size[1]} pixels, its image {picture.size[0]}x{picture.size[1]}')]


def _read_label(path: str, rules: Rules) -> tuple[list[Problem], np.ndarray | None]:
    """The ids of a label map ``(H, W)``, as the pipeline reads them; None if it has none."""
    problems, image = image_files.opened(path)
    if problems and problems[0].kind == 'image-missing':
        problems = [Problem('label-missing', path, 'no such file')]
    if image is None:
        return problems, None
    try:
        with image:
            pixels = np.asarray(image)
            mode, kind, colours = image.mode, image.format, image.getpalette() if image.mode == 'P' else None
    except Exception as error:  # decoders raise anything
        return [image_files.undecodable(path, error)], None
    if pixels.ndim == 2 and colours and not rules.pillow_labels:
        return [Problem('label-channels', path, 'a palette, which the pipeline (imdecode_backend) reads as 3 channels; '
                                                'a label map has one, the class index of each pixel')], None
    if pixels.ndim != 2:
        return [Problem('label-channels', path, not_a_label_map(pixels))], None
    if kind in ('JPEG', 'MPO'):
        problems.append(Problem('label-lossy', path, 'a JPEG file', allowed='PNG'))
    if colours and not _is_grey(colours):
        problems.append(Problem('label-palette', path, 'indices of a palette with colours'))
    if pixels.dtype.itemsize > 1:
        if pixels.dtype.kind == 'f' and not np.array_equal(pixels, np.floor(pixels)):  # NaN too
            return [*problems, Problem('label-fractions', path, f'{pixels.dtype} numbers that are no whole ones',
                                       allowed='0..255')], None
        fits = pixels.min() >= 0 and pixels.max() < _BYTE
        problems.append(Problem('label-depth', path, f'{pixels.dtype.itemsize * 8} bits a pixel (mode {mode})',
                                allowed='8 bits', remedy='The ids fit 8 bits, and are read so. '
                                f'{KINDS["label-depth"].remedy}' if fits else ''))
    return problems, pixels


def _is_grey(palette: list[int]) -> bool:
    return palette[::3] == palette[1::3] == palette[2::3]


def _ids(path: str, pixels: np.ndarray, rules: Rules) -> tuple[list[Problem], dict[int, int]]:
    """Problems of the ids of a label map ``(H, W)``, and how many pixels each of those that fit a byte has."""
    if pixels.dtype.itemsize > 1:
        values, counts = np.unique(pixels, return_counts=True)
    else:
        histogram = np.bincount(pixels.view(np.uint8).ravel(), minlength=_BYTE)
        values = np.flatnonzero(histogram)
        counts = histogram[values]
    found = {int(i): int(n) for i, n in zip(values, counts, strict=True) if 0 <= i < _BYTE}
    if rules.num_classes is None:
        return [], found
    valid = range(1, rules.num_classes + 1) if rules.reduce_zero else range(rules.num_classes)
    ignored = {0, IGNORED} if rules.reduce_zero else {IGNORED}
    strange = [int(i) for i in values if int(i) not in valid and int(i) not in ignored]
    problems = [out_of_range(path, strange, rules.num_classes, rules.reduce_zero)] if strange else []
    if not strange and not any(i in valid for i in found):
        problems.append(Problem('label-all-ignored', path, f'no pixel of a class, only {", ".join(map(str, found))}'))
    return problems, found


def not_a_label_map(pixels: np.ndarray) -> str:
    """What to say of a label file with colour channels."""
    if pixels.ndim < 2:  # mmseg drops sides of one pixel
        return 'one pixel wide or high, which is not read as a label map'
    return f'{pixels.shape[-1]} channels; a label map has one, the class index of each pixel'


def out_of_range(path: str, found: list[int], num_classes: int, reduce_zero_label: bool) -> Problem:
    """What to say of label ids, as they stand in the file, that no class has."""
    shown = ', '.join(map(str, found[:_SHOWN])) + (' ...' if len(found) > _SHOWN else '')
    valid = (f'1..{num_classes} (0 and 255 are ignored)' if reduce_zero_label else
             f'0..{num_classes - 1} (255 is ignored)') + f' with reduce_zero_label={reduce_zero_label}'
    problem = Problem('label-out-of-range', path, f'label ids {shown} are beyond the {num_classes} classes', valid)
    if reduce_zero_label or not cityscapes.raw_ids(found, num_classes):
        return problem
    return Problem('cityscapes-raw-labels', path, problem.found, valid, f'They are within the 34 raw ids of Cityscapes. '
                   f'{cityscapes.how_to_convert("ROOT")}\n{problem.advice}')
