"""Robustness of a trained segmentor or detector: common corruptions, other test sizes, another data set.

The ordinary test runs once for each condition, on the same images. See docs/robustness.md.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from mmcv.transforms import BaseTransform, LoadImageFromFile, Resize
from mmengine.config import Config
from mmengine.registry import DATASETS
from numpy.typing import NDArray

from replk_mm.analysis import statistics
from replk_mm.analysis.corruptions import LEAST_SIDE, RobustnessSettings, corrupt
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint
from replk_mm.data.datasets import datasets_of, task_of
from replk_mm.data.transforms import datasets_with_pipeline
from replk_mm.engine.evaluate import prepare_test
from replk_mm.engine.process import RunOptions
from replk_mm.engine.record import environment_info, replace_non_finite, write_record
from replk_mm.engine.runner import explain_failures
from replk_mm.errors import UserError
from replk_mm.evaluation.gather import require_ground_truth
from replk_mm.evaluation.per_image import PerImageScores
from replk_mm.logs import announce
from replk_mm.visualize import write_figure

#: Part of the protocol of records: only results with the same text are compared.
DEFINITION = (
    'corruptions of replk_mm.analysis.corruptions, edition 1, of the loaded image; mean over corruptions and '
    'severities, and that mean in percent of the clean metric (Michaelis et al., 2019)'
)


class Condition(NamedTuple):
    """What differs from the ordinary test: a corruption, or a factor of the test size."""

    corruption: str = 'clean'
    severity: int = 0
    scale: float = 1.0


class Corrupt(BaseTransform):
    """Corrupt the loaded image; see :func:`~replk_mm.analysis.corruptions.corrupt`."""

    def __init__(self, name: str, severity: int, seed: int) -> None:
        self.arguments = name, severity, seed

    def transform(self, results: dict) -> dict:
        image = results['img'][..., ::-1]  # mmcv's are BGR
        try:
            found = corrupt(image.astype(np.uint8) if image.dtype == np.float32 else image, *self.arguments)
        except ValueError as error:
            raise UserError(
                f'{results.get("img_path")}: {error}\nUse RGB photographs of at least {LEAST_SIDE} pixels a side.'
            ) from error
        results['img'] = np.ascontiguousarray(found[..., ::-1], image.dtype)
        return results


class _Mean:
    """The mean of metrics of one checkpoint, or that in percent of another, for any weights of the images."""

    def __init__(self, parts: Sequence[Any], relative_to: Any = None) -> None:
        self.parts, self.relative_to, self.images = parts, relative_to, parts[0].images
        self.bounds = (0.0, math.inf if relative_to else 100.0)
        self._known: dict[int, NDArray] = {}  # each metric is part of several means

    def score(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        key = 0 if weights is None else hash(weights.tobytes())
        if key not in self._known:
            found = np.mean([part.score(weights) for part in self.parts], axis=0)
            with np.errstate(divide='ignore', invalid='ignore'):
                self._known[key] = 100 * found / self.relative_to.score(weights) if self.relative_to else found
        return self._known[key]


def measure_robustness(
    cfg: Config, checkpoint: str, options: RunOptions, settings: RobustnessSettings, out: Path
) -> dict[str, Any]:
    """Test a checkpoint under every condition; write ``robustness.json`` and ``robustness.png``.

    Args:
        cfg: The config it was trained with; left unchanged.
        checkpoint: Path or URL.
        options: Device, data root, classes and work dir are used.
        settings: Images, corruptions, severities, sizes, and the other data set.
        out: Folder for the two files.

    Returns:
        The record. Metrics in its ``values`` are dicts of ``value``, ``low`` and ``high`` in percent, the ends of the
        95 % interval over images; None if undefined. ``corruptions`` has them by name and severity, ``sizes`` by
        factor; ``mean_under_corruption`` is the mean over all corruptions, ``relative`` that in percent of ``clean``.

    Raises:
        UserError: If data or checkpoint do not fit, the metric keeps no counts per image, or the model is a classifier.
    """
    if task_of(cfg) == 'classification':
        raise UserError(f'{cfg.filename}: a classifier\nUse the config of a segmentor or a detector.')
    conditions = [Condition(name, severity) for name in settings.corruptions for severity in settings.severities]
    conditions = [Condition(), *conditions, *(Condition(scale=scale) for scale in settings.scales if scale != 1)]
    there = replace(options, data_root=settings.shifted_root)  # first, as its path may be wrong
    shifted = _test(copy.deepcopy(cfg), checkpoint, there, [Condition()], settings)[1] if there.data_root else ()
    metric, found, notes = _test(copy.deepcopy(cfg), checkpoint, options, conditions, settings)
    scores = {condition: _Mean([counts]) for condition, counts in zip(conditions, found, strict=True)}
    clean, corrupted = scores[Condition()], [of for condition, of in scores.items() if condition.severity]
    values: dict[str, Any] = dict(metric=metric, images=len(clean.images), clean=_interval(clean))
    values['corruptions'] = {
        name: {str(severity): _interval(scores[Condition(name, severity)]) for severity in settings.severities}
        for name in settings.corruptions
    }
    if corrupted:
        values['mean_under_corruption'] = _interval(_Mean(corrupted))
        values['relative'] = _interval(_Mean(corrupted, clean))
    values['sizes'] = {f'{scale:g}': _interval(scores[Condition(scale=scale)]) for scale in settings.scales}
    for other in shifted:
        values['shifted'] = dict(_interval(other), images=len(other.images))
    values = replace_non_finite(values)
    path = fetch_checkpoint(checkpoint)
    record = dict(
        values=values,
        protocol=dict(metric=metric, definition=DEFINITION, robustness=settings.model_dump()),
        config=str(cfg.filename),
        checkpoint=dict(path=str(path), sha256=hash_checkpoint(path)),
        tested=list(clean.images),
        notes=notes,
        environment=environment_info(),
    )
    write_record(record, out / 'robustness.json')
    write_figure(out / 'robustness.png', draw_profile(values))
    return record


def _interval(scores: statistics.Scores) -> dict[str, float | None]:
    found = statistics.interval([scores])
    return dict(value=found.value, low=found.low, high=found.high)


def _test(
    cfg: Config, checkpoint: str, options: RunOptions, conditions: Sequence[Condition], settings: RobustnessSettings
) -> tuple[str, list[PerImageScores], list[str]]:
    """Name of the metric, counts of each condition, and changes of the config; network and data set are built once."""
    if cfg.get('test_dataloader', {}).pop('persistent_workers', None):  # they would keep the first condition
        cfg.test_dataloader.pop('prefetch_factor', None)
    runner, _, notes = prepare_test(cfg, checkpoint, options)
    _choose_images(runner._test_dataloader, settings)
    with explain_failures(cfg, runner):
        runner.call_hook('before_run')  # the logger opens its files
        loop: Any = runner.test_loop
        pipelines = [part.pipeline for part in datasets_with_pipeline(loop.dataloader.dataset)]
        steps, found, metric = [pipeline.transforms for pipeline in pipelines], [], ''
        for i, condition in enumerate(conditions, 1):
            for pipeline, own in zip(pipelines, steps, strict=True):
                pipeline.transforms = list(_change(own, condition, settings.seed))
            require_ground_truth(loop.run(), 'test')
            counts = [pair for one in loop.evaluator.metrics for pair in getattr(one, 'statistics', {}).items()]
            if not counts:
                raise UserError(
                    f'{cfg.filename}: test_evaluator keeps no counts per image\n'
                    f'Use replk_mm.IoUMetric or replk_mm.CocoMetric.'
                )
            metric, scores = counts[0]
            found.append(scores)
            name = f'size x {condition.scale:g}' if condition.scale != 1 else condition.corruption
            name += f' {condition.severity}' * bool(condition.severity)
            announce(f'{i}/{len(conditions)}  {name}: {metric} {scores.score()[0]:.2f}')
    return metric, found, notes


def _choose_images(loader: Any, settings: RobustnessSettings) -> None:
    """Limit the data sets of a loader's config to a seeded choice of images."""
    config: Any = dict(test_dataloader=loader)
    datasets = list(datasets_of(config, ('test',)))
    sizes = [len(DATASETS.build({**dataset, 'pipeline': []})) for dataset in datasets]
    if settings.images < sum(sizes):
        chosen = np.sort(np.random.default_rng(settings.seed).choice(sum(sizes), settings.images, replace=False))
        for dataset, size, end in zip(datasets, sizes, np.cumsum(sizes), strict=True):
            places = of if isinstance(of := dataset.get('indices'), Sequence) else range(size)
            dataset['serialize_data'] = False  # mmengine cannot serialize a part without images
            dataset['indices'] = [int(places[i - end + size]) for i in chosen if end - size <= i < end]


