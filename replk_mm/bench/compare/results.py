"""Two results of ``tools/test.py --out``: found, read, and what they were not measured alike in."""
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from replk_mm.data.classes import listed, use_classes
from replk_mm.engine.config import file_of, load_config, set_data_root
from replk_mm.errors import UserError

#: What a metrics.json must have, and as what.
_NEEDED = {'metrics': dict, 'per_class': dict, 'config': str, 'checkpoint': dict, 'protocol': dict, 'data': dict,
           'environment': dict}
#: Figures that are no measure of quality.
_NO_METRICS = ('data_time', 'time')
#: No figure is beyond it; JSON holds numbers of any number of digits.
_LARGEST = 1e18
#: Longest value of a difference that is shown whole.
_LONGEST = 60


@dataclass(frozen=True)
class Result:
    """One result.

    Attributes:
        letter: ``'A'`` or ``'B'``.
        file: Its metrics.json.
        record: That file's content.
    """

    letter: str
    file: Path
    record: dict

    @property
    def predictions(self) -> Path:
        return self.file.parent / 'predictions'

    @property
    def name(self) -> str:
        """A short name: the folder's; ROW/SEED for a run of a suite."""
        folder = self.file.resolve().parent
        folder = folder.parent if folder.name == 'test' else folder
        return f'{folder.parent.name}/{folder.name}' if folder.name.isdigit() else folder.name

    @property
    def task(self) -> str:
        return 'segmentation' if any('IoU' in figures for figures in self.record['per_class'].values()) else 'detection'

    def sizes(self) -> dict[str, int]:
        """Labelled pixels or annotated objects of every class that has some."""
        size = SIZE[self.task]
        return {name: figures[size] for name, figures in self.record['per_class'].items() if size in figures}

    def facts(self) -> dict:
        """What tells this result from others, for a report."""
        checkpoint = self.record['checkpoint']
        return dict(name=self.name, path=str(self.file), config=self.record['config'], checkpoint=checkpoint.get('path'),
                    sha256=checkpoint.get('sha256'), iteration=checkpoint.get('iteration'),
                    images=self.record['data'].get('images'))


#: What the amount of a class in the data is called in a record.
SIZE = {'segmentation': 'pixels', 'detection': 'instances'}


@dataclass(frozen=True)
class Source:
    """Where data and classes are, if not where the results say.

    Attributes:
        data_root: Folder of the data set.
        config: Config file for both results.
        classes: As ``--classes`` of the tests.
        options: As ``--cfg-options`` of the tests.
    """

    data_root: str | None = None
    config: str | None = None
    classes: str | None = None
    options: dict | None = None


def open_result(path: str, letter: str) -> Result:
    """Read a result.

    Args:
        path: A folder that ``tools/test.py --out`` wrote, its metrics.json, or a suite's folder of one row and seed.
        letter: ``'A'`` or ``'B'``.

    Raises:
        UserError: If there is none, or it is no such file.
    """
    given = Path(path)
    places = [given / 'metrics.json', given / 'test' / 'metrics.json'] if given.is_dir() else [given]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        what = f'no {" nor ".join(str(place.relative_to(given)) for place in places)} in this folder' if given.is_dir() else (
            'no such file or folder')
        raise UserError(f'{letter}, {path}: {what}\nName a folder that was written by: python tools/test.py CONFIG CHECKPOINT '
                        f'--out DIR, or a row and seed of a suite (runs/ROW/SEED).')
    try:
        record = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{file}: cannot be read as JSON ({error})\nTest again with --out {file.parent}.') from error
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)]
    if wrong:
        raise UserError(f'{file}: no result of a test: it has no {", ".join(wrong)}\n'
                        f'metrics.json is written by tools/test.py --out DIR; test again.')
    if not record['per_class']:
        raise UserError(f'{file}: it has no figures of classes (per_class is empty), so there is nothing to compare\n'
                        f'Test with an evaluator of this project: IoUMetric or CocoMetric, on data with labels.')
    for name, figures in [('', record['metrics']), *record['per_class'].items()]:
        if not isinstance(figures, dict) or not all(
                value is None or type(value) in (int, float) and abs(value) <= _LARGEST  # NaN is not
                for value in figures.values()):
            place = f'per_class: the figures of {name:.80}' if name else 'metrics: the figures'
            raise UserError(f'{file}: {place} are no numbers: {str(figures)[:80]}\nTest again with --out {file.parent}.')
    return Result(letter, file, record)


def check_comparable(a: Result, b: Result) -> None:
    """Refuse results on different data.

    Raises:
        UserError: If task, number of images, classes, or the amount of some class in the labels differ.
    """
    def refuse(what: str) -> None:
        raise UserError(f'{a.file} and {b.file}: {what}\nDifferences between such results mean nothing. Test both checkpoints '
                        f'on the same data (--data-root) with the same classes (--classes).')

    if a.task != b.task:
        refuse(f'A is of {a.task}, B of {b.task}')
    images = [result.record['data'].get('images') for result in (a, b)]
    if images[0] != images[1]:
        refuse(f'different data: {images[0]} images in A, {images[1]} in B')
    sizes = a.sizes(), b.sizes()
    lost = [[name for name in sizes[i] if name not in sizes[1 - i]] for i in (0, 1)]
    if any(lost):
        refuse('different classes in the labels: ' + '; '.join(
            f'only in {letter}: {listed(names)}' for letter, names in zip('AB', lost, strict=True) if names))
    other = [f'{name} {size} and {sizes[1][name]}' for name, size in sizes[0].items() if size != sizes[1][name]]
    if other:
        refuse(f'different data: {SIZE[a.task]} of {len(other)} classes differ in the labels (A and B): {listed(other, 3)}')


