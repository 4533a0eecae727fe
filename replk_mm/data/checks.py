"""What can be wrong with a data set, found before training: folders, pairs, and a sample of the files."""
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from replk_mm.data.files import damage
from replk_mm.data.transforms import IGNORED, label_range_message, not_a_label_map
from replk_mm.errors import UserError

#: Files of a split whose content is looked at before training; the pipeline checks every file when it reads it.
SAMPLE = 64
_SHOWN = 5


def check_dataset(dataset: dict, scope: str, num_classes: int | None) -> str:
    """Check folders, image and label pairs, and the content of a sample.

    Args:
        dataset: Config of a leaf dataset, mmseg's layout (image and label folders) or one with an annotation file.
        scope: Default scope of the config, in which the dataset's type is looked up.
        num_classes: Classes of the model; None checks no label ids.

    Returns:
        A line that says what was checked.

    Raises:
        UserError: On the first kind of problem found, with the files it concerns.
    """
    root = Path(dataset.get('data_root') or '.')
    if not root.is_dir():
        raise UserError(f'data root {root}: no such folder\nName yours with --data-root DIR. {_expected(dataset)}')
    prefix = dataset.get('data_prefix') or {}
    if dataset.get('ann_file'):
        annotations = root / dataset['ann_file']
        if not annotations.is_file():
            raise UserError(f'{annotations}: no such annotation file (data root {root})\n{_expected(dataset)}')
    image_key = 'img_path' if 'img_path' in prefix else 'img'
    if image_key not in prefix:
        return f'data {root}: folders not checked, the data set names none'
    images_dir = root / prefix[image_key]
    if not images_dir.is_dir():
        depth = len(Path(prefix[image_key]).parts)
        found = [*(p.parents[depth - 1] for p in sorted(root.glob(f'*/{prefix[image_key]}'))),
                 *(p for p in root.resolve().parents[:2] if (p / prefix[image_key]).is_dir())]
        hint = f'Did you mean --data-root {found[0]}?' if found else _expected(dataset)
        raise UserError(f'{images_dir}: no such folder (data root {root} holds: {_listing(root)})\n{hint}')
    builder = dataset_class(dataset, scope)
    defaults = {p.name: p.default for p in inspect.signature(builder).parameters.values()}

    def option(key, fallback):
        value = dataset.get(key, defaults.get(key, fallback))
        return fallback if value is inspect.Parameter.empty else value

    if 'seg_map_path' not in prefix:
        return f'data {root}: annotation file and image folder are there'
    reduce_zero = bool(option('reduce_zero_label', False))
    _check_reduction(dataset, reduce_zero)
    in_files = _classes_picked_from(dataset, builder)
    if in_files and num_classes is not None:
        num_classes = in_files  # the data set maps those that were picked
    image_suffix, label_suffix = option('img_suffix', '.jpg'), option('seg_map_suffix', '.png')
    # mmseg takes the names from an annotation file, if there is one, and from the folder otherwise.
    if dataset.get('ann_file'):
        listed = {line.strip() for line in (root / dataset['ann_file']).read_text().splitlines() if line.strip()}
        absent = sorted(listed - _names(images_dir, image_suffix))
        if absent:
            raise UserError(f'{root / dataset["ann_file"]}: {len(absent)} of {len(listed)} images are not in '
                            f'{images_dir} (NAME{image_suffix}): {_some(absent)}\nAdd the images, or remove their lines.')
    else:
        listed = _names(images_dir, image_suffix)
    return _check_pairs(root, images_dir, root / prefix['seg_map_path'], image_suffix, label_suffix, listed,
                        reduce_zero, num_classes)


def dataset_class(dataset: dict, scope: str) -> type:
    """The class that a data set's ``type`` names.

    Raises:
        UserError: If there is none.
    """
    init_default_scope(scope)
    # Not `DATASETS.get`: it does not look into the default scope, whose data sets may not be imported yet.
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_', scope)) as registry:
        found = registry.get(dataset['type'])
    if found is None:
        raise UserError(f'data set type {dataset["type"]!r}: there is no such data set in {scope} (data root '
                        f'{dataset.get("data_root")})\nCheck its spelling, and that its package is installed.')
    return found


def _check_reduction(dataset: dict, reduce_zero: bool) -> None:
    for step in dataset.get('pipeline', ()):
        step = step.get('load', step)  # as the pipeline's own checks wrap it
        if step.get('reduce_zero_label') not in (None, reduce_zero):
            raise UserError(f'reduce_zero_label={step["reduce_zero_label"]} in the pipeline\'s {step["type"]}, and '
                            f'{reduce_zero} in {dataset["type"]} (data root {dataset.get("data_root")})\n'
                            f'Set it at the data set only; the pipeline takes it from there.')


