"""Testing a row of a suite: its metric as ``tools/test.py`` finds it, and the protocol under which it was found."""
import math
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.registry import DATASETS, init_default_scope

from replk_mm.analysis import complexity_config
from replk_mm.bench import records
from replk_mm.bench.suites.row import Found
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.training import checkpoint_record, config_of
from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import as_list, coco_style, dataset_class, dataset_option, datasets_of
from replk_mm.engine import results
from replk_mm.engine.config import set_data_root
from replk_mm.engine.evaluate import Evaluation, evaluate
from replk_mm.engine.machine import Options
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import UserError

#: What decides, with its unit, by what a test reports.
PRIMARY = {'mIoU': '%', 'coco/bbox_mAP': 'AP'}
#: Of a report, what is no metric.
_ASIDE = ('data_time', 'time')


def weights_of(task: Task) -> str | None:
    """The row's trained weights; None if it has random ones.

    Raises:
        UserError: If they are not there.
    """
    if task.trains:
        last = last_checkpoint(task.folder / 'train') if (task.folder / 'train').is_dir() else None
        if last is None:
            raise UserError(f'{task.folder / "train"}: no checkpoint\nRemove {task.folder} and {task.results} to train again.')
        return last
    if task.checkpoint and '://' not in task.checkpoint and not Path(task.checkpoint).is_file():
        raise UserError(f'{task.checkpoint}: no such checkpoint\nPut the weights of {task.row} there, or name others in the '
                        f"row's checkpoint.")
    return task.checkpoint


def weights_record(task: Task) -> dict[str, Any] | None:
    """What records say of the row's weights; None for random ones."""
    path = weights_of(task)
    return checkpoint_record(path, task.trains) if path else None


def metric(task: Task) -> Found:
    """Test the row's weights, and once more with parallel kernels merged where there are some.

    Raises:
        UserError: If something stands in the way, or the metric is no number.
    """
    checkpoint = weights_of(task)
    assert checkpoint
    out = task.folder / 'test'
    cfg, found = _test(task, checkpoint, False)
    primary = next((name for name in PRIMARY if name in found.metrics), None)
    if primary is None:
        raise UserError(f'{task.config}: the test reports none of {", ".join(PRIMARY)}: {", ".join(found.metrics)}')
    values: dict[str, Any] = dict(metrics=_metrics(found), per_class=_per_class(found), images=found.images, primary=primary,
                  unit=PRIMARY[primary])
    if values['metrics'][primary] is None:
        raise UserError(f'{primary} is no number\nThe test labels may hold none of the classes.')
    if get_rank() == 0:
        results.write(results.record(cfg, checkpoint, found, False), out / 'metrics.json')
    merged = complexity_config.merge(complexity_config.build(config_of(task)))[1].merged
    if merged and not found.meta.get('replk_mm', {}).get('reparameterized'):
        values['reparameterized'] = dict(metrics=_metrics(_test(task, checkpoint, True)[1]))
    below = out.relative_to(task.work_dir)
    data, where = test_data(cfg, 'test')
    root = Path(where['root'])
    if root.is_relative_to(Path(task.work_dir).resolve()):  # goes along when results are copied
        where['root'] = str(root.relative_to(Path(task.work_dir).resolve()))
    return Found(
        values, protocol(task, cfg, data),
        dict(data=where, loaded=found.load, seconds=found.seconds, notes=found.notes, test=results.protocol(cfg, False)),
        dict(predictions=str(below / 'predictions'), metrics=str(below / 'metrics.json')),
        checkpoint_record(checkpoint, task.trains))


def _test(task: Task, checkpoint: str, reparam: bool) -> tuple[Config, Evaluation]:
    cfg = config_of(task)
    options = Options(data_root=task.data_root, work_dir=str(task.folder / 'test_logs'), launcher=task.launcher,
                      device=task.device)
    return cfg, evaluate(cfg, checkpoint, options, reparam=reparam,
                         predictions=None if reparam else task.folder / 'test' / 'predictions')


def _metrics(found: Evaluation) -> dict[str, float | None]:
    return {name: _percent(name, value) for name, value in found.metrics.items()
            if name not in _ASIDE and isinstance(value, (int, float))}


