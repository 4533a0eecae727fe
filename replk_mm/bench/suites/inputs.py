"""Input of a measurement: the config of a row, its weights, and the data set of a split."""

import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from replk_mm.bench.schema import fingerprint
from replk_mm.bench.suites.task import Task
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint, read_checkpoint
from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import dataset_class, dataset_option, datasets_of, is_coco_style
from replk_mm.engine.config import load_config, set_data_root
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import UserError


def load_task_config(task: Task) -> Config:
    """The config of a row, with its data root."""
    cfg = load_config(task.config, task.row.options)
    if task.data_root:
        set_data_root(cfg, task.data_root)
    return cfg


def find_weights(task: Task) -> str | None:
    """Path, URL or ``hf-hub:`` name of a row's trained weights; None for random weights.

    Raises:
        UserError: If the file is missing or cannot be downloaded.
    """
    if task.row.trains:
        folder = task.folder / 'train'
        last = last_checkpoint(folder) if folder.is_dir() else None
        if task.row.protocol == 'linear' and (folder / 'linear.pth').is_file():
            last = str(folder / 'linear.pth')
        if last is None:
            raise UserError(f'{folder}: no checkpoint\nRemove {task.folder} and its records to train again.')
        return last
    if task.checkpoint:
        fetch_checkpoint(task.checkpoint)
    return task.checkpoint


def describe_weights(task: Task) -> dict[str, Any] | None:
    """The ``checkpoint`` field of records; None for random weights."""
    path = find_weights(task)
    if path is None:
        return None
    file = fetch_checkpoint(path)
    meta = read_checkpoint(file).get('meta') or {}
    return dict(path=path, sha256=hash_checkpoint(file), iteration=meta.get('iter'), trained=task.row.trains)


def describe_split(cfg: Config, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The images and labels of a split.

    Args:
        cfg: With its data root set.
        split: ``'val'`` or ``'test'``.

    Returns:
        For the protocol: name of the data root, SHA-256 of names and sizes of all files, number of images. For the
        facts: :func:`dataset_layout`.
    """
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    files: list[tuple[str, int]] = []
    images = 0
    for dataset in datasets_of(cfg, (split,)):
        root = str(dataset.get('data_root') or '.')
        built = DATASETS.build({**dataset, 'pipeline': []})
        images += len(built)
        info = [built.get_data_info(i) for i in range(len(built))]
        paths = [one.get(key) for one in info for key in ('img_path', 'seg_map_path')]
        files += sorted(
            (os.path.relpath(path, root), Path(path).stat().st_size)
            for path in (*paths, getattr(built, 'ann_file', ''))
            if path and Path(path).is_file()
        )
    return dict(root=Path(root).name, sha256=fingerprint(files), images=images), dataset_layout(dataset, scope)


def dataset_layout(dataset: dict, scope: str) -> dict[str, Any]:
    """Folders of a data set's images and labels, and the meaning of its labels; plain data for reports."""
    root = str(dataset.get('data_root') or '.')
    kind: Any = dataset_class(dataset, scope)
    prefix = dataset_option(dataset, kind, 'data_prefix', {}) or {}
    coco = is_coco_style(dataset, scope)
    annotations = dataset['ann_file'] if coco else None
    if annotations and Path(annotations).is_absolute():
        annotations = os.path.relpath(annotations, root)
    classes = list(classes_of(dataset, scope) or ())
    label_map = kind.get_label_map(classes or None) if hasattr(kind, 'get_label_map') else None
    palette = (dataset.get('metainfo') or {}).get('palette') or getattr(kind, 'METAINFO', {}).get('palette') or ()
    return dict(
        root=str(Path(root).resolve()),
        images=prefix.get('img_path') or prefix.get('img'),
        labels=None if coco else prefix.get('seg_map_path'),
        image_suffix=None if coco else dataset_option(dataset, kind, 'img_suffix', '.jpg'),
        label_suffix=None if coco else dataset_option(dataset, kind, 'seg_map_suffix', '.png'),
        annotations=annotations,
        classes=classes,
        palette=[list(c) for c in palette],
        ignored=0 if dataset_option(dataset, kind, 'reduce_zero_label', False) else 255,
        **(dict(label_map=label_map) if label_map else {}),
    )
