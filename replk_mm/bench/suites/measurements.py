"""The measurements of a suite, a function each: count, test, time; :data:`TABLE` names them, and the training."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank

from replk_mm import published
from replk_mm.analysis.benchmark.case import (
    OURS,
    BenchmarkCase,
    default_shape,
    load_case_config,
    min_batch_size,
    peak_memory,
    randomize_constants,
    set_input_size,
)
from replk_mm.analysis.benchmark.synthetic_batch import FLOAT32, SyntheticBatch
from replk_mm.analysis.complexity import build_on_meta, config_complexity, reparameterize_on_meta
from replk_mm.analysis.energy import energy_per_call
from replk_mm.analysis.timing import time_interleaved
from replk_mm.bench import records
from replk_mm.bench.suites.inputs import (
    dataset_layout,
    describe_split,
    describe_weights,
    find_weights,
    load_task_config,
)
from replk_mm.bench.suites.progress import add_progress_hook
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.training import PRIMARY_METRICS, describe_machine, read_curve, train
from replk_mm.bench.suites.worker import Measure, MeasurementResult
from replk_mm.data.datasets import as_list, datasets_of, task_of
from replk_mm.deploy.artefact import is_artefact, read_manifest
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.evaluate import Evaluation, evaluate
from replk_mm.engine.inference import build_for_inference
from replk_mm.engine.process import RunOptions, select_device
from replk_mm.engine.record import describe_protocol, evaluation_record, write_record, write_statistics
from replk_mm.engine.record import environment_info as environment  # noqa: F401 (the worker calls it)
from replk_mm.errors import UserError
from replk_mm.ops import prepack
from replk_mm.text import in_percent

#: Time limit in seconds of a speed measurement; slow networks take longer.
_SECONDS = 15.0
#: Largest number of rounds: of a small network, 15 would take a tenth of a second.
_ROUNDS = 100
#: Images of an effective receptive field, as in the paper.
_ERF_IMAGES = 50


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
    out, statistics = task.folder / 'test', {}
    files = dict(metrics=out / 'metrics.json')
    if (out / 'predictions').is_dir():  # a classifier has none
        files['predictions'] = out / 'predictions'
    if get_rank() == 0:
        statistics = write_statistics(found, out)
        write_record(evaluation_record(cfg, checkpoint, found, False, statistics), out / 'metrics.json')
    if primary in statistics:
        files['statistics'] = out / statistics[primary]['file']
    merged = found.meta.get('replk_mm', {}).get('reparameterized')
    if not merged and reparameterize_on_meta(build_on_meta(load_task_config(task)))[1].merged:
        values['reparameterized'] = dict(metrics=_finite(_test(task, checkpoint, True)[1].metrics))
    data, where = describe_split(cfg, 'test')
    root, work_dir = Path(where['root']), task.work_dir.resolve()
    if root.is_relative_to(work_dir):  # stays valid when results are copied
        where['root'] = str(root.relative_to(work_dir))
    return MeasurementResult(
        values,
        metric_protocol(task, cfg, data),
        dict(
            data=where,
            loaded=found.load,
            seconds=found.seconds,
            notes=found.notes,
            test=describe_protocol(cfg, False),
            statistics=statistics,
        ),
        files,
    )


def _test(task: Task, checkpoint: str, reparam: bool) -> tuple[Config, Evaluation]:
    cfg = load_task_config(task)
    add_progress_hook(cfg, task.folder / 'test' / 'progress.json', 'test')
    options = RunOptions(
        data_root=task.data_root, work_dir=str(task.folder / 'test_logs'), launcher=task.launcher, device=task.device
    )
    return cfg, evaluate(
        cfg, checkpoint, options, reparam=reparam, predictions=None if reparam else task.folder / 'test' / 'predictions'
    )


def _finite(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics in percent, also of COCO; None for values that are not finite, as AP of an absent object size."""
    return {
        name: in_percent(name, float(value)) if math.isfinite(value) else None
        for name, value in metrics.items()
        if isinstance(value, Real) and name not in ('data_time', 'time')
    }


def metric_protocol(task: Task, cfg: Config, data: dict[str, Any]) -> dict[str, Any]:
    """The conditions that must be equal for two metrics to be ranked.

    Args:
        task: The row.
        cfg: Its config as it was tested.
        data: From :func:`describe_split`.
    """
    trained = _training_of(task).get('protocol', {})
    test_cfg = cfg.model.get('test_cfg') or {}
    iteration = None if task.row.trains else (describe_weights(task) or {}).get('iteration')
    steps = [step.get('load', step) for step in as_list(next(datasets_of(cfg, ('test',))).get('pipeline', []))]
    scales = [
        {key: step[key] for key in ('scale', 'scale_factor', 'keep_ratio') if key in step}
        for step in steps
        if 'Resize' in str(step.get('type'))
    ]
    return dict(
        task=task_of(cfg),
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
        recipe=trained.get('recipe'),
        **{key: value for key, value in task.row.training_keys().items() if key in ('protocol', 'fraction')},
        **{key: value for key, value in _exported_from(task).items() if key in ('protocol', 'fraction')},
    )


