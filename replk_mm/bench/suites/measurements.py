"""The function of each measurement of a suite, in :data:`TABLE`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from replk_mm.analysis.benchmark.case import default_shape
from replk_mm.bench.suites.accuracy import metric
from replk_mm.bench.suites.cost import complexity, memory, speed
from replk_mm.bench.suites.inputs import dataset_layout, describe_weights, find_weights, load_task_config
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.training import curve, train
from replk_mm.bench.suites.worker import Measure, MeasurementResult
from replk_mm.data.datasets import datasets_of
from replk_mm.engine.record import environment_info as environment  # noqa: F401 (the worker calls it)

#: Images of an effective receptive field, as in the paper.
_ERF_IMAGES = 50


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
        found.values(), found.protocol(), {}, dict(picture=out / 'shape_bias.png', decisions=out / 'shape_bias.json')
    )


def _measure(function: Callable[[Task], MeasurementResult]) -> Measure:
    def measured(task: Task) -> MeasurementResult:
        found = function(task)
        files = {name: str(Path(path).relative_to(task.work_dir)) for name, path in found.files.items()}
        return replace(found, files=files, checkpoint=None if function is complexity else describe_weights(task))

    return measured


TABLE: Mapping[str, Measure] = {
    function.__name__: _measure(function)
    for function in (train, complexity, metric, curve, erf, shape_bias, speed, memory)
}