def _change(steps: Sequence[Any], condition: Condition, seed: int) -> Iterator[Any]:
    """The steps of a pipeline under a condition."""
    resizes = any(isinstance(step, Resize) for step in steps)
    for step in steps:
        if isinstance(step, Resize) and condition.scale != 1:
            step = copy.copy(step)
            if step.scale:
                step.scale = tuple(round(condition.scale * side) for side in step.scale)
            else:
                step.scale_factor = tuple(condition.scale * factor for factor in step.scale_factor)
        yield step
        if isinstance(getattr(step, 'load', step), LoadImageFromFile):
            if condition.severity:
                yield Corrupt(condition.corruption, condition.severity, seed)
            if condition.scale != 1 and not resizes:
                yield Resize(scale_factor=float(condition.scale), keep_ratio=True)


def draw_profile(values: Mapping[str, Any]) -> Figure:
    """Draw the metric by corruption and severity, colored by its share of the clean one, and by test size."""
    rows, clean = values['corruptions'], np.float64(values['clean']['value'])  # NaN for None
    severities = list(next(iter(rows.values()), {}))
    cells = np.array([[rows[name][s]['value'] for s in severities] for name in rows] or [[]], float)
    figure = Figure(figsize=(6.4, max(2.6, 1.3 + 0.26 * len(rows))), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if rows:
        left.imshow(100 * cells / (clean or math.nan), cmap='viridis', vmin=0, vmax=100, aspect='auto')
    for (y, x), value in np.ndenumerate(cells):
        color = 'black' if value > 0.6 * clean else 'white'
        left.text(x, y, f'{value:.1f}', ha='center', va='center', fontsize=8, color=color)
    left.set_xticks(range(len(severities)), severities)
    left.set_yticks(range(len(rows)), [name.replace('_', ' ') for name in rows])
    left.set_xlabel('severity (colors: share of clean)')
    sizes = sorted((float(size), found) for size, found in values['sizes'].items())
    for x, found in sizes:
        right.vlines(x, np.float64(found['low']), np.float64(found['high']), color='#0072B2')
    right.plot([x for x, _ in sizes], [found['value'] for _, found in sizes], marker='o', color='#0072B2')
    right.set(xlabel='test size, factor\n(lines: 95 % interval)', ylabel=values['metric'])
    words = [f'{values["metric"]} of {values["images"]} images: clean {clean:.1f}']
    texts = dict(mean_under_corruption='corrupted {:.1f}', relative='{:.0f} % of clean', shifted='other data {:.1f}')
    words += [text.format(np.float64(values[name]['value'])) for name, text in texts.items() if name in values]
    figure.suptitle(', '.join(words), fontsize=9)
    return figure
