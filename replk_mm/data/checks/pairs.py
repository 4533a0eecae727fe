"""Folders of a data set, and its pairs of images and label maps, before any file is opened."""
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS

from replk_mm.data import cityscapes
from replk_mm.data.checks.dataset import DataSet, Rules, Task
from replk_mm.data.problems import Item, Problem, some

_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
# What the full release of ADE20K has and the benchmark has not.
_FULL_ADE = ('index_ade20k.*', 'ADE20K_*', 'images/ADE', 'images/training/*/', 'images/training/*_seg.png')


def image_key(prefix: dict) -> str:
    """The key of the image folder in a ``data_prefix``: mmsegmentation's or mmdetection's."""
    return 'img_path' if 'img_path' in prefix else 'img'


def missing_folders(dataset: dict) -> list[Problem]:
    """The data root, annotation file and folders of a data set that do not exist."""
    root, prefix = Path(dataset.get('data_root') or '.'), dataset.get('data_prefix') or {}
    if not root.is_dir():
        return [Problem('data-root-missing', str(root), 'no such folder (the data root)')]
    problems = []
    holds = f'(the data root contains: {_content(root)})'
    if dataset.get('ann_file') and not (root / dataset['ann_file']).is_file():
        problems.append(Problem('annotation-file-missing', str(root / dataset['ann_file']), f'no such annotation file {holds}'))
    for key in (image_key(prefix), 'seg_map_path'):
        place = prefix.get(key)
        if place is None or (root / place).is_dir():
            continue
        if key == 'seg_map_path' and str(dataset['type']).endswith('ADE20KDataset') and any(
                True for pattern in _FULL_ADE for _ in root.glob(pattern)):
            problems.append(Problem('ade-full-release', str(root), 'the full release of ADE20K, not the benchmark: there is no '
                                                                   f'{place}'))
            continue
        depth = len(Path(place).parts)
        nested = [found.parents[depth - 1] for found in sorted(root.glob(f'*/{place}'))] if depth else []
        problems.append(Problem('folder-missing', str(root / place), f'no such folder {holds}', remedy=(
            f'Did you mean --data-root {shlex.quote(str(nested[0]))}?' if nested else '')))
    return problems


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
        one.problems.append(Problem('dataset-invalid', one.place, f'{type(error).__name__}: {error}'))
        return
    labels_dir = Path(one.root, dataset['data_prefix']['seg_map_path'])
    images_dir = Path(one.root, dataset['data_prefix'].get(image_key(dataset['data_prefix'])) or '')
    one.where = str(labels_dir)
    picked = built.label_map is not None
    names = type(built).METAINFO['classes'] if picked else built.metainfo.get('classes') or ()
    one.names = {i + bool(built.reduce_zero_label): name for i, name in enumerate(names)}
    # The data set maps the ids of its type's classes to those that were picked.
    count = len(names) if picked and num_classes is not None else num_classes
    one.rules = Rules(count, bool(built.reduce_zero_label))
    for step in dataset.get('pipeline', ()):
        given = step.get('load', step).get('reduce_zero_label')
        if given not in (None, built.reduce_zero_label):
            one.problems.append(Problem('reduce-zero-pipeline', one.place, f'reduce_zero_label={given} in the pipeline, but '
                                                                           f'{built.reduce_zero_label} in {one.type}'))
    if built.seg_map_suffix.endswith(cityscapes.RAW_SUFFIX) and num_classes == len(cityscapes.IDS):
        one.problems.append(_raw_labels(one, f'seg_map_suffix={built.seg_map_suffix!r} of {one.type} names raw label ids; the '
                                             f'model has {num_classes} classes', []))
        return
    if not infos:
        one.problems.append(Problem('no-images', str(images_dir), f'no image ends with {built.img_suffix}; the folder contains: '
                                                                  f'{_content(images_dir)}'))
        return
    there = {path for info in infos for path in (info['img_path'], info['seg_map_path'])
             if Path(path).is_file()}
    one.problems += _missing(one, infos, there, built.seg_map_suffix)
    if not dataset.get('ann_file'):
        one.problems += _left_over(images_dir, labels_dir, built, infos)
    one.tasks = [Task(info['img_path'], info['seg_map_path'] if info['seg_map_path'] in there else None)
                 for info in infos if info['img_path'] in there]


def _build(dataset: dict, scope: str) -> tuple[Any, list[dict]]:
    config = {**dataset, 'pipeline': [], 'lazy_init': True, 'test_mode': False}
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_', scope)) as registry:
        built = registry.build(config)
    return built, sorted(built.load_data_list(), key=lambda info: info['img_path'])


def _missing(one: DataSet, infos: Sequence[dict], there: Collection[str], label_suffix: str) -> list[Problem]:
    """Images in a list that do not exist, and images without a label map."""
    problems = []
    absent = [info['img_path'] for info in infos if info['img_path'] not in there]
    if absent:
        problems.append(Problem(
            'image-missing', one.root, f'{len(absent):,} of {len(infos):,} images do not exist: {some(absent)}',
            items=tuple(Item('no such file', path=path) for path in absent)))
    missing = [info['seg_map_path'] for info in infos if info['seg_map_path'] not in there]
    raw = [path for path in (label.replace(cityscapes.TRAIN_SUFFIX, cityscapes.RAW_SUFFIX) for label in missing)
           if Path(path).is_file()] if label_suffix.endswith(cityscapes.TRAIN_SUFFIX) else []
    if raw:
        problems.append(_raw_labels(one, f'{len(missing):,} of {len(infos):,} images have no label map '
                                         f'(*{label_suffix}), but {len(raw):,} raw ones', raw))
    elif missing:
        problems.append(Problem(
            'label-missing', one.where, f'{len(missing):,} of {len(infos):,} images have no label map: {some(missing)}',
            items=tuple(Item('no such file', path=path) for path in missing)))
    return problems


def _raw_labels(one: DataSet, found: str, paths: Sequence[str]) -> Problem:
    return Problem('cityscapes-raw-labels', one.where, found, remedy=(
        f'Convert the labels: python tools/convert_cityscapes.py {shlex.quote(one.root)}'),
        items=tuple(Item('raw label ids', path=path) for path in paths))


def _left_over(images_dir: Path, labels_dir: Path, built: Any, infos: Sequence[dict]) -> list[Problem]:
    """Images of another suffix, which the data set ignores, and label maps without an image."""
    problems = []
    ends = (built.img_suffix, built.seg_map_suffix) if images_dir == labels_dir else (built.img_suffix,)
    others = sorted(str(images_dir / name) for name in list_dir_or_file(str(images_dir), list_dir=False, recursive=True)
                    if name.lower().endswith(_IMAGES) and not name.endswith(ends))
    if others:
        problems.append(Problem(
            'suffix-ignored', str(images_dir), f'{len(others):,} images do not end with {built.img_suffix} and are ignored: '
            f'{some(others)}', items=tuple(Item(f'does not end with {built.img_suffix}', path=path) for path in others)))
    used = {info['seg_map_path'] for info in infos}
    labels = (str(labels_dir / name) for name in list_dir_or_file(
        str(labels_dir), list_dir=False, suffix=built.seg_map_suffix, recursive=True))
    lonely = sorted(path for path in labels if path not in used)
    if lonely:
        problems.append(Problem('label-without-image', str(labels_dir), f'{len(lonely):,} label maps have no image: '
                                f'{some(lonely)}', items=tuple(Item('no image', path=path) for path in lonely)))
    return problems


def _content(folder: Path) -> str:
    """The first files and folders in a folder."""
    return some(sorted(path.name for path in folder.iterdir())) or 'nothing'
