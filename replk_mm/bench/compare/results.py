"""Read two results of ``tools/test.py --out``, and compare their conditions, metrics and classes."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mmengine.config import Config
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from replk_mm.bench.report.tables import leaves
from replk_mm.data.classes import use_classes
from replk_mm.engine.config import load_config, resolve_config_path, set_data_root
from replk_mm.errors import UserError, command_line, format_list

#: A figure; JSON holds numbers of any number of digits.
Figure = Annotated[int, Field(ge=-(10**18), le=10**18)] | FiniteFloat | None
#: Key of a class's amount of data in a record.
SIZE = {'segmentation': 'pixels', 'detection': 'instances'}
#: Figures that do not measure quality.
_NO_METRICS = ('data_time', 'time')
#: Longest value of a difference that is shown whole.
_LONGEST = 60


class MetricsFile(BaseModel):
    """The content of a metrics.json; see ``docs/suites.md``."""

    metrics: dict[str, Figure]
    per_class: dict[str, dict[str, Figure]] = Field(min_length=1)
    config: str
    checkpoint: dict[str, Any]
    protocol: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    reparameterized: Any = None


@dataclass(frozen=True)
class Result:
    """One result."""

    letter: str  #: ``'A'`` or ``'B'``
    file: Path  #: its metrics.json
    record: MetricsFile  #: that file's content

    @property
    def predictions(self) -> Path:
        """Folder of the exported predictions; the result's own folder is resolved."""
        return Path(os.path.realpath(self.file.parent), 'predictions')

    @property
    def name(self) -> str:
        """A short name: the folder's; ROW/SEED for a run of a suite."""
        folder = self.file.resolve().parent
        folder = folder.parent if folder.name == 'test' else folder
        return f'{folder.parent.name}/{folder.name}' if folder.name.isdigit() else folder.name

    @property
    def task(self) -> str:
        """``'segmentation'`` or ``'detection'``."""
        return 'segmentation' if any('IoU' in figures for figures in self.record.per_class.values()) else 'detection'

    def sizes(self) -> dict[str, Any]:
        """Labelled pixels or annotated objects of every class that has some."""
        size = SIZE[self.task]
        return {name: figures[size] for name, figures in self.record.per_class.items() if size in figures}

    def facts(self) -> dict[str, Any]:
        """Fields that identify this result in a report."""
        return dict(
            name=self.name,
            path=str(self.file),
            config=self.record.config,
            images=self.record.data.get('images'),
            checkpoint=self.record.checkpoint.get('path'),
            sha256=self.record.checkpoint.get('sha256'),
            iteration=self.record.checkpoint.get('iteration'),
        )


@dataclass(frozen=True)
class DataSource:
    """Places of data and classes, if they differ from those that the results state."""

    data_root: str | None = None  #: folder of the data set
    config: str | None = None  #: config file for both results
    classes: str | None = None  #: as ``--classes`` of the tests
    options: dict | None = None  #: as ``--cfg-options`` of the tests


