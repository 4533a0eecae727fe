"""The data sets of a config, each with what a run does with it, and which of them read the same files."""
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from replk_mm.data import coco_checks
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.datasets import as_list, dataset_class, dataset_option, placed_datasets, placed_metrics
from replk_mm.data.problems import Problem

_TRAIN = 'train'


class Files(NamedTuple):
    """What tells the files that a data set reads from those of others: folders, the list of them, suffixes."""

    folders: tuple[tuple[str, str], ...]
    listed: str
    image_suffix: str
    label_suffix: str


@dataclass(frozen=True)
class Leaf:
    """A data set that wraps no other.

    Attributes:
        place: Where it stands in the config.
        split: ``'train'``, ``'val'`` or ``'test'``.
        config: Its own.
        metrics: Configs of what is measured on it; None if it is trained with.
        files: The same for all that read the same files.
        rules: The same for all whose label ids mean the same.
        key: The same where also the same is asked of them: one may be trained with and scored, which asks more of it.
        suffixes: Of the images that some data set reads in its folder, if it goes by suffixes.
        repeats: Place of one that is trained with, if this one is not and reads the same files; else empty.
    """

    place: str
    split: str
    config: dict
    metrics: list | None
    files: Files
    rules: tuple
    key: str
    suffixes: tuple[str, ...]
    repeats: str = ''


def leaves(cfg: Config, splits: Sequence[str]) -> list[Leaf]:
    """The data sets of some splits, wrappers (repeat, concatenate) opened.

    Raises:
        UserError: If there is no such type of data sets.
    """
    scope = cfg.get('default_scope', 'mmengine')
    placed = [(split, place, dataset, files_of(dataset, scope)) for split in splits
              for place, dataset in placed_datasets(cfg, (split,))]
    suffixes: dict[str, set[str]] = defaultdict(set)
    trained: dict[Files, str] = {}
    for split, place, dataset, files in placed:
        suffixes[_image_folder(dataset)].update([files.image_suffix] if files.image_suffix else [])
        if split == _TRAIN:
            trained.setdefault(files, place)
    found = []
    for split, place, dataset, files in placed:
        metrics = None if split == _TRAIN else list(placed_metrics(cfg, split).values())
        use = use_of(dataset, scope, metrics) if annotation_file(dataset) else None
        rules = (dataset_class(dataset, scope), dataset.get('reduce_zero_label'),
                 str((dataset.get('metainfo') or {}).get('classes')))
        found.append(Leaf(place, split, dataset, metrics, files, rules, str((files, rules, use)),
                          tuple(sorted(suffixes[_image_folder(dataset)])), '' if split == _TRAIN else trained.get(files, '')))
    return found


def files_of(dataset: dict, scope: str) -> Files:
    """What a data set reads."""
    builder = dataset_class(dataset, scope)
    folders = sorted((key, _resolved(dataset, value)) for key, value in (dataset.get('data_prefix') or {}).items())
    return Files(tuple(folders), _resolved(dataset, dataset['ann_file']) if dataset.get('ann_file') else '',
                 *(str(dataset_option(dataset, builder, key, '')) for key in ('img_suffix', 'seg_map_suffix')))


def _image_folder(dataset: dict) -> str:
    prefix = dataset.get('data_prefix') or {}
    return _resolved(dataset, prefix.get('img_path', prefix.get('img', '')))


def _resolved(dataset: dict, value: str | None) -> str:
    return os.path.realpath(Path(dataset.get('data_root') or '.') / (value or ''))


def same_data(found: Sequence[Leaf]) -> list[Problem]:
    """What to say of data that are validated or tested on, and trained with."""
    return [Problem('same-data', leaf.place, f'reads the same files as {leaf.repeats}') for leaf in found if leaf.repeats]


def use_of(dataset: dict, scope: str, metrics: Sequence[dict] | None) -> coco_checks.Use:
    """What a run does with the annotation file of a data set.

    Args:
        dataset: Its config.
        scope: Default scope of the config.
        metrics: Configs of what is measured on it; None if it is trained with.
    """
    filters = dataset.get('filter_cfg') or {}
    scored = [m for m in metrics or () if str(m.get('type')).endswith('CocoMetric') and not m.get('format_only')]
    masks = any('segm' in as_list(m.get('metric', 'bbox')) for m in scored) or any(
        step.get('load', step).get('with_mask') for step in dataset.get('pipeline', ()) if isinstance(step, dict))
    return coco_checks.Use(
        train=metrics is None, masks=masks, scored=bool(scored), own_file=any(m.get('ann_file') for m in scored),
        classes=classes_of(dataset, scope) if (dataset.get('metainfo') or {}).get('classes') else None,
        keep_empty=not filters.get('filter_empty_gt', False), min_size=filters.get('min_size', 0))
