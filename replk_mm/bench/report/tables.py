"""The columns of the report's tables, values as text, protocols, and the comparison with published figures."""

import json
import os
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from replk_mm import published
from replk_mm.analysis.timing import Timing
from replk_mm.text import clean

#: Names of figures whose keys in records are ambiguous: ``training`` is an unmerged network, not a training step.
FIGURE_NAMES = {
    'training': 'forward, unmerged',
    'reparameterized': 'forward, merged',
    'inference_bytes': 'memory of inference',
    'training_bytes': 'memory of a training step',
}


def format_value(value: Any) -> str:
    """A plain value as text."""
    if value is None or value == [] or value == {}:
        return 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, (int, float)) for part in value):
        return ' x '.join(map(str, value))
    if isinstance(value, list) and all(isinstance(part, (str, list)) for part in value):
        return '; '.join(map(format_value, value))
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, (Mapping, Sequence)) else str(value)


def leaves(node: Any, place: str = '') -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists with their places, such as ``'data.root'``; a list of plain values is a leaf."""
    parts: Any = ()
    if isinstance(node, Mapping):
        parts = node.items()
    elif isinstance(node, list) and any(isinstance(part, (Mapping, list)) for part in node):
        parts = enumerate(node)
    if not parts and place:
        yield place, node
    for key, value in parts:
        yield from leaves(value, f'{place}.{key}' if place else str(key))


def number(node: Any, *place: str) -> float | None:
    """The finite number at a place of nested dicts; None if there is none."""
    for name in place:
        node = node.get(name) if isinstance(node, Mapping) else None
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        return None
    return float(node) if abs(node) < 10**30 else None  # nothing measured is larger; NaN is not smaller


#: Maximum length of a value in a difference, in characters.
_QUOTED = 100
#: Prefix of the protocols of a measurement; the metric's are A, B ...
_LETTERS = dict(complexity='C', speed='S', memory='M', train='T', erf='E', shape_bias='B', robustness='R', curve='L')
#: Entries of the metric's protocol that the heading of its group names.
_SUMMARY = (
    *('protocol', 'fraction', 'task', 'data', 'crop', 'mode', 'tta', 'iterations', 'batch'),
    *('pretraining', 'precision', 'recipe'),
)

#: What a protocol that does not state them has.
_UNSTATED = dict(protocol='finetune', fraction=100)


@dataclass(frozen=True)
class Protocol:
    """One way in which a measurement was made, within a suite.

    Attributes:
        name: ``'A'``, ``'B'`` ... of the metric; of other measurements with the measurement's letter, such as ``'S1'``.
        content: What has to be equal.
        differences: From the first protocol of the measurement, in words; none of the first itself.
    """

    name: str
    content: Mapping[str, Any]
    differences: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The most important entries of a metric's protocol."""
        parts = []
        for name in _SUMMARY:
            value = self.content.get(name)
            if name == 'data' and isinstance(value, Mapping):
                images = f' ({value["images"]} images)' if value.get('images') else ''
                value = f'{format_value(value.get("root") or value.get("name"))}{images}'
            if name == 'recipe' and isinstance(value, Mapping):
                value = f'{value.get("origin")} ({value.get("optimizer")}, learning rate {value.get("lr")})'
            if value not in (None, '', [], {}):
                parts.append(f'{name} {clean(format_value(value), 80)}')
        return ', '.join(parts) or 'not stated'


def protocol_key(protocol: Mapping[str, Any]) -> str:
    """A text that identifies a protocol; the order of its keys does not matter."""
    return json.dumps(protocol, sort_keys=True, default=str)


def name_protocols(measurement: str, contents: Iterable[Mapping[str, Any]]) -> dict[str, Protocol]:
    """Protocols by :func:`protocol_key`, the most frequent first.

    Args:
        measurement: What they are of.
        contents: One for each record.
    """
    contents = list(contents)
    by_identity = {protocol_key(content): content for content in contents}
    order = [key for key, _ in Counter(map(protocol_key, contents)).most_common()]
    return {
        key: Protocol(
            _name(measurement, i),
            by_identity[key],
            tuple(protocol_differences(by_identity[key], by_identity[order[0]])),
        )
        for i, key in enumerate(order)
    }