def read_result(path: str, letter: str) -> Result:
    """Read a result.

    Args:
        path: A folder that ``tools/test.py --out`` wrote, its metrics.json, or a suite's folder of one row and seed.
        letter: ``'A'`` or ``'B'``.

    Raises:
        UserError: If there is none, or the file is not valid.
    """
    given = Path(path)
    places = [given / 'metrics.json', given / 'test' / 'metrics.json', given]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f'{letter}, {path}: no metrics.json there\nName a folder that was written by: '
            f'{command_line("test", "CONFIG", "CHECKPOINT", "--out", "DIR")}, '
            f'or a row and seed of a suite (runs/ROW/SEED).'
        )
    try:
        found = Result(letter, file, MetricsFile.model_validate_json(file.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        place = '.'.join(map(str, first['loc'])) or 'the file'
        raise UserError(
            f'{file}: not the result of a test with labels: {place}: {first["msg"]}\n'
            f'Test again: {command_line("test", "CONFIG", "CHECKPOINT", "--out", file.parent)}'
        ) from error
    if any('accuracy/top1' in figures for figures in found.record.per_class.values()):
        raise UserError(
            f'{file}: result of a classifier\nCompare segmentors or detectors; a report has classifiers too.'
        )
    return found


def check_comparable(a: Result, b: Result) -> None:
    """Reject results on different data.

    Raises:
        UserError: If task, number of images, classes, or the amount of some class in the labels differ.
    """
    facts = [
        {
            'task': result.task,
            'images': result.record.data.get('images'),
            **{f'{SIZE[result.task]} of {name}': size for name, size in result.sizes().items()},
        }
        for result in (a, b)
    ]
    other = [
        f'{key}: {facts[0].get(key)} in A, {facts[1].get(key)} in B'
        for key in {**facts[0], **facts[1]}
        if facts[0].get(key) != facts[1].get(key)
    ]
    if other:
        raise UserError(
            f'{a.file} and {b.file}: measured on different data or classes: {format_list(other, 3)}\nTest both '
            f'checkpoints on the same data (--data-root) with the same classes (--classes).'
        )


def compare_conditions(a: Result, b: Result) -> list[dict[str, str]]:
    """Conditions that differ: ``{'what', 'key', 'a', 'b'}``; ``what`` is test, training, data or environment."""

    def of(record: MetricsFile) -> Iterator[tuple[tuple[str, str], object]]:
        yield ('training', 'iterations'), record.checkpoint.get('iteration')
        yield ('test', 'reparameterized'), record.reparameterized
        yield from ((('test', key), value) for key, value in leaves(record.protocol))
        yield ('data', 'root'), record.data.get('root')
        yield from ((('environment', key), value) for key, value in leaves(record.environment))

    def shown(values: dict, key: tuple[str, str]) -> str:
        text = str(values.get(key, 'absent'))
        return text if len(text) <= _LONGEST else f'{text[: _LONGEST - 4]} ...'

    values = [dict(of(result.record)) for result in (a, b)]
    return [
        dict(what=key[0], key=key[1], a=shown(values[0], key), b=shown(values[1], key))
        for key in {**values[0], **values[1]}
        if values[0].get(key) != values[1].get(key)
    ]


def compare_metrics(a: Result, b: Result) -> list[dict[str, Any]]:
    """Overall figures side by side: ``{'name', 'a', 'b', 'difference'}``; None for what one does not have."""
    found = [result.record.metrics for result in (a, b)]
    rows = [dict(name=name, **_pair(found[0].get(name), found[1].get(name))) for name in {**found[0], **found[1]}]
    return [row for row in rows if row['name'] not in _NO_METRICS and (row['a'], row['b']) != (None, None)]


def compare_classes(a: Result, b: Result, figure: str) -> list[dict[str, Any]]:
    """One figure of every class: ``{'name', 'a', 'b', 'difference', 'size'}``, what differs most first.

    Raises:
        UserError: If a result does not have the figure.
    """
    found, sizes = [result.record.per_class for result in (a, b)], a.sizes()
    for result, classes in zip((a, b), found, strict=True):
        known = {key: None for figures in classes.values() for key in figures}
        if figure not in known:
            raise UserError(
                f'{result.file}: the classes have no {figure}; there are {format_list(list(known))}\n'
                f'Test both with the same evaluator.'
            )
    rows = [
        dict(name=name, **_pair(*(classes.get(name, {}).get(figure) for classes in found)), size=sizes.get(name))
        for name in {**found[0], **found[1]}
    ]
    return sorted(rows, key=lambda row: -abs(row['difference'] or 0))


def _pair(a: float | None, b: float | None) -> dict[str, float | None]:
    return dict(a=a, b=b, difference=None if a is None or b is None else b - a)


def load_result_config(result: Result, source: DataSource, root: str | None) -> Config:
    """The config of a result, its data sets at ``root`` and with the classes of ``source``.

    Raises:
        UserError: If it is not there any more, or is not trusted: a config is a program.
    """
    path = source.config or result.record.config
    if not source.config and '::' not in path and not Path(path).is_file():
        raise UserError(
            f'{result.file}: its config is not there any more: {path} (from {Path.cwd()})\n'
            f'Start where the test was started, or name the file with --config FILE.'
        )
    if not source.config and not _is_trusted(path):
        raise UserError(
            f'{result.file}: its config, {path}, is a program, and not one of this project or of a package\n'
            f'If it is yours, or you have read it: --config {shlex.quote(path)}'
        )
    cfg = load_config(path, source.options)
    if root:
        set_data_root(cfg, root)
    if source.classes is not None:
        use_classes(cfg, source.classes, ('test',))
    return cfg


def _is_trusted(path: str) -> bool:
    """Whether a config is one of an installed package or of this project."""
    package, installed, _ = path.partition('::')
    root = resolve_config_path(f'{package}::.') if installed else Path(__file__).parents[3] / 'configs'
    return resolve_config_path(path).resolve().is_relative_to(root.resolve())


def find_data_root(a: Result, b: Result, source: DataSource) -> str | None:
    """Where both results' data set is; None if it is several folders, which only the config tells apart.

    Raises:
        UserError: If it is in neither place that the results state.
    """
    roots = [source.data_root] if source.data_root else [str(result.record.data.get('root')) for result in (a, b)]
    for root in roots:
        if Path(root).is_dir():
            return root
        if all(Path(part).is_dir() for part in root.split(', ')):
            return None
    raise UserError(
        f'the data set is not where it was tested: {", ".join(dict.fromkeys(roots))}; looked from '
        f'{Path.cwd()}\nName its folder with --data-root DIR. --no-images compares the figures alone.'
    )
