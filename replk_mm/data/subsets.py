"""Parts of the training images: nested fractions for few labels, and a hold-out on which settings are chosen."""

import copy
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from replk_mm.data.coco import annotation_path
from replk_mm.data.datasets import datasets_of, named_datasets, named_metrics
from replk_mm.errors import UserError, explain_errors
from replk_mm.logs import Note

#: Fractions of the training images, in percent; each is a part of the next.
FRACTIONS = (1, 5, 10, 25, 100)
#: Percentage of the training images that a hold-out leaves for training.
KEPT = 80


def nested_subsets(presence: np.ndarray, percents: Sequence[int], seed: int) -> list[np.ndarray]:
    """Draw nested subsets of images in which each class has its share.

    The first subset contains every class that any image has, and is larger than its percentage where it must be. The
    rest is iterative stratification (Sechidis et al., 2011, "On the stratification of multi-label data"): images of
    the rarest class are dealt out first, each to the part that lacks most of that class.

    Args:
        presence: ``(images, classes)``, whether the class is in the image.
        percents: Sizes in percent, ascending to 100; rounded up to whole images.
        seed: Equal seeds draw equal subsets.

    Returns:
        The sorted indices of the images of each subset.
    """
    images, classes = presence.shape
    shuffled = np.random.default_rng(seed).permutation(images)
    totals = presence.sum(0)
    cover: list[int] = []
    for c in np.argsort(totals, kind='stable'):
        if totals[c] and not presence[cover, c].any():
            cover.append(next(i for i in shuffled if presence[i, c]))
    ends = np.maximum([-(-images * percent // 100) for percent in percents], len(cover))
    room = np.diff(ends, prepend=0)  # images that each part, the difference of two subsets, still takes
    lacking = np.outer(room / max(images, 1), totals)  # and of each class
    left, part = totals.copy(), np.full(images, -1)

    def put(image: int, into: int) -> None:
        part[image] = into
        room[into] -= 1
        lacking[into] -= presence[image]
        left[presence[image]] -= 1

    for image in cover:
        put(image, 0)
    while left.any():
        rarest = np.argmin(np.where(left > 0, left, images + 1))
        for image in shuffled[(part[shuffled] < 0) & presence[shuffled, rarest]]:
            put(image, int(max(np.flatnonzero(room), key=lambda p: (lacking[p, rarest], room[p]))))
    part[shuffled[part[shuffled] < 0]] = np.repeat(np.arange(len(room)), room)  # images without a class
    return [np.flatnonzero(part <= last) for last in range(len(percents))]


def split_hold_out(presence: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of :data:`KEPT` percent of images ``(images, classes)`` to train on, and of the others, at least one."""
    share = min(KEPT, 100 * (len(presence) - 1) // len(presence))
    chosen, everything = nested_subsets(presence, (share, 100), seed)
    return chosen, np.setdiff1d(everything, chosen)


def class_presence(dataset: dict, scope: str) -> tuple[np.ndarray, list[str]]:
    """Which classes each image of a data set has, ``(images, classes)``, and the path of each image.

    Args:
        dataset: Its config. Label maps are read through the loading step of its pipeline.
        scope: Default scope of the config.

    Raises:
        UserError: If a label map cannot be read.
    """
    init_default_scope(scope)
    loads = [step for step in dataset.get('pipeline', ()) if str(step.get('type')).endswith('LoadAnnotations')]
    built: Any = DATASETS.build({**dataset, 'pipeline': []})
    read: Any = type(built.pipeline)(loads)
    present = np.zeros((len(built), len(built.metainfo.get('classes') or ())), bool)

    def look(i: int) -> str:
        info = built.get_data_info(i)
        if 'instances' in info:
            present[i, [one['bbox_label'] for one in info['instances'] if not one.get('ignore_flag')]] = True
        elif 'gt_label' in info:
            present[i, info['gt_label']] = True
        elif info.get('seg_map_path'):
            with explain_errors(info['seg_map_path'], 'Replace the file, or remove it and its image.'):
                labels = read(info)['gt_seg_map']
            present[i] = np.bincount(labels.ravel(), minlength=present.shape[1])[: present.shape[1]] > 0
        return os.path.relpath(info['img_path'], dataset.get('data_root') or '.')

    with ThreadPoolExecutor() as pool:
        return present, list(pool.map(look, range(len(built))))


def use_subset(cfg: Config, percent: int, seed: int, hold_out: bool = False) -> list[str]:
    """Train on a part of the images: set ``indices`` of the training data, and describe it in ``cfg.training_images``.

    Args:
        cfg: Changed in place; with data root and classes set.
        percent: One of :data:`FRACTIONS`.
        seed: Of the choice; the same for every network that is to be compared.
        hold_out: Train on :data:`KEPT` percent of these images, and validate on the others instead of the validation
            images.

    Returns:
        A line for each data set.

    Raises:
        UserError: If the data are a part already, or cannot be read; and for a hold-out of several data sets.
    """
    scope = cfg.get('default_scope', 'mmengine')
    found = list(named_datasets(cfg, ('train',)))
    if hold_out and len(found) != 1:
        raise UserError(f'{cfg.filename}: a hold-out needs one training data set; there are {len(found)}')
    notes: list[str] = []
    described = []
    for path, dataset in found:
        if dataset.get('indices') is not None:
            raise UserError(f'{path}.indices: selects images already\nRemove it, or omit the fraction.')
        present, names = class_presence(dataset, scope)
        kept = nested_subsets(present, FRACTIONS, seed)[FRACTIONS.index(percent)]
        if hold_out:
            chosen, held = split_hold_out(present[kept], seed)
            _validate_on(cfg, dataset, kept[held])
            kept = kept[chosen]
        dataset['indices'] = kept.tolist()
        digest = hashlib.sha256('\n'.join(sorted(names[i] for i in kept)).encode()).hexdigest()
        described.append(dict(images=len(kept), of=len(names), names_sha256=digest))
        text = f'training images: {len(kept)} of {len(names)} ({percent} %, seed {seed})'
        notes.append(Note(text + (f'; {100 - KEPT} % of them are held out for validation' if hold_out else '')))
    cfg.training_images = dict(percent=percent, seed=seed, hold_out=hold_out, datasets=described)
    return notes


def _validate_on(cfg: Config, dataset: dict, indices: np.ndarray) -> None:
    """Validate on training images."""
    if not len(indices):
        raise UserError(f'{cfg.filename}: too few training images for a hold-out\nUse a larger fraction.')
    pipeline = next(datasets_of(cfg, ('val',))).get('pipeline', [])
    held = ConfigDict({**dataset, 'pipeline': pipeline, 'indices': indices.tolist()})
    # The test loader and its metric may be the same objects.
    cfg.val_dataloader = ConfigDict({**cfg.val_dataloader, 'dataset': held})
    cfg.val_evaluator = copy.deepcopy(cfg.val_evaluator)
    for metric in named_metrics(cfg, 'val').values():
        if metric.get('ann_file'):
            metric['ann_file'] = str(annotation_path(Path(dataset.get('data_root') or '', dataset['ann_file'])))
