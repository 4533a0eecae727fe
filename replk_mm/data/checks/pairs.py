"""Folders of a data set, and its pairs of images and label maps, before any file is opened."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS

from replk_mm.data import cityscapes
from replk_mm.data.checks.dataset import DataSet, Rules, Task
from replk_mm.data.findings import Item
from replk_mm.errors import command_line, format_list

_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
# What the full release of ADE20K has and the benchmark has not.
_FULL_ADE = ('index_ade20k.*', 'ADE20K_*', 'images/ADE', 'images/training/*/', 'images/training/*_seg.png')


def image_key(prefix: dict) -> str:
    """The key of the image folder in a ``data_prefix``: mmsegmentation's or mmdetection's."""
    return 'img_path' if 'img_path' in prefix else 'img'


def missing_folders(one: DataSet, dataset: dict) -> None:
    """Report the data root, annotation file and folders of a data set that do not exist."""
    root, prefix = Path(one.root), dataset.get('data_prefix') or {}
    if not root.is_dir():
        one.report('data-root-missing', root, 'no such folder (the data root)')
        return
    holds = f'(the data root contains: {_content(root)})'
    if dataset.get('ann_file') and not (root / dataset['ann_file']).is_file():
        one.report('annotation-file-missing', root / dataset['ann_file'], f'no such annotation file {holds}')
    for key in (image_key(prefix), 'seg_map_path'):
        place = prefix.get(key)
        if place is None or (root / place).is_dir():
            continue
        if (
            key == 'seg_map_path'
            and one.type.endswith('ADE20KDataset')
            and any(True for pattern in _FULL_ADE for _ in root.glob(pattern))
        ):
            one.report('ade-full-release', root, f'the full release of ADE20K, not the benchmark: there is no {place}')
            continue
        depth = len(Path(place).parts)
        nested = [found.parents[depth - 1] for found in sorted(root.glob(f'*/{place}'))] if depth else []
        one.report(
            'folder-missing',
            root / place,
            f'no such folder {holds}',
            remedy=(f'Did you mean --data-root {shlex.quote(str(nested[0]))}?' if nested else ''),
        )


def survey(one: DataSet, dataset: dict, scope: str, num_classes: int | None) -> None:
    """List the pairs of a data set in mmsegmentation's layout, as the data set itself does.

    Args:
        one: Receives problems, tasks, rules and class names.
        dataset: Config of a data set whose folders exist.
        scope: Default scope of the config.
        num_classes: Number of classes of the model; None does not check label ids.
    """
    try:
        built, infos = _build(dataset, scope)
    except Exception as error:  # data sets of any package
        one.report('dataset-invalid', one.place, f'{type(error).__name__}: {error}')
        return
    labels_dir = Path(one.root, dataset['data_prefix']['seg_map_path'])
    images_dir = Path(one.root, dataset['data_prefix'].get(image_key(dataset['data_prefix'])) or '')
    one.where = str(labels_dir)
    reduce_zero, picked = bool(built.reduce_zero_label), built.label_map is not None
    names = type(built).METAINFO['classes'] if picked else built.metainfo.get('classes') or ()
    one.names = {i + reduce_zero: name for i, name in enumerate(names)}
    # The data set maps the ids of its type's classes to those that were picked.
    one.rules = Rules(len(names) if picked and num_classes is not None else num_classes, reduce_zero)
    for step in dataset.get('pipeline', ()):
        given = step.get('load', step).get('reduce_zero_label')
        if given not in (None, reduce_zero):
            one.report(
                'reduce-zero-pipeline',
                one.place,
                f'reduce_zero_label={given} in the pipeline, but {reduce_zero} in {one.type}',
            )
    if built.seg_map_suffix.endswith(cityscapes.RAW_SUFFIX) and num_classes == len(cityscapes.IDS):
        _report_raw_labels(
            one,
            f'seg_map_suffix={built.seg_map_suffix!r} of {one.type} names raw label ids; the model '
            f'has {num_classes} classes',
            [],
        )
        return
    if not infos:
        one.report(
            'no-images',
            images_dir,
            f'no image ends with {built.img_suffix}; the folder contains: {_content(images_dir)}',
        )
        return
    there = {path for info in infos for path in (info['img_path'], info['seg_map_path']) if Path(path).is_file()}
    _report_missing(one, infos, there, built.seg_map_suffix)
    if not dataset.get('ann_file'):
        _report_unused(one, images_dir, labels_dir, built, infos)
    one.tasks = [
        Task(info['img_path'], info['seg_map_path'] if info['seg_map_path'] in there else None)
        for info in infos
        if info['img_path'] in there
    ]


def _build(dataset: dict, scope: str) -> tuple[Any, list[dict]]:
    config = {**dataset, 'pipeline': [], 'lazy_init': True, 'test_mode': False}
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_', scope)) as registry:
        built = registry.build(config)
    return built, sorted(built.load_data_list(), key=lambda info: info['img_path'])


def _report_missing(one: DataSet, infos: Sequence[dict], there: Collection[str], label_suffix: str) -> None:
    """Report images in a list that do not exist, and images without a label map."""
    absent = [info['img_path'] for info in infos if info['img_path'] not in there]
    _report_files(one, 'image-missing', one.root, absent, f'of {len(infos):,} images do not exist', 'no such file')
    missing = [info['seg_map_path'] for info in infos if info['seg_map_path'] not in there]
    raw = (
        [
            path
            for path in (label.replace(cityscapes.TRAIN_SUFFIX, cityscapes.RAW_SUFFIX) for label in missing)
            if Path(path).is_file()
        ]
        if label_suffix.endswith(cityscapes.TRAIN_SUFFIX)
        else []
    )
    text = f'of {len(infos):,} images have no label map'
    if raw:
        _report_raw_labels(one, f'{len(missing):,} {text} (*{label_suffix}), but {len(raw):,} raw ones', raw)
    else:
        _report_files(one, 'label-missing', one.where, missing, text, 'no such file')


def _report_files(one: DataSet, kind: str, folder: str | Path, paths: Sequence[str], text: str, each: str) -> None:
    if paths:
        one.report(
            kind,
            folder,
            f'{len(paths):,} {text}: {format_list(paths)}',
            items=tuple(Item(each, path=path) for path in paths),
        )


def _report_raw_labels(one: DataSet, found: str, paths: Sequence[str]) -> None:
    items = tuple(Item('raw label ids', path=path) for path in paths)
    one.report(
        'cityscapes-raw-labels',
        one.where,
        found,
        items=items,
        remedy=f'Convert the labels: {command_line("convert_cityscapes", one.root)}',
    )


def _report_unused(one: DataSet, images_dir: Path, labels_dir: Path, built: Any, infos: Sequence[dict]) -> None:
    """Report images of another suffix, which the data set ignores, and label maps without an image."""
    ends = (built.img_suffix, built.seg_map_suffix) if images_dir == labels_dir else (built.img_suffix,)
    others = sorted(
        str(images_dir / name)
        for name in list_dir_or_file(str(images_dir), list_dir=False, recursive=True)
        if name.lower().endswith(_IMAGES) and not name.endswith(ends)
    )
    each = f'not end with {built.img_suffix}'
    _report_files(one, 'suffix-ignored', images_dir, others, f'images do {each} and are ignored', f'does {each}')
    used = {info['seg_map_path'] for info in infos}
    labels = (
        str(labels_dir / name)
        for name in list_dir_or_file(str(labels_dir), list_dir=False, suffix=built.seg_map_suffix, recursive=True)
    )
    _report_files(
        one,
        'label-without-image',
        labels_dir,
        sorted(path for path in labels if path not in used),
        'label maps have no image',
        'no image',
    )


def _content(folder: Path) -> str:
    """The first files and folders in a folder."""
    return format_list(sorted(path.name for path in folder.iterdir())) or 'nothing'
