"""Cityscapes' label maps: from the ids of the annotation tool to the 19 classes that are trained and scored.

Source: the label table of the Cityscapes data set (Cordts et al., The Cityscapes Dataset for Semantic Urban Scene
Understanding, CVPR 2016): 34 ids, of which 19 have a trainId.
"""
import os
import shlex
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.utils import ProgressBar
from PIL import Image

from replk_mm.data.files import IGNORED, UNDECODABLE, damage
from replk_mm.errors import UserError

#: Ids of the classes, in the order of their trainIds 0..18: road, sidewalk, building, wall, fence, pole, traffic light,
#: traffic sign, vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
NUM_IDS = 34
RAW_SUFFIX, TRAIN_SUFFIX = '_labelIds.png', '_labelTrainIds.png'
_TABLE = np.full(256, IGNORED, np.uint8)
_TABLE[list(IDS)] = np.arange(len(IDS), dtype=np.uint8)
_SHOWN = 5


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        written: Label maps written.
        kept: Label maps that were there already, as they should be.
        problems: What could not be converted, a line each.
    """

    written: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)


def how_to_convert(root: str | Path) -> str:
    """What to tell who has raw labels."""
    return f'Convert them:\n  python tools/convert_cityscapes.py {shlex.quote(str(root))}'


def raw_ids(found: Collection[int], num_classes: int) -> bool:
    """Whether label ids, some of them beyond the classes, are those of Cityscapes' annotation tool."""
    return num_classes == len(IDS) and all(i < NUM_IDS for i in found)


def to_train_ids(labels: np.ndarray) -> np.ndarray:
    """Label map ``(H, W)`` of ids as one of trainIds, 255 where no class is."""
    return _TABLE[labels]


def convert(root: str | Path, jobs: int | None = None, force: bool = False, progress: bool = True) -> Conversion:
    """Write a ``*_labelTrainIds.png`` beside every ``*_labelIds.png`` of a Cityscapes tree.

    A map that is there already is read: if it is what would be written it is kept, so that an interrupted run goes on where it
    stopped; if not it is left alone unless ``force``. Files have their names only when whole.

    Args:
        root: Folder that holds ``gtFine``, or any folder with such files.
        jobs: Threads; None for one a core.
        force: Replace maps that differ.
        progress: Show a bar on standard error.

    Raises:
        UserError: If there is nothing to convert.
    """
    root = Path(root)
    files = sorted(root.rglob(f'*{RAW_SUFFIX}')) if root.is_dir() else []
    if not files:
        found = ', '.join(sorted(p.name for p in root.iterdir())[:6]) if root.is_dir() else None
        raise UserError(f'{root}: ' + (f'no file ends with {RAW_SUFFIX}; found: {found or "nothing"}' if root.is_dir() else
                                       'no such folder')
                        + '\nName the folder that holds gtFine (of gtFine_trainvaltest.zip, unpacked).')
    result = Conversion()
    bar = ProgressBar(len(files), file=sys.stderr) if progress else None
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for outcome in pool.map(lambda path: _convert(path, force), files):
            if outcome == 'written':
                result.written += 1
            elif outcome == 'kept':
                result.kept += 1
            else:
                result.problems.append(outcome)
            if bar:
                bar.update()
    if bar:
        print(file=sys.stderr)
    return result


def _convert(path: Path, force: bool) -> str:
    """Convert one file: ``'written'``, ``'kept'``, or what is wrong."""
    try:
        labels = _labels(path)
    except ValueError as error:
        return f'{path}: {error}'
    strange = sorted(set(np.unique(labels).tolist()) - set(range(NUM_IDS)))
    if strange:
        return (f'{path}: ids {", ".join(map(str, strange[:_SHOWN]))}{" ..." if len(strange) > _SHOWN else ""} are none of '
                f'Cityscapes\' 0..{NUM_IDS - 1}')
    target = path.with_name(path.name.removesuffix(RAW_SUFFIX) + TRAIN_SUFFIX)
    wanted = to_train_ids(labels)
    try:
        if target.exists() and not force:
            try:
                same = np.array_equal(_labels(target), wanted)
            except ValueError as error:
                return f'{target}: is there already: {error} (--force replaces it)'
            return 'kept' if same else f'{target}: is there already, and differs from {path.name} (--force replaces it)'
        part = target.with_name(target.name + '.part')
        try:
            Image.fromarray(wanted).save(part, format='PNG')
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        return f'{target}: cannot be written: {error.strerror or error}'
    return 'written'


def _labels(path: Path) -> np.ndarray:
    """A label map ``(H, W)`` as uint8.

    Raises:
        ValueError: If the file is none.
    """
    try:
        problem = damage(path)
        pixels = None if problem else np.asarray(Image.open(path))
    except UNDECODABLE as error:
        problem, pixels = f'cannot be decoded ({error})', None
    if problem or pixels is None:
        raise ValueError(problem)
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise ValueError(f'{pixels.dtype} pixels of shape {pixels.shape}; a label map has one channel of 8 bits')
    return pixels
