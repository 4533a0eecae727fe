"""Find the data sets and metrics in a config, their types and their arguments."""

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from replk_mm.errors import UserError

#: What models of a library do, by the default scope of their configs.
TASKS = {'mmseg': 'segmentation', 'mmdet': 'detection', 'mmpretrain': 'classification'}


def task_of(cfg: Config) -> str:
    """One of :data:`TASKS`; ``'segmentation'`` for configs of other scopes."""
    return TASKS.get(cfg.get('default_scope', ''), 'segmentation')


def datasets_of(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[ConfigDict]:
    """The data sets of the data loaders, without wrappers (repeat, concatenate)."""
    for _, dataset in named_datasets(cfg, splits):
        yield dataset


def named_datasets(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[tuple[str, ConfigDict]]:
    """The data sets with their paths in the config, such as ``train_dataloader.dataset.dataset``.

    Raises:
        UserError: If an entry is no data set.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader:
            dataset = loader.get('dataset') if isinstance(loader, dict) else loader
            yield from _leaves(dataset, f'{split}_dataloader.dataset')


def _leaves(dataset: Any, path: str) -> Iterator[tuple[str, ConfigDict]]:
    if not isinstance(dataset, dict) or 'type' not in dataset:
        raise UserError(f'{path}={dataset!r:.80}: not a data set\nWrite {path}=dict(type=..., data_root=..., ...).')
    inner = [(f'{path}.dataset', part) for part in as_list(dataset.get('dataset'))]
    inner += [(f'{path}.datasets.{i}', part) for i, part in enumerate(as_list(dataset.get('datasets')))]
    if not inner:
        yield path, dataset
    for key, part in inner:
        yield from _leaves(part, key)


def named_metrics(cfg: Config, split: str) -> dict[str, ConfigDict]:
    """The metrics of a split by their paths in the config.

    Raises:
        UserError: If an entry is no metric.
    """
    key = f'{split}_evaluator'
    evaluator = cfg.get(key)
    is_list = isinstance(evaluator, (list, tuple))
    metrics = {f'{key}.{i}' if is_list else key: metric for i, metric in enumerate(as_list(evaluator))}
    for path, metric in metrics.items():
        if not isinstance(metric, dict):
            raise UserError(f'{path}={metric!r:.80}: not a metric\nWrite {path}=dict(type=..., ...).')
    return metrics


def as_list(value) -> list:
    """``value`` as a list: empty for None, of one item if it is no list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def dataset_class(dataset: dict, scope: str) -> type:
    """The Python class of a data set.

    Raises:
        UserError: If its ``type`` is unknown.
    """
    init_default_scope(scope)
    # `DATASETS.get` does not search the default scope, whose data sets may not be imported yet.
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_', scope)) as registry:
        found = registry.get(dataset['type'])
    if found is None:
        raise UserError(
            f'data set type {dataset["type"]!r}: unknown in {scope} (data root {dataset.get("data_root")})\n'
            f'Check its spelling, and that its package is installed.'
        )
    return found


def dataset_option(dataset: dict, builder: type, key: str, fallback):
    """An argument of a data set: from its config, else the default of its type, else ``fallback``."""
    if key in dataset:
        return dataset[key]
    for owner in builder.__mro__:
        given = inspect.signature(vars(owner)['__init__']).parameters if '__init__' in vars(owner) else {}
        if key in given:
            return fallback if given[key].default is inspect.Parameter.empty else given[key].default
    return fallback


def images_root(cfg: Config) -> str:
    """The folder of all test images; predictions are written to the same subfolders."""
    return os.path.commonpath(
        Path(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('img_path') or '').resolve()
        for dataset in datasets_of(cfg, ('test',))
    )


def is_coco_style(dataset: dict, scope: str) -> bool:
    """Whether a data set reads instance annotations of COCO, and images by the file names in them."""
    kind = dataset_class(dataset, scope)
    index = getattr(kind, 'COCOAPI', None)
    if (
        index is None
        or 'Panoptic' in index.__name__
        or not str(dataset.get('ann_file')).endswith(('.json', '.json.gz'))
    ):
        return False
    # Others (LVIS, Objects365) have their own loader, which changes the file names.
    reader = next((base for base in kind.__mro__ if 'load_data_list' in vars(base)), None)
    return reader is not None and reader.__module__ in ('mmdet.datasets.coco', 'replk_mm.data.coco_dataset')


def has_own_index(dataset: dict, scope: str) -> bool:
    """Whether a data set in COCO's style reads its file with :func:`replk_mm.data.coco.read_annotations`."""
    return dataset_class(dataset, scope).COCOAPI.__module__.startswith('replk_mm.')  # type: ignore[attr-defined]


def is_classification(dataset: dict, scope: str) -> bool:
    """Whether the images of a data set have a class each, as those of mmpretrain."""
    return hasattr(dataset_class(dataset, scope), 'get_gt_labels')


def crop_of(cfg: Config) -> tuple[int, int] | None:
    """Training crop (height, width), or else the largest size of resized images, pixels; None if not configured."""
    size = cfg.model.get('data_preprocessor', {}).get('size') or cfg.get('crop_size')
    if size is None:
        scales = [
            scale for dataset in datasets_of(cfg, ('train',)) for scale in _last_scales(dataset.get('pipeline', ()))
        ]
        if not scales:
            return None
        # Images keep their aspect ratio; most are landscapes.
        size = max(min(scale) for scale in scales), max(max(scale) for scale in scales)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _last_scales(pipeline: Sequence) -> list[tuple[int, int]]:
    """Sizes of the last resizing or cropping step of a pipeline, of all its branches."""
    for step in reversed(pipeline):
        if isinstance(step, (list, tuple)):  # the pipeline is a list of branches
            found = [scale for branch in pipeline for scale in _last_scales(branch)]
        elif 'transforms' in step:
            found = _last_scales(step['transforms'])
        else:
            found = _scales_of(step)
        if found:
            return found
    return []


def _scales_of(step: dict) -> list[tuple[int, int]]:
    kind = str(step.get('type'))
    if kind.endswith('RandomCrop') and step.get('crop_type', 'absolute') == 'absolute':
        scales = step.get('crop_size')
    else:
        scales = (step.get('scales') or step.get('scale')) if 'Resize' in kind else None
    if not scales:
        return []
    largest = max(step.get('ratio_range') or (1,))
    pairs = (
        [(scales, scales)]
        if isinstance(scales, (int, float))
        else ([scales] if isinstance(scales[0], (int, float)) else scales)
    )
    return [(int(a * largest), int(b * largest)) for a, b in pairs]
