"""Class names of data sets and annotation files, and the option that sets them everywhere in a config."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

from replk_mm.data import class_heads
from replk_mm.data.coco import annotation_path, category_counts, read_annotations
from replk_mm.data.datasets import dataset_class, dataset_option, is_classification, named_datasets
from replk_mm.errors import UserError, format_list
from replk_mm.logs import Note
from replk_mm.visualize import make_palette

#: File in a data root that names its classes, one per line.
CLASSES_FILE = 'classes.txt'
_FIX = 'Give names separated by commas, or a file with one name per line.'


def parse_classes(text: str) -> list[str]:
    """Parse class names from a command line.

    Args:
        text: ``NAME,NAME,...``, or a file with one name per line.

    Raises:
        UserError: If there are none, one occurs twice, or the file cannot be read.
    """
    if ',' not in text and Path(text).is_file():
        return _read_names(Path(text))
    if ',' not in text and (Path(text).suffix or '/' in text):
        raise UserError(f'--classes {text}: no such file\n{_FIX}')
    return _check_names([name.strip() for name in text.split(',')], text)


def _read_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()  # editors on Windows write a byte order mark
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f'--classes {path}: the file cannot be read as UTF-8 text: {error}\n{_FIX}') from error
    return _check_names([line.strip() for line in lines if line.strip()], str(path))


def _check_names(names: list[str], text: str) -> list[str]:
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if not names or not all(names) or repeated:
        what = f'{repeated[0]!r} occurs twice' if repeated else 'a name is empty' if names else 'the file has no names'
        raise UserError(f'--classes {text}: {what}\n{_FIX}')
    return names


def use_classes(cfg: Config, text: str | Sequence[str], splits: tuple[str, ...]) -> list[str]:
    """Apply ``--classes``: set the names in every data set, and their number in every head.

    Args:
        cfg: Changed in place.
        text: The names, or see :func:`parse_classes`. ``'auto'`` takes the categories of the annotation file (of the
            training data, if it exists); for classification, the folders; for label maps, ``classes.txt`` or the
            ``meta.json`` of a demo in the data root.
        splits: Data sets that exist.

    Returns:
        What was changed, one line each.

    Raises:
        UserError: If there are no names, or they are not sufficient for the model.
    """
    class_heads.reject_stuff(cfg.model)
    if text == 'auto':
        names, source, are_ids = _find_classes(cfg, splits)
    elif not isinstance(text, str):
        names, source, are_ids = _check_names(list(text), ','.join(text)), 'the suite', False
    else:
        roots = {Path(dataset.get('data_root') or '.').resolve() for _, dataset in named_datasets(cfg)}
        file = Path(text)
        are_ids = file.name == CLASSES_FILE and file.is_file() and file.resolve().parent in roots
        names, source = parse_classes(text), '--classes'
    return [Note(f'classes: {len(names)}, from {source}: {format_list(names)}'), *set_classes(cfg, names, are_ids)]


def _find_classes(cfg: Config, splits: tuple[str, ...]) -> tuple[list[str], str, bool]:
    """Names for ``--classes auto``, their file, and whether the ``i``-th name is the ``i``-th label id."""
    tried = []
    for _, dataset in named_datasets(cfg, tuple(dict.fromkeys(('train', *splits)))):
        file, root = annotation_file(dataset), Path(dataset.get('data_root') or '.')
        if file:
            if file.is_file() and (names := list(category_counts(read_annotations(file)))):
                return names, str(file), False
            tried.append(file)
            continue
        if folders := _class_folders(dataset, cfg.get('default_scope', 'mmengine')):
            return folders, str(root), True
        listing, demo = root / CLASSES_FILE, root / 'meta.json'
        tried += [listing, demo]
        if listing.is_file():
            return _read_names(listing), str(listing), True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            meta = json.loads(demo.read_text(encoding='utf-8'))
            # Demos in the layout of Cityscapes have the label ids of Cityscapes.
            if meta.get('classes') and 'train_ids' not in meta:
                return list(meta['classes']), str(demo), True
    raise UserError(
        f'--classes auto: no file names the classes; tried {", ".join(map(str, dict.fromkeys(tried)))}\n'
        f'Name them: --classes NAME,NAME,... or --classes FILE with one name per line; or keep those of the config.'
    )


def _class_folders(dataset: dict, scope: str) -> list[str]:
    """Names of the folders of a classification data set that has one for each class, in its order; else none."""
    if not is_classification(dataset, scope):
        return []
    config = {**dataset, 'pipeline': [], 'metainfo': dict(classes=None)}
    with contextlib.suppress(Exception), DATASETS.switch_scope_and_registry(scope) as registry:  # other checks name it
        return list(registry.build(config).folder_to_idx)
    return []


def set_classes(cfg: Config, names: Sequence[str], are_ids: bool = False) -> list[str]:
    """Set class names and colours in every data set, and their number in every head.

    A segmentation data set whose type has other classes becomes ``mmseg.BaseSegDataset`` with the same files: its
    label ids are these classes. If all names belong to the type, they select its classes, unless ``are_ids``.

    Args:
        cfg: Changed in place.
        names: The classes; label ``i`` is the ``i``-th.
        are_ids: Whether the label ids in the files are known to be these classes. Defaults to False.

    Returns:
        What else was changed, one line each.
    """
    scope = cfg.get('default_scope', 'mmengine')
    notes: dict[str, None] = {}
    former = {len(found) for _, dataset in named_datasets(cfg) if (found := classes_of(dataset, scope))}
    for _, dataset in named_datasets(cfg):
        builder = dataset_class(dataset, scope)
        own = getattr(builder, 'METAINFO', {})
        # ADE20K of mmseg has a class 'bed ' with a space.
        spelling = {name.strip(): name for name in own.get('classes') or ()}
        classes = tuple(spelling.get(name.strip(), name) for name in names)
        metainfo = {**(dataset.get('metainfo') or {}), 'classes': classes, 'palette': _palette(classes, own)}
        dataset['metainfo'] = ConfigDict(metainfo)
        if not hasattr(builder, 'get_label_map') or not own.get('classes') or list(own['classes']) == list(classes):
            continue
        if set(classes) <= set(own['classes']) and not are_ids:
            note = f'labels: ids in the files are those of the {len(own["classes"])} classes of {dataset["type"]}; '
            notes[f'{note}{len(names)} of them are used'] = None
            continue
        for key in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
            dataset[key] = dataset_option(dataset, builder, key, None)
        first = 1 if dataset['reduce_zero_label'] else 0
        note = f'data: BaseSegDataset with the files of {dataset["type"]}, which has other classes; label ids '
        notes[f'{note}{first}..{first + len(names) - 1} are these' + ', 0 is ignored' * first] = None
        dataset['type'] = 'mmseg.BaseSegDataset'
    return [*notes, *dict.fromkeys(class_heads.set_num_classes(cfg.model, len(names), former))]


def _palette(names: Sequence[str], metainfo: dict) -> list[list[int]]:
    """Colours: those of the data set type for the classes that it has, and spread hues for others."""
    known = dict(zip(metainfo.get('classes') or (), metainfo.get('palette') or (), strict=False))
    return [list(known.get(name, hue)) for name, hue in zip(names, make_palette(len(names)), strict=True)]


def classes_of(dataset: dict, scope: str) -> tuple[str, ...] | None:
    """The classes of a data set, from ``metainfo`` in its config or from its type; None if neither names any."""
    given = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(given, str):  # mmengine reads a file
        return tuple(_read_names(Path(given)))
    found = given or getattr(dataset_class(dataset, scope), 'METAINFO', {}).get('classes')
    return tuple(found) if found else None


def annotation_file(dataset: dict) -> Path | None:
    """The COCO-style annotation file of a data set; None if it has none."""
    path = Path(dataset.get('data_root') or '.', str(dataset.get('ann_file') or ''))
    return annotation_path(path) if path.name.endswith(('.json', '.json.gz')) else None
