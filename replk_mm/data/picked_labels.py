"""Label maps of classes that are picked from a data set type's: do their ids mean the type's classes, or the picked ones?"""
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from replk_mm.data.classes import CLASSES_FILE, classes_of, command_to_write, command_with, listed
from replk_mm.data.datasets import dataset_class, dataset_option, placed_datasets
from replk_mm.data.files import IGNORED, UNDECODABLE, sample
from replk_mm.errors import UserError


def check_picked(cfg: Config, splits: tuple[str, ...]) -> list[str]:
    """Look into label maps of data sets that use some of their type's classes.

    Args:
        cfg: With its data checked: the files are there and can be read.
        splits: Whose data sets.

    Returns:
        How many of the picked classes occur, a line for each such data set.

    Raises:
        UserError: If none of them occurs, and all ids would be in range if they counted the picked classes.
    """
    scope = cfg.get('default_scope', 'mmengine')
    notes = []
    for place, dataset in placed_datasets(cfg, splits):
        builder = dataset_class(dataset, scope)
        own, names = list(getattr(builder, 'METAINFO', {}).get('classes') or ()), classes_of(dataset, scope)
        if not hasattr(builder, 'get_label_map') or not names or list(names) == own or not set(names) < set(own):
            continue
        files = _label_files(dataset, builder)
        found = set().union(*map(_ids, files)) - {IGNORED}
        zero = bool(dataset_option(dataset, builder, 'reduce_zero_label', False))
        found -= {0} if zero else set()
        if not found:
            continue
        picked = {own.index(name) + zero: name for name in names}
        fit = found <= set(range(1, len(names) + 1)) or not zero and found <= set(range(len(names)))
        if fit and not found & set(picked):
            raise UserError(_refusal(place, dataset, picked, found, len(files), len(own)))
        occurring = [name for i, name in picked.items() if i in found]
        notes.append(f'{Path(dataset.get("data_root") or ".")}: {len(occurring)} of {len(names)} classes picked from those of '
                     f'{dataset["type"]} occur in {len(files)} label maps looked into: {listed(occurring) or "none"}; other '
                     f'ids are ignored')
    return list(dict.fromkeys(notes))


def _label_files(dataset: dict, builder: type) -> list[Path]:
    root, folder = Path(dataset.get('data_root') or '.'), (dataset.get('data_prefix') or {}).get('seg_map_path')
    suffix = dataset_option(dataset, builder, 'seg_map_suffix', '.png')
    if folder is None:
        return []
    if dataset.get('ann_file'):
        lines = (root / dataset['ann_file']).read_text().splitlines()
        files = [root / folder / f'{line.strip()}{suffix}' for line in lines if line.strip()]
    else:
        files = sorted((root / folder).rglob(f'*{suffix}'))
    return sample(files)


def _ids(path: Path) -> set[int]:
    try:
        return set(np.unique(np.asarray(Image.open(path))).tolist())
    except UNDECODABLE:  # named when the pipeline reads it
        return set()


def _refusal(place: str, dataset: dict, picked: dict[int, str], found: set[int], files: int, known: int) -> str:
    root = Path(dataset.get('data_root') or '.')
    meant = [f'{name} {i}' for i, name in picked.items()]
    return (
        f'{root / dataset["data_prefix"]["seg_map_path"]}: label ids {", ".join(map(str, sorted(found)))} are none of the '
        f'{len(picked)} classes that {place} picks from the {known} of {dataset["type"]}: {listed(meant)}\n'
        f'In {files} label maps looked into every pixel would be ignored. The ids fit the picked classes themselves. If that '
        f'is what they count, say so with a file that names them in the order of the ids:\n'
        f'  {command_to_write(list(picked.values()), root / CLASSES_FILE)}\n'
        f'  {command_with("--classes", "auto")}\n'
        f'If the ids are those of {dataset["type"]}, none of these classes occurs there: name others.')
