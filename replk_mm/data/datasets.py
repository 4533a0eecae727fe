"""The data sets and metrics in a config: where they stand, what class each is, what its arguments are."""
import inspect
import os
from collections.abc import Iterator, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from replk_mm.errors import UserError

#: What the fields of a data set and of a metric are, as far as they are read here: kinds, and how to write one.
_PATH: tuple[tuple[type, ...], str] = ((str, os.PathLike), 'one path as text')
_DATASET: dict[str, tuple[tuple[type, ...], str]] = {
    'data_root': _PATH, 'ann_file': _PATH,
    'data_prefix': ((dict,), "dict(img_path='...', seg_map_path='...'), or dict(img='...') with annotation files"),
    'metainfo': ((dict,), "dict(classes=('...',))"), 'filter_cfg': ((dict,), 'dict(filter_empty_gt=True, min_size=32)')}
_METRIC = {'ann_file': _PATH}


def datasets_of(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[ConfigDict]:
    """The leaf datasets of the data loaders, wrappers (repeat, concatenate) opened."""
    for _, dataset in placed_datasets(cfg, splits):
        yield dataset


def placed_datasets(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[tuple[str, ConfigDict]]:
    """As :func:`datasets_of`, with the path of each, such as ``train_dataloader.dataset.dataset``.

    Raises:
        UserError: If one, or a field of it that is read here, is of another kind than data sets have there.
    """
    for split in splits:
        place = f'{split}_dataloader'
        loader = cfg.get(place)
        if loader:
            _check(place, loader, (dict,), "dict(batch_size=..., dataset=dict(type='...', ...))")
            if 'dataset' not in loader:
                raise UserError(f'{place}.dataset is missing; there are {", ".join(loader)}\n'
                                f"Write {place}.dataset=dict(type='...', ...).")
            yield from _leaves(loader['dataset'], f'{place}.dataset')


def _leaves(dataset: ConfigDict, path: str) -> Iterator[tuple[str, ConfigDict]]:
    _check(path, dataset, (dict,), "dict(type='...', data_root='...', ...)")
    inner = [(f'{path}.dataset', part) for part in as_list(dataset.get('dataset'))]
    inner += [(f'{path}.datasets.{i}', part) for i, part in enumerate(as_list(dataset.get('datasets')))]
    if not inner:
        _check_fields(path, dataset, _DATASET)
        for key, folder in (dataset.get('data_prefix') or {}).items():
            if folder is not None:
                _check(f'{path}.data_prefix.{key}', folder, *_PATH)
        yield path, dataset
    for place, part in inner:
        yield from _leaves(part, place)


def placed_metrics(cfg: Config, split: str) -> dict[str, ConfigDict]:
    """Configs of what is measured on a split, by their path; none on the one that is trained with.

    Raises:
        UserError: As :func:`placed_datasets`.
    """
    key = f'{split}_evaluator'
    evaluator = cfg.get(key)
    metrics = {f'{key}.{i}' if isinstance(evaluator, (list, tuple)) else key: metric
               for i, metric in enumerate(as_list(evaluator))}
    for place, metric in metrics.items():
        _check(place, metric, (dict,), "dict(type='...', ...)")
        if 'metrics' not in metric:  # which mmengine takes for an evaluator, of a type that need not be said
            _check_fields(place, metric, _METRIC)
    return metrics


def _check_fields(place: str, config: dict, fields: dict[str, tuple[tuple[type, ...], str]]) -> None:
    if config.get('type') is None:
        raise UserError(f'{place} has no type; it has {", ".join(config) or "nothing"}\n'
                        f'Set {place}.type, the name of its class.')
    for key, (kinds, written) in fields.items():
        if config.get(key) is not None:
            _check(f'{place}.{key}', config[key], kinds, written)


def _check(place: str, value: object, kinds: tuple[type, ...], written: str) -> None:
    if not isinstance(value, kinds):
        raise UserError(f'{place}={value!r}: a {type(value).__name__}\nWrite it as {written}.')


def as_list(value) -> list:
    """``value`` as a list: itself, of one, or empty for None."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


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


def dataset_option(dataset: dict, builder: type, key: str, fallback):
    """An argument of a data set: as its config says, or its type's default, or ``fallback``."""
    if key in dataset:
        return dataset[key]
    for owner in builder.__mro__:
        given = inspect.signature(vars(owner)['__init__']).parameters if '__init__' in vars(owner) else {}
        if key in given:
            return fallback if given[key].default is inspect.Parameter.empty else given[key].default
    return fallback


def coco_style(dataset: dict, scope: str) -> bool:
    """Whether a data set reads COCO's instance annotations, and its images by the names that stand there."""
    kind = dataset_class(dataset, scope)
    index = getattr(kind, 'COCOAPI', None)
    if index is None or not str(dataset.get('ann_file') or '').endswith('.json'):
        return False
    # The panoptic ones have their objects a level deeper, and an index of their own.
    if any('Panoptic' in base.__name__ for base in index.__mro__):
        return False
    # LVIS, Objects365 and whoever else lists images in a way of their own: they make other names of those in the file.
    reader = next((base for base in kind.__mro__ if 'load_data_list' in vars(base)), None)
    return reader is not None and (reader.__module__, reader.__name__) == ('mmdet.datasets.coco', 'CocoDataset')


def crop_of(cfg: Config) -> tuple[int, int] | None:
    """Training crop in pixels (height, width), or what images are resized to at most; None if the config has neither."""
    size = cfg.model.get('data_preprocessor', {}).get('size') or cfg.get('crop_size')
    if size is None:
        scales = [scale for dataset in datasets_of(cfg, ('train',)) for scale in _last_scales(dataset.get('pipeline', ()))]
        if not scales:
            return None
        # Images keep their aspect and may lie or stand; more of them lie.
        size = max(min(scale) for scale in scales), max(max(scale) for scale in scales)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _last_scales(pipeline: Sequence) -> list[tuple[int, int]]:
    """Sizes that the last resizing or cropping step of a pipeline can give; of every branch, if there are several."""
    for step in reversed(pipeline):
        if isinstance(step, (list, tuple)):  # a branch, as all steps of this list are
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
    pairs = [(scales, scales)] if isinstance(scales, (int, float)) else (
        [scales] if isinstance(scales[0], (int, float)) else scales)
    return [(int(a * largest), int(b * largest)) for a, b in pairs]