def _training_of(task: Task) -> Mapping[str, Any]:
    """The record of a row's training; of an exported network, that of the row with its checkpoint."""
    if task.row.trains or not is_artefact(task.checkpoint or ''):
        return records.latest_records(task.results).get('train', {})
    source = _exported_from(task)
    found = records.read_records([task.work_dir])[0]
    same = (record for record in found if record['row'] == source.get('row') and record['seed'] == source.get('seed'))
    return next((record for record in same if record['measurement'] == 'train'), {})


def _exported_from(task: Task) -> Mapping[str, Any]:
    """Row, seed and protocol of the weights that an exported network was made of, if they are of this suite."""
    if task.row.trains or not is_artefact(task.checkpoint or ''):
        return {}
    weights = read_manifest(str(task.checkpoint)).checkpoint['sha256']
    for record in records.read_records([task.work_dir])[0]:
        if record['measurement'] == 'metric' and (record['checkpoint'] or {}).get('sha256') == weights:
            return {**record['protocol'], 'row': record['row'], 'seed': record['seed']}
    return {}


def curve(task: Task) -> MeasurementResult:
    """Loss and validation metric along the training, from its logs."""
    cfg = load_task_config(task)
    values, facts = read_curve(task.folder / 'train')
    return MeasurementResult(values, metric_protocol(task, cfg, describe_split(cfg, 'val')[0]), facts)


def complexity(task: Task) -> MeasurementResult:
    """Parameters and multiply-accumulates; needs no weights."""
    paper = published.for_config(task.row.config.rpartition('::')[2])
    shape = task.row.macs_shape or (paper.input if paper else None)
    found = config_complexity(task.config, shape and (shape[0], shape[1]), task.row.options)
    before, after = found.training, found.deployed
    return MeasurementResult(
        dict(
            parameters=before.parameters,
            inference_parameters=before.inference_parameters,
            macs=before.macs,
            merged_parameters=after.inference_parameters,
            merged_macs=after.macs,
            parts=[asdict(part) for part in before.parts],
        ),
        dict(shape=list(found.shape), counter='replk_mm.analysis.complexity'),
        dict(changes=found.changes, notes=before.notes, uncounted=[asdict(operator) for operator in before.uncounted]),
    )


def speed(task: Task) -> MeasurementResult:
    """Milliseconds and joules of inference, from image to result, before and after reparameterization, in turns."""
    case, cfg = _case(task)
    built = build_for_inference(cfg, case.checkpoint, device=case.device, classes=False, packed=False, exported=True)
    net: Any = built.model
    if not case.checkpoint:
        randomize_constants(net, task.seed)
    merged = bool(built.meta.get('replk_mm', {}).get('reparameterized'))
    nets: dict[str, Any] = {} if merged else dict(training=net)
    nets['reparameterized'] = reparameterize(copy.deepcopy(net), inplace=True)[0]
    for each in nets.values():
        prepack(each)
    set_input_size(nets.values(), case.shape)
    work = SyntheticBatch(cfg, net, case.batch, case.shape, case.device)
    calls = {form: work.inference_call(each) for form, each in nets.items()}
    found = time_interleaved(calls, repeats=_ROUNDS, seconds=_SECONDS, device=case.device)
    energy = energy_per_call(calls['reparameterized'], case.device)
    forms: dict[str, dict[str, Any]] = {}
    for form in nets:
        of = found.summary(form)
        forms[form] = dict(
            median_ms=of.median,
            low_ms=of.low,
            high_ms=of.high,
            throughput=1e3 * case.batch / of.median,
            unreliable=found.problem(form),
        )
    if energy:
        forms['reparameterized']['joules'] = energy[0]
    # An exported network is ranked by its own time: the conditions are those of the images, not of its arithmetic.
    exported = read_manifest(str(case.checkpoint)) if is_artefact(case.checkpoint or '') else None
    engine = f'{exported.format}, {exported.precision}' if exported else None
    faster = None if merged else asdict(found.speedup('reparameterized', 'training'))
    return MeasurementResult(
        dict(forms=forms, times_as_fast=faster, batch=case.batch),
        _machine(case),
        dict(rounds=found.rounds, warmup=found.warmup, load=found.load, energy=energy and energy[1], engine=engine),
    )


