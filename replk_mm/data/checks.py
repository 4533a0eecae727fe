"""What can be wrong with a data set, found before training: folders, pairs, and a sample of the files."""
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from replk_mm.data import cityscapes, coco_checks, metric_files
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.datasets import as_list, coco_style, dataset_class, dataset_option, datasets_of
from replk_mm.data.files import IGNORED, UNDECODABLE, damage, sample
from replk_mm.data.transforms import label_range_message, not_a_label_map
from replk_mm.errors import UserError

_SHOWN = 5


def check_dataset(dataset: dict, scope: str, num_classes: int | None, metrics: Sequence[dict] | None = None) -> str:
    """Check folders, image and label pairs or annotations, and the content of a sample.

    Args:
        dataset: Config of a leaf dataset, mmseg's layout (image and label folders) or one with an annotation file.
        scope: Default scope of the config, in which the dataset's type is looked up.
        num_classes: Classes of the model; None checks no label ids.
        metrics: Configs of what is measured on it; None if it is trained with. Defaults to None.

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
        hint = f'Did you mean --data-root {shlex.quote(str(found[0]))}?' if found else _expected(dataset)
        raise UserError(f'{images_dir}: no such folder (data root {root} holds: {_listing(root)})\n{hint}')
    if dataset.get('ann_file') and coco_style(dataset, scope):
        return coco_checks.check(root / dataset['ann_file'], images_dir, _use(dataset, scope, metrics))
    if 'seg_map_path' not in prefix:
        return f'data {root}: annotation file and image folder are there'
    builder = dataset_class(dataset, scope)
    reduce_zero = bool(dataset_option(dataset, builder, 'reduce_zero_label', False))
    _check_reduction(dataset, reduce_zero)
    in_files = _classes_picked_from(dataset, builder, scope)
    if in_files and num_classes is not None:
        num_classes = in_files  # the data set maps those that were picked
    image_suffix = dataset_option(dataset, builder, 'img_suffix', '.jpg')
    label_suffix = dataset_option(dataset, builder, 'seg_map_suffix', '.png')
    if label_suffix.endswith(cityscapes.RAW_SUFFIX) and num_classes == len(cityscapes.IDS):
        raise UserError(f'{dataset["type"]}.seg_map_suffix={label_suffix!r} (data root {root}): these are the raw label ids, '
                        f'of 34 kinds; the model has {num_classes} classes\n{cityscapes.how_to_convert(root)}\n'
                        f'and use the suffix {label_suffix.replace(cityscapes.RAW_SUFFIX, cityscapes.TRAIN_SUFFIX)!r}.')
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


def _use(dataset: dict, scope: str, metrics: Sequence[dict] | None) -> coco_checks.Use:
    filters = dataset.get('filter_cfg') or {}
    scored = [m for m in metrics or () if str(m.get('type')).endswith('CocoMetric') and not m.get('format_only')]
    masks = any('segm' in as_list(m.get('metric', 'bbox')) for m in scored) or any(
        step.get('load', step).get('with_mask') for step in dataset.get('pipeline', ()) if isinstance(step, dict))
    return coco_checks.Use(
        train=metrics is None, masks=masks, scored=bool(scored), own_file=any(m.get('ann_file') for m in scored),
        classes=classes_of(dataset, scope) if (dataset.get('metainfo') or {}).get('classes') else None,
        keep_empty=not filters.get('filter_empty_gt', False), min_size=filters.get('min_size', 0))


def _check_reduction(dataset: dict, reduce_zero: bool) -> None:
    for step in dataset.get('pipeline', ()):
        step = step.get('load', step)  # as the pipeline's own checks wrap it
        if step.get('reduce_zero_label') not in (None, reduce_zero):
            raise UserError(f'reduce_zero_label={step["reduce_zero_label"]} in the pipeline\'s {step["type"]}, and '
                            f'{reduce_zero} in {dataset["type"]} (data root {dataset.get("data_root")})\n'
                            f'Set it at the data set only; the pipeline takes it from there.')


def _classes_picked_from(dataset: dict, builder: type, scope: str) -> int:
    """Classes of the data set's type, whose ids its files hold, if it is told to use some of them only; 0 otherwise."""
    known = getattr(builder, 'METAINFO', {}).get('classes')
    given = (dataset.get('metainfo') or {}).get('classes')
    if not known or not given:
        return 0
    picked = classes_of(dataset, scope) or ()
    if isinstance(given, str):  # names in files are read without the space that one of ADE20K's ends with
        known = [name.strip() for name in known]
    if list(picked) == list(known):
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
    raw_suffix = label_suffix.replace(cityscapes.TRAIN_SUFFIX, cityscapes.RAW_SUFFIX)
    if missing and raw_suffix != label_suffix and (raw := _names(labels_dir, raw_suffix) & set(missing)):
        raise UserError(f'{labels_dir}: {len(missing)} of {len(images)} images have no label map (NAME{label_suffix}), but '
                        f'{len(raw)} of them raw ones (NAME{raw_suffix}): {_some(missing)}\n{cityscapes.how_to_convert(root)}')
    if missing:
        raise UserError(f'{labels_dir}: {len(missing)} of {len(images)} images have no label map '
                        f'(NAME{label_suffix}): {_some(missing)}\n'
                        f'Add the label maps, or remove the images from {images_dir}.')
    looked_at = sample(sorted(images))
    problems, wrong_ids = [], []
    for name in looked_at:
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
        except UNDECODABLE as error:
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
        raise UserError(wrong_ids[0] + (f'\n{len(wrong_ids)} of {len(looked_at)} label maps looked at have such ids.'))
    return f'data {images_dir}: {len(images)} images with labels, {len(looked_at)} of them looked into'


def _names(folder: Path, suffix: str) -> set[str]:
    return {str(p.relative_to(folder))[:-len(suffix)] for p in folder.rglob(f'*{suffix}')}


def check_data(cfg: Config, splits: tuple[str, ...], num_classes: int | None) -> list[str]:
    """:func:`check_dataset` for the leaf datasets of the named splits, each once, and the files that metrics compare with.

    Raises:
        UserError: See :func:`check_dataset` and :func:`metric_files.check`.
    """
    scope = cfg.get('default_scope', 'mmengine')
    lines, seen = [], set()
    for split in splits:
        metrics = None if split == 'train' else as_list(cfg.get(f'{split}_evaluator'))
        for dataset in datasets_of(cfg, (split,)):
            # The same file may be trained with and scored, which asks more of it.
            use = _use(dataset, scope, metrics) if annotation_file(dataset) else None
            key = str(({k: v for k, v in dataset.items() if k in ('data_root', 'data_prefix', 'ann_file')}, use))
            if key not in seen:
                seen.add(key)
                lines.append(check_dataset(dataset, scope, num_classes, metrics))
        metric_files.check(cfg, split)
    return list(dict.fromkeys(lines))