def _per_class(found: Evaluation) -> dict[str, dict[str, float | None]]:
    return {of: {name: _percent(name, value) for name, value in figures.items()} for of, figures in found.per_class.items()}


def _percent(name: str, value: float) -> float | None:
    """COCO counts from 0 to 1; what is no number, such as the AP of a size that no object has, is None."""
    if not math.isfinite(value):
        return None
    return 100 * value if 'mAP' in name else value


def protocol(task: Task, cfg: Config, data: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for two metrics to be ranked.

    Args:
        task: The row.
        cfg: Its config as it was tested.
        data: Of :func:`test_data`.
    """
    done = records.read([task.results])[0] if task.results.exists() else []
    trained: dict[str, Any] = next((record['protocol'] for record in done if record['measurement'] == 'train'), {})
    told = cfg.model.get('test_cfg') or {}
    iteration = None if task.trains else (weights_record(task) or {}).get('iteration')
    return dict(
        task='detection' if cfg.get('default_scope') == 'mmdet' else 'segmentation', data=data,
        mode=told.get('mode', 'whole'), **{key: list(told[key]) for key in ('crop_size', 'stride') if key in told},
        scales=_scales(next(datasets_of(cfg, ('test',))).get('pipeline', [])), tta=False,
        crop=trained.get('crop'), iterations=trained.get('iterations', iteration), batch=trained.get('batch'),
        samples_seen=trained.get('samples_seen'), pretraining=trained.get('pretraining', task.pretraining),
        precision=trained.get('precision'))


def _scales(steps: Any) -> list[Any]:
    found = []
    for step in as_list(steps):
        step = step.get('load', step)  # inside of our checks
        if 'Resize' in str(step.get('type')):
            found.append({key: step[key] for key in ('scale', 'scale_factor', 'keep_ratio') if key in step})
    return found


def test_data(cfg: Config, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which images and labels a split has.

    Args:
        cfg: With its data root set.
        split: ``'val'`` or ``'test'``.

    Returns:
        For the protocol: name of the data root, SHA-256 of names and sizes of all files, number of images. For the facts:
        where a report finds them, and what labels mean.
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
        named = [path for one in info for path in (one.get('img_path'), one.get('seg_map_path')) if path]
        named += [str(dataset_file) for dataset_file in [getattr(built, 'ann_file', '')] if dataset_file]
        files += sorted((os.path.relpath(path, root), Path(path).stat().st_size) for path in named if Path(path).is_file())
    return (dict(root=Path(root).name, sha256=records.fingerprint(files), images=images),
            layout(dataset, scope))


def layout(dataset: dict, scope: str) -> dict[str, Any]:
    """Where a data set has its images and labels, and what labels mean."""
    root = str(dataset.get('data_root') or '.')
    kind = dataset_class(dataset, scope)
    prefix = dataset_option(dataset, kind, 'data_prefix', {}) or {}
    info = dataset.get('metainfo') or {}
    known = getattr(kind, 'METAINFO', {})
    coco = coco_style(dataset, scope)
    return dict(
        root=str(Path(root).resolve()), images=prefix.get('img_path') or prefix.get('img'),
        labels=None if coco else prefix.get('seg_map_path'),
        image_suffix=None if coco else dataset_option(dataset, kind, 'img_suffix', '.jpg'),
        label_suffix=None if coco else dataset_option(dataset, kind, 'seg_map_suffix', '.png'),
        annotations=os.path.relpath(dataset['ann_file'], root) if coco and Path(dataset['ann_file']).is_absolute()
        else dataset['ann_file'] if coco else None,
        classes=list(classes_of(dataset, scope) or ()), palette=[list(colour) for colour in
                                                                 info.get('palette') or known.get('palette') or ()],
        ignored=0 if dataset_option(dataset, kind, 'reduce_zero_label', False) else 255)


def curve_protocol(task: Task) -> dict[str, Any]:
    """That of the metric, on the data of validation."""
    cfg = config_of(task)
    if task.data_root:
        set_data_root(cfg, task.data_root)
    return protocol(task, cfg, test_data(cfg, 'val')[0])