def memory(task: Task) -> MeasurementResult:
    """Peak bytes of inference and of a training step beyond the loaded network, each in its own process.

    A linear probe trains on cached features; its rows have no training step.
    """
    case, cfg = _case(task)
    if is_artefact(case.checkpoint or ''):
        reason = dict(memory='not measured for exported networks')
        return MeasurementResult(dict(inference_bytes=None, training_bytes=None), _machine(case), reason)
    values: dict[str, int | None] = dict(inference_bytes=_memory(case), training_bytes=None)
    facts: dict[str, Any] = {}
    if task.row.protocol == 'linear':
        return MeasurementResult(values, _machine(case), {})
    batch = task.row.batch or min_batch_size(build_on_meta(cfg), 'train')
    try:
        values['training_bytes'] = _memory(replace(case, mode='train', form='training', checkpoint=None, batch=batch))
    except UserError as error:  # a network too large to train on this machine may still run
        facts['training'] = str(error)
    return MeasurementResult(values, {**_machine(case), 'training_batch': batch}, facts)


def _memory(case: BenchmarkCase) -> int | None:
    grown = peak_memory(case, OURS, FLOAT32, True)
    if isinstance(grown, str):
        raise UserError(f'memory of {case.mode}: {grown}')
    return grown


def _case(task: Task) -> tuple[BenchmarkCase, Config]:
    height, width = task.row.shape or default_shape(task.config, task.row.options)
    case = BenchmarkCase(
        task.config,
        True,
        batch=task.row.batch or 1,
        options=task.row.options,
        checkpoint=find_weights(task),
        shape=(height, width),
        device='cpu' if is_artefact(task.checkpoint or '') else select_device(task.device),
        threads=torch.get_num_threads(),
    )
    return case, load_case_config(case)[0]


def _machine(case: BenchmarkCase) -> dict[str, Any]:
    return dict(describe_machine(case.device), shape=list(case.shape), batch=case.batch, precision='float32')


def erf(task: Task) -> MeasurementResult:
    """Effective receptive field of the backbone on images of the test split."""
    from replk_mm.analysis.erf import measure_erf
    from replk_mm.analysis.erf_report import draw_heat_maps  # imports matplotlib

    cfg, out = load_task_config(task), task.folder / 'erf'
    of = dataset_layout(next(datasets_of(cfg, ('test',))), cfg.get('default_scope', 'mmengine'))
    size = task.row.erf.size or max(default_shape(task.config, task.row.options))
    found = measure_erf(
        cfg,
        find_weights(task),
        Path(of['root'], of['images'] or ''),
        size,
        task.row.erf.count or _ERF_IMAGES,
        out,
        device=task.device,
        seed=task.seed,
    )
    draw_heat_maps([found], out / 'erf.png')
    return MeasurementResult(
        found.values(),
        found.protocol(),
        dict(notes=found.notes(), backbone=found.backbone),
        dict(heat_map=out / 'erf.png', matrix=out / 'erf.npz'),
    )


def shape_bias(task: Task) -> MeasurementResult:
    """Decisions by shape or by texture, on scenes where the two disagree."""
    from replk_mm.analysis import shape_bias  # imports matplotlib

    checkpoint = find_weights(task)
    assert checkpoint
    cfg, out = load_task_config(task), task.folder / 'shape_bias'
    root = str(next(datasets_of(cfg, ('test',))).get('data_root'))
    found = shape_bias.measure_shape_bias(cfg, checkpoint, Path(root), out, task.device)
    return MeasurementResult(
        found.values(), dict(found.data), {}, dict(picture=out / 'shape_bias.png', decisions=out / 'shape_bias.json')
    )


def robustness(task: Task) -> MeasurementResult:
    """The metric under corruptions, at other test sizes and on another data set."""
    from replk_mm.analysis.robustness import measure_robustness  # imports matplotlib

    checkpoint = find_weights(task)
    assert checkpoint
    cfg, out = load_task_config(task), task.folder / 'robustness'
    options = RunOptions(data_root=task.data_root, work_dir=str(task.folder / 'robustness_logs'), device=task.device)
    found = measure_robustness(cfg, checkpoint, options, task.row.robustness, out)
    return MeasurementResult(
        found['values'],
        {**metric_protocol(task, cfg, describe_split(cfg, 'test')[0]), **found['protocol']},
        dict(tested=found['tested']),
        dict(profile=out / 'robustness.png', figures=out / 'robustness.json'),
    )


def _measure(function: Callable[[Task], MeasurementResult]) -> Measure:
    def measured(task: Task) -> MeasurementResult:
        found = function(task)
        files = {name: str(Path(path).relative_to(task.work_dir)) for name, path in found.files.items()}
        return replace(found, files=files, checkpoint=None if function is complexity else describe_weights(task))

    return measured


TABLE: Mapping[str, Measure] = {
    function.__name__: _measure(function)
    for function in (train, complexity, metric, curve, erf, shape_bias, robustness, speed, memory)
}
