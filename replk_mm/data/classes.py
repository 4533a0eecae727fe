"""The names of the classes: of data sets, of annotation files, and how many of them the heads of a model tell apart.

A class that only one of them has is an error that no library reports: mmdet drops annotations of other names.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from replk_mm.data import class_heads, coco
from replk_mm.data.datasets import dataset_class, dataset_option, named_datasets
from replk_mm.errors import UserError, format_list
from replk_mm.visualize import make_palette

#: Files in a data root that name its classes, one a line.
CLASSES_FILE = 'classes.txt'
_HOW = 'Give names separated by commas, or a file with one name a line.'


def parse_classes(text: str) -> list[str]:
    """Names of classes as given on a command line.

    Args:
        text: ``NAME,NAME,...``, or a file with one name a line.

    Raises:
        UserError: If there are none, or one twice, or no such file.
    """
    if ',' not in text and Path(text).is_file():
        return _read_names(Path(text))
    if ',' not in text and (Path(text).suffix or '/' in text):
        raise UserError(f'--classes {text}: no such file\n{_HOW}')
    return _checked([name.strip() for name in text.split(',')], text)


def _read_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()  # Windows' editors write a mark before the first name
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f'--classes {path}: the file cannot be read as UTF-8 text: {error}\n{_HOW}') from error
    return _checked([line.strip() for line in lines if line.strip()], str(path))


def _checked(names: list[str], text: str) -> list[str]:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if not names or not all(names) or twice:
        what = f'{twice[0]!r} occurs twice' if twice else 'a name is empty' if names else 'the file has no names'
        raise UserError(f'--classes {text}: {what}\n{_HOW}')
    return names


def use_classes(cfg: Config, text: str, splits: tuple[str, ...]) -> list[str]:
    """Apply ``--classes``: give every data set of the config these classes, and every head their number.

    Args:
        cfg: Changed in place.
        text: See :func:`parse_classes`; ``'auto'`` takes the names from the data: the categories of the annotation file
            (of the training data, if it exists), or ``classes.txt`` or a demo's ``meta.json`` in the data root.
        splits: Data sets that are there.

    Returns:
        What was changed, a line each.

    Raises:
        UserError: If the names cannot be had, or do not say enough for this model.
    """
    class_heads.reject_stuff(cfg.model)
    if text == 'auto':
        names, source, counted = found_classes(cfg, splits)
    else:
        names, source, counted = parse_classes(text), '--classes', _is_of_data(cfg, text)
    return [f'classes: {len(names)}, from {source}: {format_list(names)}', *set_classes(cfg, names, counted)]


def _is_of_data(cfg: Config, text: str) -> bool:
    roots = {Path(dataset.get('data_root') or '.').resolve() for _, dataset in named_datasets(cfg)}
    return Path(text).name == CLASSES_FILE and Path(text).is_file() and Path(text).resolve().parent in roots


def found_classes(cfg: Config, splits: tuple[str, ...]) -> tuple[list[str], str, bool]:
    """Names for ``--classes auto``, the file that has them, and whether label ids count them.

    Raises:
        UserError: If no file names the classes.
    """
    tried = []
    for _, dataset in named_datasets(cfg, tuple(dict.fromkeys(('train', *splits)))):
        file, root = annotation_file(dataset), Path(dataset.get('data_root') or '.')
        if file:
            if file.is_file() and (categories := coco.read_annotations(file)['categories']):
                return [category['name'] for category in categories], str(file), False
            tried.append(file)
            continue
        tried += [root / CLASSES_FILE, root / 'meta.json']
        if tried[-2].is_file():
            return _read_names(tried[-2]), str(tried[-2]), True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            meta = json.loads(tried[-1].read_text(encoding='utf-8'))
            # A demo in the layout of Cityscapes has Cityscapes' labels.
            if meta.get('classes') and 'train_ids' not in meta:
                return list(meta['classes']), str(tried[-1]), True
    raise UserError(
        f'--classes auto: no file names the classes; tried {", ".join(map(str, dict.fromkeys(tried)))}\n'
        f'Name them: --classes NAME,NAME,... or --classes FILE with one name a line.'
    )


def set_classes(cfg: Config, names: Sequence[str], counted: bool = False) -> list[str]:
    """Give every data set these classes and colours for them, and every head their number.

    A segmentation data set whose type has classes of its own, and not these, becomes ``mmseg.BaseSegDataset`` with the
    same files: its label ids count these classes. If its type has all of these and more, they are picked from the
    type's, unless ``counted``.

    Args:
        cfg: Changed in place.
        names: The classes; label ``i`` is the ``i``-th.
        counted: Whether label ids are known to count these classes. Defaults to False.

    Returns:
        What else had to be changed, a line each.
    """
    scope = cfg.get('default_scope', 'mmengine')
    notes: dict[str, None] = {}
    former = {len(found) for _, dataset in named_datasets(cfg) if (found := classes_of(dataset, scope))}
    for _, dataset in named_datasets(cfg):
        builder = dataset_class(dataset, scope)
        own = getattr(builder, 'METAINFO', {})
        # mmseg's ADE20K has a class 'bed ', with a space that no one gives.
        spelling = {name.strip(): name for name in own.get('classes') or ()}
        classes = tuple(spelling.get(name.strip(), name) for name in names)
        dataset['metainfo'] = ConfigDict(
            {**(dataset.get('metainfo') or {}), 'classes': classes, 'palette': _palette(classes, own)}
        )
        if not hasattr(builder, 'get_label_map') or not own.get('classes') or list(own['classes']) == list(classes):
            continue
        if set(classes) <= set(own['classes']) and not counted:
            notes[
                f'labels: ids in the files are those of the {len(own["classes"])} classes of {dataset["type"]}; '
                f'{len(names)} of them are used'
            ] = None
            continue
        for key in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
            dataset[key] = dataset_option(dataset, builder, key, None)
        first = 1 if dataset['reduce_zero_label'] else 0
        notes[
            f'data: BaseSegDataset with the files of {dataset["type"]}, which has other classes; label ids '
            f'{first}..{first + len(names) - 1} are these' + (', 0 is ignored' if first else '')
        ] = None
        dataset['type'] = 'mmseg.BaseSegDataset'
    return [*notes, *dict.fromkeys(class_heads.set_counts(cfg.model, len(names), former))]


def _palette(names: Sequence[str], metainfo: dict) -> list[list[int]]:
    """Colours: the data set type's own for names that it knows, others spread over the hues."""
    known = dict(zip(metainfo.get('classes') or (), metainfo.get('palette') or (), strict=False))
    made = make_palette(len(names))
    return [list(known.get(name, colour)) for name, colour in zip(names, made, strict=True)]


def classes_of(dataset: dict, scope: str) -> tuple[str, ...] | None:
    """The classes a data set will have: of ``metainfo`` in the config, or of its type; None if neither names any."""
    given = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(given, str):  # mmengine takes it for a file
        return tuple(_read_names(Path(given)))
    found = given or getattr(dataset_class(dataset, scope), 'METAINFO', {}).get('classes')
    return tuple(found) if found else None


def annotation_file(dataset: dict) -> Path | None:
    """The COCO-style annotation file of a data set, None if it has none."""
    name = str(dataset.get('ann_file') or '')
    return Path(dataset.get('data_root') or '.') / name if name.endswith('.json') else None
