"""Test a row: the metric that ranks it, and the protocol under which metrics may be ranked."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank

from replk_mm.analysis.config_complexity import build_on_meta, reparameterize_on_meta
from replk_mm.bench import records
from replk_mm.bench.suites.inputs import describe_split, describe_weights, find_weights, load_task_config
from replk_mm.bench.suites.progress_hook import add_progress_hook
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.worker import MeasurementResult
from replk_mm.data.datasets import as_list, datasets_of
from replk_mm.engine.evaluate import Evaluation, evaluate
from replk_mm.engine.process import RunOptions
from replk_mm.engine.record import describe_protocol, evaluation_record, write_record
from replk_mm.errors import UserError

#: The metric that ranks rows, with its unit: the first that a test reports.
PRIMARY_METRICS = {'mIoU': '%', 'coco/bbox_mAP': 'AP'}


def metric(task: Task) -> MeasurementResult:
    """Test the row's weights, and once more reparameterized where there are kernels to merge.

    Raises:
        UserError: If the data or weights do not fit, or the metric is not finite.
    """
    checkpoint = find_weights(task)
    assert checkpoint
    cfg, found = _test(task, checkpoint, False)
    metrics = _finite(found.metrics)
    primary = next((name for name in PRIMARY_METRICS if name in metrics), None)
    if primary is None:
        raise UserError(f'{task.config}: the test reports none of {", ".join(PRIMARY_METRICS)}: {", ".join(metrics)}')
    if metrics[primary] is None:
        raise UserError(f'{primary} is not a finite number\nThe test labels may contain none of the classes.')
    values: dict[str, Any] = dict(
        metrics=metrics,
        images=found.images,
        primary=primary,
        unit=PRIMARY_METRICS[primary],
        per_class={name: _finite(of) for name, of in found.per_class.items()},
    )
    out = task.folder / 'test'
    if get_rank() == 0:
        write_record(evaluation_record(cfg, checkpoint, found, False), out / 'metrics.json')
    merged = reparameterize_on_meta(build_on_meta(load_task_config(task)))[1].merged
    if merged and not found.meta.get('replk_mm', {}).get('reparameterized'):
        values['reparameterized'] = dict(metrics=_finite(_test(task, checkpoint, True)[1].metrics))
    data, where = describe_split(cfg, 'test')
    root, work_dir = Path(where['root']), task.work_dir.resolve()
    if root.is_relative_to(work_dir):  # stays valid when results are copied
        where['root'] = str(root.relative_to(work_dir))
    return MeasurementResult(
        values,
        metric_protocol(task, cfg, data),
        dict(
            data=where, loaded=found.load, seconds=found.seconds, notes=found.notes, test=describe_protocol(cfg, False)
        ),
        dict(predictions=out / 'predictions', metrics=out / 'metrics.json'),
    )


def _test(task: Task, checkpoint: str, reparam: bool) -> tuple[Config, Evaluation]:
    cfg = load_task_config(task)
    add_progress_hook(cfg, task.folder / 'test' / 'progress.json')
    options = RunOptions(
        data_root=task.data_root, work_dir=str(task.folder / 'test_logs'), launcher=task.launcher, device=task.device
    )
    return cfg, evaluate(
        cfg, checkpoint, options, reparam=reparam, predictions=None if reparam else task.folder / 'test' / 'predictions'
    )


def _finite(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics in percent, also of COCO; None for values that are not finite, as AP of an absent object size."""
    return {
        name: (100 * value if 'mAP' in name else value) if math.isfinite(value) else None
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name not in ('data_time', 'time')
    }


def metric_protocol(task: Task, cfg: Config, data: dict[str, Any]) -> dict[str, Any]:
    """The conditions that must be equal for two metrics to be ranked.

    Args:
        task: The row.
        cfg: Its config as it was tested.
        data: From :func:`describe_split`.
    """
    trained = records.latest_records(task.results).get('train', {}).get('protocol', {})
    test_cfg = cfg.model.get('test_cfg') or {}
    iteration = None if task.row.trains else (describe_weights(task) or {}).get('iteration')
    steps = [step.get('load', step) for step in as_list(next(datasets_of(cfg, ('test',))).get('pipeline', []))]
    scales = [
        {key: step[key] for key in ('scale', 'scale_factor', 'keep_ratio') if key in step}
        for step in steps
        if 'Resize' in str(step.get('type'))
    ]
    return dict(
        task='detection' if cfg.get('default_scope') == 'mmdet' else 'segmentation',
        data=data,
        mode=test_cfg.get('mode', 'whole'),
        **{key: list(test_cfg[key]) for key in ('crop_size', 'stride') if key in test_cfg},
        scales=scales,
        tta=False,
        crop=trained.get('crop'),
        iterations=trained.get('iterations', iteration),
        batch=trained.get('batch'),
        samples_seen=trained.get('samples_seen'),
        pretraining=trained.get('pretraining', task.pretraining),
        precision=trained.get('precision'),
    )
