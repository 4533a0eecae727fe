"""Check the folders of a data set, and its pairs of images and label maps, without opening the files."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, TRANSFORMS

from replk_mm.data import cityscapes
from replk_mm.data.checks.dataset import DatasetReport, LabelFormat, Sample
from replk_mm.data.coco import annotation_path
from replk_mm.data.findings import Occurrence
from replk_mm.errors import command_line, format_list

_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
_PACKAGES = ('mmcv.', 'mmengine.', 'mmseg.', 'mmdet.', 'replk_mm.')
# Files that the full release of ADE20K has and the benchmark lacks.
_FULL_ADE = ('index_ade20k.*', 'ADE20K_*', 'images/ADE', 'images/training/*/*', 'images/training/*_seg.png')


def image_key(prefix: dict) -> str:
    """The key of the image folder in a ``data_prefix``."""
    return 'img_path' if 'img_path' in prefix else 'img'


def check_folders(report: DatasetReport, dataset: dict) -> None:
    """Report a data root, annotation file or folder that does not exist."""
    root, prefix = Path(report.root), dataset.get('data_prefix') or {}
    prefix = dict(img_path=prefix) if isinstance(prefix, str) else prefix
    if not root.is_dir():
        report.add('data-root-missing', root, 'no such folder (the data root)')
        return
    content = f'(the data root contains: {_content(root)})'
    if dataset.get('ann_file') and not annotation_path(root / dataset['ann_file']).is_file():
        report.add('annotation-file-missing', root / dataset['ann_file'], f'no such annotation file {content}')
    is_ade = report.type.endswith('ADE20KDataset')
    for key in (image_key(prefix), 'seg_map_path'):
        folder = prefix.get(key)
        if folder is None or (root / folder).is_dir():
            continue
        if is_ade and key == 'seg_map_path' and any(next(root.glob(p), None) for p in _FULL_ADE):
            message = f'the full release of ADE20K, not the benchmark: there is no {folder}'
            report.add('ade-full-release', root, message)
            continue
        depth = len(Path(folder).parts)
        nested = [found.parents[depth - 1] for found in sorted(root.glob(f'*/{folder}'))] if depth else []
        fix = f'Did you mean --data-root {shlex.quote(str(nested[0]))}?' if nested else ''
        report.add('folder-missing', root / folder, f'no such folder {content}', fix=fix)


def check_pairs(report: DatasetReport, dataset: dict, scope: str, num_classes: int | None) -> None:
    """List the pairs of a data set in the layout of mmsegmentation, as the data set itself does.

    Args:
        report: Receives findings, samples, label format and class names.
        dataset: Config of a data set whose folders exist.
        scope: Default scope of the config.
        num_classes: Number of classes of the model; None does not check label ids.
    """
    try:
        built, infos = _build(dataset, scope)
    except Exception as error:  # data sets of any package
        report.add('dataset-invalid', report.key, f'{type(error).__name__}: {error}')
        return
    prefix = dataset['data_prefix']
    images_dir = Path(report.root, prefix.get(image_key(prefix)) or '')
    report.labels_at = str(Path(report.root, prefix['seg_map_path']))
    reduces, is_subset = bool(built.reduce_zero_label), built.label_map is not None
    # The files contain the ids of all classes of the type, even if the config names a subset.
    used = built.metainfo.get('classes') or ()
    names = type(built).METAINFO['classes'] if is_subset else used
    report.class_names = {i + reduces: name for i, name in enumerate(names) if name in used}
    report.label_format = LabelFormat(len(names) if is_subset and num_classes is not None else num_classes, reduces)
    for step in dataset.get('pipeline', ()):
        with TRANSFORMS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(str(step.get('type')))
        report.is_used &= kind is None or kind.__module__.startswith(_PACKAGES)  # another transform may map the ids
        if (given := step.get('load', step).get('reduce_zero_label')) not in (None, reduces):
            message = f'reduce_zero_label={given} in the pipeline, but {reduces} in {report.type}'
            report.add('reduce-zero-pipeline', report.key, message)
    if built.seg_map_suffix.endswith(cityscapes.RAW_SUFFIX) and num_classes == len(cityscapes.IDS):
        suffix = f'seg_map_suffix={built.seg_map_suffix!r} of {report.type}'
        _report_raw_labels(report, f'{suffix} names raw label ids; the model has {num_classes} classes', [])
        return
    if not infos:
        content = f'the folder contains: {_content(images_dir)}'
        report.add('no-images', images_dir, f'no image ends with {built.img_suffix}; {content}')
        return
    existing = {path for info in infos for path in (info['img_path'], info['seg_map_path']) if Path(path).is_file()}
    of = f'of {len(infos):,} images'
    absent = [info['img_path'] for info in infos if info['img_path'] not in existing]
    _report_files(report, 'image-missing', report.root, absent, f'{of} do not exist', 'no such file')
    _check_labels_exist(report, [i['seg_map_path'] for i in infos if i['seg_map_path'] not in existing], built, of)
    if not dataset.get('ann_file'):
        _check_unused_files(report, images_dir, built, infos)
    report.samples = [
        Sample(info['img_path'], info['seg_map_path'] if info['seg_map_path'] in existing else None)
        for info in infos
        if info['img_path'] in existing
    ]


def check_image_classes(report: DatasetReport, dataset: dict, scope: str) -> None:
    """List the images of a data set of mmpretrain whose folders exist, and count those of each class."""
    try:
        built, infos = _build(dataset, scope)
        labels = Counter(int(info['gt_label']) for info in infos)
    except Exception as error:  # data sets of any package
        fix = 'If the data have other classes than the config, name them: --classes auto.'
        report.add('dataset-invalid', report.key, f'{type(error).__name__}: {error}', fix=fix)
        return
    names, folders = list(built.metainfo.get('classes') or ()), list(getattr(built, 'folder_to_idx', ()))
    report.labels_at = str(built.ann_file or built.img_prefix)
    if names != folders and set(names) == set(folders):
        message = f'folders have their classes in alphabetical order, the config has {format_list(names)}'
        report.add('classes-order', report.labels_at, message, severity='error', fix='Name them in this order.')
    if unknown := sorted(labels.keys() - set(range(len(names)))):
        message = f'labels {format_list(map(str, unknown))}: the {len(names)} names are for 0 to {len(names) - 1}'
        report.add('label-out-of-range', report.labels_at, message)
    report.class_names = dict(enumerate(names))
    report.object_counts, report.counted = {name: labels[i] for i, name in enumerate(names)}, 'images'
    absent = [info['img_path'] for info in infos if not Path(info['img_path']).is_file()]
    _report_files(report, 'image-missing', report.root, absent, f'of {len(infos):,} do not exist', 'no such file')
    report.samples = [Sample(info['img_path']) for info in infos if Path(info['img_path']).is_file()]


def _build(dataset: dict, scope: str) -> tuple[Any, list[dict]]:
    config = {**dataset, 'pipeline': [], 'lazy_init': True, 'test_mode': False}
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_', scope)) as registry:
        built = registry.build(config)
    return built, sorted(built.load_data_list(), key=lambda info: info['img_path'])


def _check_labels_exist(report: DatasetReport, missing: Sequence[str], built: Any, of: str) -> None:
    message = f'{of} have no label map'
    raw: list[str] = []
    if built.seg_map_suffix.endswith(cityscapes.TRAIN_SUFFIX):
        raw = [path.replace(cityscapes.TRAIN_SUFFIX, cityscapes.RAW_SUFFIX) for path in missing]
        raw = [path for path in raw if Path(path).is_file()]
    if raw:
        message = f'{len(missing):,} {message} (*{built.seg_map_suffix}), but {len(raw):,} have raw ids'
        _report_raw_labels(report, message, raw)
    else:
        _report_files(report, 'label-missing', report.labels_at, missing, message, 'no such file')


def _report_files(
    report: DatasetReport, code: str, folder: str | Path, paths: Sequence[str], message: str, each: str
) -> None:
    if paths:
        occurrences = tuple(Occurrence(each, path=path) for path in paths)
        report.add(code, folder, f'{len(paths):,} {message}: {format_list(paths)}', occurrences=occurrences)


def _report_raw_labels(report: DatasetReport, message: str, paths: Sequence[str]) -> None:
    occurrences = tuple(Occurrence('raw label ids', path=path) for path in paths)
    fix = f'Convert the labels: {command_line("convert_cityscapes", report.root)}'
    report.add('cityscapes-raw-labels', report.labels_at, message, occurrences=occurrences, fix=fix)


def _check_unused_files(report: DatasetReport, images_dir: Path, built: Any, infos: Sequence[dict]) -> None:
    """Report images with another suffix, which the data set ignores, and label maps without an image."""
    same_folder = str(images_dir) == report.labels_at
    used = (built.img_suffix, built.seg_map_suffix) if same_folder else (built.img_suffix,)
    names = list_dir_or_file(str(images_dir), list_dir=False, recursive=True)
    others = sorted(n for n in names if n.lower().endswith(_IMAGE_SUFFIXES) and not n.endswith(used))
    paths, each = [str(images_dir / name) for name in others], f'not end with {built.img_suffix}'
    _report_files(report, 'suffix-ignored', images_dir, paths, f'images do {each} and are ignored', f'does {each}')
    names = list_dir_or_file(report.labels_at, list_dir=False, suffix=built.seg_map_suffix, recursive=True)
    labels = {str(Path(report.labels_at, name)) for name in names} - {info['seg_map_path'] for info in infos}
    message = 'label maps have no image'
    _report_files(report, 'label-without-image', report.labels_at, sorted(labels), message, 'no image')


def _content(folder: Path) -> str:
    """The first files and folders in a folder."""
    return format_list(sorted(path.name for path in folder.iterdir())) or 'nothing'
