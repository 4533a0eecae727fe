"""The data sets in a config: where they stand, what class each is, what its arguments are."""
import inspect
from collections.abc import Iterator

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from replk_mm.errors import UserError


def datasets_of(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[ConfigDict]:
    """The leaf datasets of the data loaders, wrappers (repeat, concatenate) opened."""
    for _, dataset in placed_datasets(cfg, splits):
        yield dataset


def placed_datasets(cfg: Config, splits: tuple[str, ...] = ('train', 'val', 'test')) -> Iterator[tuple[str, ConfigDict]]:
    """As :func:`datasets_of`, with the path of each, such as ``train_dataloader.dataset.dataset``."""
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader:
            yield from _leaves(loader['dataset'], f'{split}_dataloader.dataset')


def _leaves(dataset: ConfigDict, path: str) -> Iterator[tuple[str, ConfigDict]]:
    inner = [(f'{path}.dataset', part) for part in as_list(dataset.get('dataset'))]
    inner += [(f'{path}.datasets.{i}', part) for i, part in enumerate(as_list(dataset.get('datasets')))]
    if not inner:
        yield path, dataset
    for place, part in inner:
        yield from _leaves(part, place)


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
    """Whether a data set reads COCO's instance annotations."""
    # The panoptic ones have their objects a level deeper, and an index of their own.
    index = getattr(dataset_class(dataset, scope), 'COCOAPI', None)
    return index is not None and all('Panoptic' not in kind.__name__ for kind in index.__mro__) and (
        str(dataset.get('ann_file') or '').endswith('.json'))