def differences(a: Result, b: Result) -> list[dict]:
    """What was not alike: ``{'what': 'test' | 'training' | 'data' | 'environment', 'key', 'a', 'b'}``; values are texts."""
    def of(result: Result) -> Iterator[tuple[str, str, object]]:
        record = result.record
        yield 'training', 'iterations', record['checkpoint'].get('iteration')
        yield 'test', 'reparameterized', record.get('reparameterized')
        for key, value in _flat(record['protocol']):
            yield 'test', key, value
        yield 'data', 'root', record['data'].get('root')
        for key, value in _flat(record['environment']):
            yield 'environment', key, value

    values = [{(what, key): value for what, key, value in of(result)} for result in (a, b)]
    keys = dict.fromkeys([*values[0], *values[1]])
    return [dict(what=what, key=key, a=_shown(values[0], (what, key)), b=_shown(values[1], (what, key)))
            for what, key in keys if values[0].get((what, key)) != values[1].get((what, key))]


def _flat(node, path: str = '') -> Iterator[tuple[str, object]]:
    # A list of plain values is one value: the scale of a Resize, for one.
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) and any(
        isinstance(part, (dict, list)) for part in node) else None
    if entries is None:
        yield path, node
    for key, value in entries or ():
        yield from _flat(value, f'{path}.{key}' if path else str(key))


def _shown(values: dict, key: tuple[str, str]) -> str:
    if key not in values:
        return 'absent'
    text = str(values[key])
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST - 4]} ...'


def metrics(a: Result, b: Result) -> list[dict]:
    """Overall figures side by side: ``{'name', 'a', 'b', 'difference'}``; None for what one does not have."""
    found = [result.record['metrics'] for result in (a, b)]
    names = [name for name in dict.fromkeys([*found[0], *found[1]]) if name not in _NO_METRICS and any(
        isinstance(figures.get(name), (int, float)) for figures in found)]
    return [dict(name=name, **_pair(found[0].get(name), found[1].get(name))) for name in names]


def per_class(a: Result, b: Result, figure: str) -> list[dict]:
    """One figure of every class in the labels: ``{'name', 'a', 'b', 'difference', 'size'}``, what differs most first.

    Raises:
        UserError: If a result does not have the figure.
    """
    for result in (a, b):
        if not any(figure in figures for figures in result.record['per_class'].values()):
            known = dict.fromkeys(key for figures in result.record['per_class'].values() for key in figures)
            raise UserError(f'{result.file}: the classes have no {figure}; there are {listed(list(known))}\n'
                            f'Test both with the same evaluator.')
    found, sizes = [result.record['per_class'] for result in (a, b)], a.sizes()
    rows = [dict(name=name, **_pair(*(figures.get(name, {}).get(figure) for figures in found)), size=sizes.get(name))
            for name in found[0]]
    return sorted(rows, key=lambda row: -abs(row['difference'] or 0))


def _pair(a: float | None, b: float | None) -> dict:
    return dict(a=a, b=b, difference=None if a is None or b is None else b - a)


def config_of(result: Result, source: Source, root: str | None) -> Config:
    """The config of a result, its data sets at ``root`` and with the classes of ``source``.

    Raises:
        UserError: If it is not there any more, or does not fit.
    """
    path = source.config or result.record['config']
    if not source.config and '::' not in path and not Path(path).is_file():
        raise UserError(f'{result.file}: its config is not there any more: {path} (from {Path.cwd()})\n'
                        f'Start where the test was started, or name the file with --config FILE.')
    if not source.config and not _is_known(path):
        raise UserError(f'{result.file}: its config, {path}, is a program, and neither in configs/ nor of a package: that a '
                        f'result names it is no reason to run it\n'
                        f'If it is yours, or you have read it: --config {shlex.quote(path)}')
    cfg = load_config(path, source.options)
    if root:
        set_data_root(cfg, root)
    if source.classes is not None:
        use_classes(cfg, source.classes, ('test',))
    return cfg


def _is_known(path: str) -> bool:
    """Whether a config is one of an installed package, of this project, or in ``configs`` of the working directory."""
    package, installed, _ = path.partition('::')
    roots = [file_of(f'{package}::.')] if installed else [Path('configs'), Path(__file__).parents[3] / 'configs']
    return any(file_of(path).resolve().is_relative_to(root.resolve()) for root in roots)


def data_root(a: Result, b: Result, source: Source) -> str | None:
    """Where both results' data set is; None if it is several, which only the config tells apart.

    Raises:
        UserError: If it is where neither result says.
    """
    if source.data_root:
        if not Path(source.data_root).is_dir():
            raise UserError(f'--data-root {source.data_root}: no such folder')
        return source.data_root
    for result in (a, b):
        root = str(result.record['data'].get('root'))
        if Path(root).is_dir():
            return root
        if ', ' in root and all(Path(part).is_dir() for part in root.split(', ')):
            return None
    places = ', '.join(dict.fromkeys(f'{result.record["data"].get("root")} ({result.file})' for result in (a, b)))
    raise UserError(f'the data set is not where it was tested: {places}; looked from {Path.cwd()}\n'
                    f'Name its folder with --data-root DIR. --no-images compares the figures alone.')
