"""Convert label maps of Cityscapes from the 34 ids of the annotation tool to the 19 training classes.

Source: the label table of the Cityscapes data set (Cordts et al., The Cityscapes Dataset for Semantic Urban Scene
Understanding, CVPR 2016): 34 ids, of which 19 have a trainId.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from replk_mm.data.files import IGNORE_INDEX
from replk_mm.errors import UserError, format_list
from replk_mm.files import write_atomic
from replk_mm.logs import show_progress

#: Ids of the classes, in the order of their trainIds 0..18: road, sidewalk, building, wall, fence, pole, traffic light,
#: traffic sign, vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
NUM_IDS = 34
RAW_SUFFIX, TRAIN_SUFFIX = '_labelIds.png', '_labelTrainIds.png'
_TABLE = np.full(256, IGNORE_INDEX, np.uint8)
_TABLE[list(IDS)] = np.arange(len(IDS), dtype=np.uint8)


@dataclass
class Conversion:
    """The result of a conversion."""

    written: int = 0  #: number of label maps written
    kept: int = 0  #: number of existing label maps that were correct
    errors: list[str] = field(default_factory=list)  #: one line per label map that could not be converted


def to_train_ids(labels: np.ndarray) -> np.ndarray:
    """Convert a label map ``(H, W)`` of ids to trainIds; 255 where there is no class."""
    return _TABLE[labels]


def convert_labels(root: str | Path, jobs: int | None = None, force: bool = False) -> Conversion:
    """Write a ``*_labelTrainIds.png`` beside every ``*_labelIds.png`` of a Cityscapes tree.

    Existing maps are compared. Correct ones are kept, so that an interrupted run continues; others are an error unless
    ``force``.

    Args:
        root: Folder that contains ``gtFine``, or any folder with these files.
        jobs: Number of threads. Defaults to a few per core.
        force: Whether to replace maps that differ. Defaults to False.

    Raises:
        UserError: If there is nothing to convert.
    """
    root = Path(root)
    files = sorted(root.rglob(f'*{RAW_SUFFIX}'))
    if not files:
        what = f'no file ends with {RAW_SUFFIX}' if root.is_dir() else 'no such folder'
        if any(root.rglob(f'*{TRAIN_SUFFIX}')):
            what += f'; those that end with {TRAIN_SUFFIX} need no conversion'
        raise UserError(f'{root}: {what}\nName the folder that contains gtFine (of gtFine_trainvaltest.zip, unpacked).')
    with ThreadPoolExecutor(jobs) as pool:
        converted = pool.map(functools.partial(_convert, force=force), files)
        outcomes = list(show_progress(converted, 'label maps', len(files)))
    errors = [outcome for outcome in outcomes if outcome not in ('written', 'kept')]
    return Conversion(outcomes.count('written'), outcomes.count('kept'), errors)


def _convert(path: Path, force: bool) -> str:
    """Convert one file; return ``'written'``, ``'kept'``, or an error message."""
    target = path.with_name(path.name.removesuffix(RAW_SUFFIX) + TRAIN_SUFFIX)
    try:
        labels = _read_ids(path)
        if unknown := [i for i in np.unique(labels).tolist() if i >= NUM_IDS]:
            return f'{path}: ids {format_list(unknown)} are not among the ids 0..{NUM_IDS - 1} of Cityscapes'
        expected = to_train_ids(labels)
        if target.exists() and not force:
            same = np.array_equal(_read_ids(target), expected)
            return 'kept' if same else f'{target}: exists, and differs from {path.name} (--force replaces it)'
        write_atomic(target, cv2.imencode('.png', expected)[1].tobytes())
    except Exception as error:  # decoders raise anything
        return f'{path}: {error}'
    return 'written'


def _read_ids(path: Path) -> np.ndarray:
    """A label map ``(H, W)``, uint8."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise ValueError(f'{pixels.dtype} pixels of shape {pixels.shape}; a label map has one 8-bit channel')
    return pixels