def _name(measurement: str, index: int) -> str:
    if measurement in _LETTERS:
        return f'{_LETTERS[measurement]}{index + 1}'
    return string.ascii_uppercase[index] if index < 26 else f'Z{index - 24}'


def protocol_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs in ``one`` from ``other``, a phrase for each place: ``'data.images: 40 instead of 80'``."""
    ours, theirs = ({**_UNSTATED, **dict(leaves(part))} for part in (one, other))
    found = []
    for place in {**theirs, **ours}:
        here, there = (format_value(part[place]) if place in part else 'not stated' for part in (ours, theirs))
        if (
            place not in ours
            or place not in theirs
            or protocol_key({'': ours[place]}) != protocol_key({'': theirs[place]})
        ):
            same = len(os.path.commonprefix([here, there]))
            found.append(f'{place}: {_around(here, same)} instead of {_around(there, same)}')
    return found


def _around(text: str, at: int) -> str:
    """A long text's part about a place."""
    start = max(0, at - _QUOTED // 2) if len(text) > _QUOTED else 0
    return f'{"…" * (start > 0)}{text[start : start + _QUOTED]}{"…" * (len(text) > start + _QUOTED)}'


#: Images of the split that a published figure was measured on.
PUBLISHED_IMAGES = {'ADE20K': 2000, 'Cityscapes': 500, 'COCO': 5000}
#: Names of our metrics in published rows: without and with test-time augmentation.
_PUBLISHED_METRICS = {
    'mIoU': ('miou_ss', 'miou_ms'),
    'coco/bbox_mAP': ('ap_box', None),
    'coco/segm_mAP': ('ap_mask', None),
}
#: Titles of metrics, with the unit.
METRIC_TITLES = {'coco/bbox_mAP': 'Box AP', 'coco/segm_mAP': 'Mask AP'}
#: Reason for a missing figure that the suite did not request.
NOT_MEASURED = 'not measured'


@dataclass(frozen=True)
class Figure:
    """A value of one cell.

    Attributes:
        value: None where it is missing.
        deviation: Standard deviation of the sample of seeds; None of one seed.
        count: Seeds that it is the mean of; 0 for a quoted one.
        why: Why it is missing, or a remark.
        protocol: Name of its protocol.
        low: Lower end of a metric's confidence interval; None if that is unknown.
        high: Upper end.
        mark: ``'best group'`` of a metric that is not distinguishable from the best, unlike some other row's;
            ``'front'`` of a cost below which no row has as high a metric.
        images_only: Whether the interval does not cover other training seeds.
        unreliable: Why it is not ranked: the machine was loaded, or the times spread too much.
    """

    value: float | None = None
    deviation: float | None = None
    count: int = 0
    why: str = ''
    protocol: str = ''
    low: float | None = None
    high: float | None = None
    mark: str = ''
    images_only: bool = False
    unreliable: str = ''


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: Names it in the page and in a row's figures.
        title: Its heading.
        unit: Of its values.
        measurement: Whose values it shows; '' if it is quoted or derived.
        paths: Places in a record's ``values``, of which the first that is there counts.
        scale: Factor of the values.
        digits: After the point.
        cost: Whether the metric is plotted against it, with the Pareto front.
        note: A remark on all of its values.
    """

    key: str
    title: str
    unit: str
    measurement: str
    paths: tuple[tuple[str, ...], ...] = ()
    scale: float = 1.0
    digits: int = 2
    cost: bool = False
    note: str = ''

    def text(self, value: float) -> str:
        """A value as it stands in the table; a small one with more digits, so that none but zero reads as zero."""
        sign = '+' if self.key == 'difference' else ''
        small = 0 < abs(value) < 10 ** (1 - self.digits)
        return f'{value:{sign}.2g}' if small else f'{value:{sign},.{self.digits}f}'

    def shown(self, figure: Figure) -> str:
        """A figure's text: the value, and its interval, or its deviation if it has one that is not zero by nature."""
        text, mark = self.text(figure.value or 0.0), ' ?' if figure.unreliable else ''
        if self.key == 'metric' and figure.low is not None and figure.high is not None:
            return f'{text} [{self.text(figure.low)}, {self.text(figure.high)}]'
        if figure.deviation is None or self.measurement == 'complexity' or self.key == 'difference':
            return text + mark
        return f'{text} ± {self.text(figure.deviation)}{mark}'


_FORMS = (('forms', 'reparameterized'), ('forms', 'training'))
COLUMNS = (
    Column('metric', 'Metric', '', 'metric'),
    Column(
        'milliseconds',
        'Time',
        'ms',
        'speed',
        tuple((*form, 'median_ms') for form in _FORMS),
        digits=1,
        cost=True,
        note='Time is the median of one batch, of the merged network where there is something to merge; images per '
        'second refer to it.',
    ),
    Column('throughput', 'Speed', 'images/s', 'speed', tuple((*form, 'throughput') for form in _FORMS), digits=1),
    Column(
        'energy',
        'Energy',
        'J',
        'speed',
        tuple((*form, 'joules') for form in _FORMS),
        cost=True,
        note='Energy is that of one batch, of all CPU packages (RAPL) or the GPU (NVML), their idle power included.',
    ),
    Column(
        'memory',
        'Memory',
        'MiB',
        'memory',
        (('inference_bytes',),),
        2.0**-20,
        1,
        cost=True,
        note='Memory is the peak of inference beyond the loaded network.',
    ),
    Column(
        'parameters',
        'Parameters',
        'M',
        'complexity',
        (('merged_parameters',), ('inference_parameters',)),
        1e-6,
        cost=True,
        note='Parameters and MACs are of the network as it is deployed: no auxiliary heads, and merged if it can be.',
    ),
    Column('macs', 'MACs', 'G', 'complexity', (('merged_macs',), ('macs',)), 1e-9, cost=True),
    Column(
        'training',
        'Training time',
        's',
        'train',
        (('seconds',),),
        digits=0,
        cost=True,
        note='The training time is that of one seed, beside whatever else ran on the machine.',
    ),
    Column(
        'published', 'Published', '', '', digits=1, note='Published figures are quoted from the papers, not measured.'
    ),
    Column(
        'difference',
        'Difference',
        'points',
        '',
        note='Difference: measured minus published, in points, and only where both are of the same data.',
    ),
    Column(
        'erf50',
        'ERF 50 %',
        'px',
        'erf',
        (('areas_of_scores', '0.5', 'side'),),
        digits=0,
        note='ERF, the effective receptive field: side of the square about the centre that holds this share of the '
        'contribution of all pixels. The areas of the RepLKNet paper, of its logarithm, are in the records.',
    ),
    Column('erf99', 'ERF 99 %', 'px', 'erf', (('areas_of_scores', '0.99', 'side'),), digits=0),
    Column(
        'shape_bias',
        'Shape bias',
        '',
        'shape_bias',
        (('shape_bias',),),
        digits=3,
        note='Shape bias: of the decisions for the shape or for the texture, the share of those for the shape. It '
        'hides how often either cue is used, so By shape and By texture are shares of all decisions.',
    ),
    Column('shape_accuracy', 'By shape', '%', 'shape_bias', (('shape_accuracy',),), 100, 1),
    Column('texture_accuracy', 'By texture', '%', 'shape_bias', (('texture_accuracy',),), 100, 1),
    Column(
        'robustness',
        'Corrupted',
        '% of clean',
        'robustness',
        (('relative', 'value'),),
        digits=0,
        note='Corrupted: the mean metric over corruptions and severities, in percent of the clean one of these images.',
    ),
)
BY_KEY = {column.key: column for column in COLUMNS}


def value_of(column: Column, record: Mapping[str, Any]) -> float | None:
    """A record's value of a column; None if it is missing."""
    paths = (('metrics', primary_metric(record)[0]),) if column.key == 'metric' else column.paths
    found = (number(record['values'], *path) for path in paths)
    return next((value * column.scale for value in found if value is not None), None)


def timing_problem(column: Column, record: Mapping[str, Any]) -> str:
    """Why a record's time is not reliable; ``''`` if it is, or is not known to be unreliable, or is no time."""
    for path in column.paths if column.measurement == 'speed' else ():
        ends = (number(record['values'], *path[:-1], name) for name in ('median_ms', 'low_ms', 'high_ms'))
        found = [end for end in ends if end is not None]
        if len(found) == 3:
            return Timing(*found).problem(number(record['facts'], 'load') or 0.0)
    return ''


def primary_metric(record: Mapping[str, Any]) -> tuple[str, str]:
    """The name and the unit of the metric that ranks."""
    return str(record['values'].get('primary') or 'mIoU'), str(record['values'].get('unit') or '')


def compare_with_published(record: Mapping[str, Any], measured: Figure) -> tuple[Figure, Figure]:
    """The published figure of a row and the measured one's difference from it.

    Args:
        record: Of the metric.
        measured: The mean over the seeds.
    """
    stated = record['published']
    if not stated:
        why = 'nothing is published for this config'
        return Figure(why=why), Figure(why=why)
    metric, tta = primary_metric(record)[0], bool(record['protocol'].get('tta'))
    name = _PUBLISHED_METRICS.get(metric, (None, None))[tta]
    value = number(stated, name) if name else None
    if value is None:
        why = f'no {metric}{" with test-time augmentation" if tta else ""} is published for this config'
        return Figure(why=why), Figure(why=why)
    config = record['config']
    exchanged = 'backbone' in (config.get('options') or {})  # then the figure is another config's
    result = None if exchanged else published.for_config(str(config.get('path') or ''))
    name = str(stated.get('dataset') or (result.dataset if result else ''))
    conditions = result.schedule + (f', crop {result.crop}' if result.crop else '') if result else ''
    quoted = Figure(value, why=', '.join(filter(None, (name, conditions, format_value(stated.get('source'))))))
    other = _other_data(name, record)
    if other or measured.value is None:
        return quoted, Figure(why=other or 'the metric is missing')
    return quoted, replace(measured, value=measured.value - value, why='; '.join(_otherwise(record, result)))


def _other_data(name: str, record: Mapping[str, Any]) -> str:
    """Why the published figure is of other data than the record; '' if it is of the same."""
    if name not in PUBLISHED_IMAGES:
        return f'the published figure is of {name or "unstated data"}, which is not known here'
    images = number(record['values'], 'images')
    if images == PUBLISHED_IMAGES[name]:
        return ''
    data = record['protocol'].get('data')
    root = data.get('root') or data.get('name') if isinstance(data, Mapping) else data
    return (
        f'the published figure is of {name} ({PUBLISHED_IMAGES[name]:,} images), the measured one of '
        f'{format_value(root)} ({f"{images:,.0f}" if images else "unknown number of"} images)'
    )


def _otherwise(record: Mapping[str, Any], result: published.PublishedResult | None) -> Iterator[str]:
    """Other conditions that contribute to a difference from a published figure."""
    iterations, crop = number(record['protocol'], 'iterations'), record['protocol'].get('crop')
    if (
        result
        and iterations
        and result.schedule.endswith('iterations')
        and (result.schedule != f'{iterations / 1000:g}k iterations')
    ):
        yield f'trained for {iterations:,.0f} iterations, published after {result.schedule}'
    if record['config'].get('options'):
        yield f'config with options: {clean(format_value(record["config"]["options"]), 200)}'
    sides = crop if isinstance(crop, list) else [crop]
    if result and result.crop and any(side not in (None, result.crop) for side in sides):
        yield f'crop {format_value(crop)}, published with {result.crop}'