def _classes_picked_from(dataset: dict, builder: type) -> int:
    """Classes of the data set's type, whose ids its files hold, if it is told to use some of them only; 0 otherwise."""
    known = getattr(builder, 'METAINFO', {}).get('classes')
    picked = (dataset.get('metainfo') or {}).get('classes')
    if not known or not picked or list(picked) == list(known):
        return 0
    strange = [name for name in picked if name not in known]
    if strange:
        raise UserError(f'metainfo.classes of {dataset["type"]}: {_some(strange)} of {len(picked)} are none of its '
                        f'classes\nPick from those the type has, or use type BaseSegDataset, which has none of its own.')
    return len(known)


def _expected(dataset: dict) -> str:
    prefix = dataset.get('data_prefix') or {}
    parts = [*prefix.values(), *([dataset['ann_file']] if dataset.get('ann_file') else [])]
    return f'It must hold: {", ".join(str(p) for p in parts)}' if parts else ''


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ', '.join(names[:6]) + (' ...' if len(names) > 6 else '') if names else 'nothing'


def _some(names: list[str]) -> str:
    return ', '.join(names[:_SHOWN]) + (' ...' if len(names) > _SHOWN else '')


def _check_pairs(root: Path, images_dir: Path, labels_dir: Path, image_suffix: str, label_suffix: str,
                 images: set[str], reduce_zero: bool, num_classes: int | None) -> str:
    if not images:
        raise UserError(f'{images_dir}: no image ends with {image_suffix}; found: {_listing(images_dir)}\n'
                        f'Check the data root, or set img_suffix of the data set.')
    if not labels_dir.is_dir():
        raise UserError(f'{labels_dir}: no such folder, so the {len(images)} images have no labels\n'
                        f'(data root {root} holds: {_listing(root)})')
    labels = _names(labels_dir, label_suffix)
    missing = sorted(images - labels)
    if missing:
        raise UserError(f'{labels_dir}: {len(missing)} of {len(images)} images have no label map '
                        f'(NAME{label_suffix}): {_some(missing)}\n'
                        f'Add the label maps, or remove the images from {images_dir}.')
    names = sorted(images)
    sample = [names[i] for i in sorted({round(i) for i in np.linspace(0, len(names) - 1, min(SAMPLE, len(names)))})]
    problems, wrong_ids = [], []
    for name in sample:
        image, label = images_dir / f'{name}{image_suffix}', labels_dir / f'{name}{label_suffix}'
        for path in (image, label):
            problem = damage(path)
            if problem:
                problems.append(f'{path}: {problem}')
        if problems:
            continue
        path = image
        try:
            size = Image.open(image).size
            path = label
            pixels = np.asarray(Image.open(label))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow's decoders raise
            problems.append(f'{path}: cannot be decoded ({error})')
            continue
        if pixels.ndim != 2:
            problems.append(f'{label}: {not_a_label_map(pixels)}')
            continue
        ids, label_size = np.unique(pixels), pixels.shape[::-1]
        if size != label_size:
            problems.append(f'{label}: {label_size[0]}x{label_size[1]} pixels, its image {size[0]}x{size[1]}')
        if num_classes is not None:
            limit = num_classes + 1 if reduce_zero else num_classes
            wrong = ids[(ids >= limit) & (ids != IGNORED)]
            if len(wrong):
                wrong_ids.append(label_range_message(label, wrong.tolist(), num_classes, reduce_zero))
    if problems:
        raise UserError('\n'.join([*problems[:_SHOWN], *([f'... and {len(problems) - _SHOWN} more']
                                                         if len(problems) > _SHOWN else []),
                                   'Replace these files, or remove them and their partners.']))
    if wrong_ids:
        raise UserError(wrong_ids[0] + (f'\n{len(wrong_ids)} of {len(sample)} label maps looked at have such ids.'))
    return f'data {images_dir}: {len(images)} images with labels, {len(sample)} of them looked into'


def _names(folder: Path, suffix: str) -> set[str]:
    return {str(p.relative_to(folder))[:-len(suffix)] for p in folder.rglob(f'*{suffix}')}


def check_data(cfg: Config, splits: tuple[str, ...], num_classes: int | None) -> list[str]:
    """:func:`check_dataset` for the leaf datasets of the named splits, each once."""
    lines, seen = [], set()
    for dataset in datasets_of(cfg, splits):
        key = str({k: v for k, v in dataset.items() if k in ('data_root', 'data_prefix', 'ann_file')})
        if key not in seen:
            seen.add(key)
            lines.append(check_dataset(dataset, cfg.get('default_scope', 'mmengine'), num_classes))
    return lines


def datasets_of(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[ConfigDict]:
    """The leaf datasets of the data loaders, wrappers (repeat, concatenate) opened."""
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader:
            yield from _leaves(loader['dataset'])


def _leaves(dataset: ConfigDict) -> Iterator[ConfigDict]:
    inner = as_list(dataset.get('dataset')) + as_list(dataset.get('datasets'))
    if not inner:
        yield dataset
    for part in inner:
        yield from _leaves(part)


def as_list(value) -> list:
    """``value`` as a list: itself, of one, or empty for None."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
