"""A suite: which networks are trained or taken, from which seeds, and what is measured of each; read from a YAML file."""
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replk_mm.bench.records import MEASUREMENTS
from replk_mm.bench.suites import suite_file
from replk_mm.errors import UserError

#: What a suite may ask for; ``train`` comes by itself where a row has a training budget.
ASKED = tuple(name for name in MEASUREMENTS if name != 'train')
#: What there is to measure of a network whose weights are random.
WITHOUT_WEIGHTS = ('complexity', 'erf', 'speed', 'memory')
_BUDGETS = ('iterations', 'schedule', 'checkpoint')
_SEEDS = 2**32


@dataclass(frozen=True)
class Row:
    """A network of a suite.

    Attributes:
        name: Unique in the suite; names files.
        label: As a report shows it.
        config: As the suite file names it: a path, the name of one of ``configs/``, or ``PACKAGE::NAME.py``.
        options: Overrides of config fields, as of ``--cfg-options``.
        seeds: Of one training each.
        iterations: Training budget, the schedule in proportion; None for another one.
        schedule: ``'full'`` for the config's own schedule, or None.
        checkpoint: Trained weights instead of a training, with ``{row}`` and ``{seed}``; None for none. A row without a budget
            either has random weights.
        measure: Of :data:`ASKED`, in their order.
        published: Whether a published row of the config belongs beside its results.
        pretraining: What the backbone was pretrained on; None for what is known of the config's weights.
        shape: Height and width in pixels of what speed and memory are measured on; None for the config's crop.
        macs_shape: Of what complexity is counted on; None for the published row's input, or else the config's crop.
        batch: Images of the batch that speed and memory are measured on; 0 for as few as possible.
        erf: ``size`` of the images in pixels and their ``count`` for the effective receptive field; empty for the config's
            crop and 50.
        data_root: Of this row's data; None for the suite's or the config's.
    """

    name: str
    label: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    iterations: int | None = None
    schedule: str | None = None
    checkpoint: str | None = None
    measure: tuple[str, ...] = ('complexity', 'metric', 'speed', 'memory')
    published: bool = True
    pretraining: str | None = None
    shape: tuple[int, int] | None = None
    macs_shape: tuple[int, int] | None = None
    batch: int = 0
    erf: Mapping[str, int] = field(default_factory=dict)
    data_root: str | None = None

    @property
    def trains(self) -> bool:
        """Whether there is something to train."""
        return self.iterations is not None or self.schedule is not None

    def measurements(self) -> tuple[str, ...]:
        """What is to be recorded, in the order in which it is done."""
        return tuple(m for m in MEASUREMENTS if m in self.measure or (m == 'train' and self.trains))

    def checkpoint_of(self, seed: int) -> str | None:
        """The file of trained weights, if the row names one."""
        return self.checkpoint and self.checkpoint.replace('{row}', self.name).replace('{seed}', str(seed))


@dataclass(frozen=True)
class Suite:
    """A suite file.

    Attributes:
        path: Of the file.
        name: Of the suite; names its work dir.
        question: That it is to answer, a line.
        data: Of all rows: ``{'scenes': ...}`` to write, ``{'root': ...}``, or empty for each config's own.
        rows: At least one.
    """

    path: Path
    name: str
    question: str
    data: Mapping[str, Any]
    rows: tuple[Row, ...]

    def pairs(self) -> list[tuple[Row, int]]:
        """Every row with each of its seeds; a pair's place in this list is its number."""
        return [(row, seed) for row in self.rows for seed in row.seeds]


def read_suite(path: str | Path) -> Suite:
    """Read and check a suite file.

    Raises:
        UserError: If it cannot be read, or something in it is unknown, missing or contradicts itself.
    """
    path = Path(path)
    place = str(path)
    content = suite_file.read(path)
    found = _known(content, place, name='text', question='text', data='a mapping', defaults='a mapping', rows='a list')
    for key in ('name', 'rows'):
        if not found.get(key):
            raise UserError(f'{place}: {key} is missing\ndocs/suites.md shows a whole suite.')
    _check_name(found['name'], f'{place}: name', '_-')
    defaults = _row_keys(found.get('defaults') or {}, f'{place}: defaults', config=False)
    rows = tuple(_row(given, defaults, f'{place}: rows[{i}]') for i, given in enumerate(found['rows']))
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f'{place}: rows: {twice!r} names {names.count(twice)} rows\nGive each row a name of its own.')
    return Suite(path, found['name'], ' '.join((found.get('question') or '').split()), _data(found.get('data') or {}, place),
                 rows)


_TYPES: dict[str, tuple[type, ...]] = {
    'text': (str,), 'a mapping': (dict,), 'a list': (list,), 'a whole number': (int,), 'yes or no': (bool,)}
_ROW_KEYS = dict(
    name='text', label='text', config='text', options='a mapping', seeds='a list', iterations='a whole number',
    schedule='text', checkpoint='text', measure='a list', published='yes or no', pretraining='text', shape='a list',
    macs_shape='a list', batch='a whole number', erf='a mapping', data_root='text')


def _known(given: object, place: str, **kinds: str) -> dict[str, Any]:
    """``given`` if it is a mapping with keys of these kinds only."""
    if not isinstance(given, dict):
        raise UserError(f'{place}: a mapping is needed; found {given!r:.80}\nKeys: {", ".join(kinds)}.')
    for key, value in given.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, n=1)
            raise UserError(f'{place}: unknown key {key!r}\n'
                            + (f'Did you mean {close[0]}? ' if close else '') + f'There are: {", ".join(kinds)}.')
        types = _TYPES[kinds[key]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f'{place}: {key} is {kinds[key]}; found {value!r:.80}')
    return given


def _check_name(name: str, place: str, marks: str) -> None:
    if not re.fullmatch(f'[a-z0-9][a-z0-9{marks}]*', name) or name.isdigit():
        raise UserError(f'{place}: {name!r} does not do, for it names files\n'
                        f'Use small letters, digits and {" ".join(marks)}; a letter or digit first, and not digits alone, '
                        f'which number rows for --only.')


def _row_keys(content: object, place: str, config: bool = True) -> dict[str, Any]:
    kinds = {key: kind for key, kind in _ROW_KEYS.items() if config or key not in ('name', 'label')}
    found = dict(_known(content, place, **kinds))
    budgets = [key for key in _BUDGETS if key in found]
    if len(budgets) > 1:
        raise UserError(f'{place}: has both {budgets[0]} and {budgets[1]}\n'
                        f'A row is trained (iterations, or schedule: full) or takes a checkpoint.')
    unnamed = next((key for key in found.get('options', ()) if not isinstance(key, str)), None)
    if unnamed is not None:
        raise UserError(f'{place}: options: {unnamed!r} names no field of a config\nName one, such as model.backbone.arch.')
    given = {**found, **_known(found.get('erf', {}), f'{place}: erf', size='a whole number', count='a whole number')}
    for key in ('iterations', 'batch', 'size', 'count'):
        if given.get(key, 1) < 1:
            raise UserError(f'{place}: {key} is at least 1; found {given[key]}')
    if found.get('schedule', 'full') != 'full':
        raise UserError(f"{place}: schedule: {found['schedule']!r}; there is 'full' only\n"
                        f'A shorter training has iterations: N.')
    if 'seeds' in found:
        found['seeds'] = _seeds(found['seeds'], place)
    for key in ('shape', 'macs_shape'):
        if key in found:
            found[key] = _shape(found[key], f'{place}: {key}')
    for name in found.get('measure', ()):
        if name not in ASKED:
            raise UserError(f'{place}: measure: {name!r} is unknown\nThere are: {", ".join(ASKED)}.')
    return found


def _seeds(given: list, place: str) -> tuple[int, ...]:
    if not given or len(set(map(repr, given))) < len(given) or any(
            not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _SEEDS for seed in given):
        raise UserError(f'{place}: seeds are different whole numbers from 0 to {_SEEDS - 1}; found {given!r:.80}')
    return tuple(given)


def _shape(given: list, place: str) -> tuple[int, int]:
    if len(given) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in given):
        raise UserError(f'{place}: [HEIGHT, WIDTH] in pixels is needed; found {given!r:.80}')
    return given[0], given[1]


def _row(given: object, defaults: dict[str, Any], place: str) -> Row:
    own = _row_keys(given, place)
    if 'name' not in own:
        raise UserError(f'{place}: name is missing\nEvery row has a name and a config.')
    _check_name(own['name'], f'{place}: name', '._-')
    place = f'{place} ({own["name"]})'
    if any(key in own for key in _BUDGETS):  # a row's budget takes the place of whatever the defaults have
        defaults = {key: value for key, value in defaults.items() if key not in _BUDGETS}
    merged = {**defaults, **own, 'options': {**defaults.get('options', {}), **own.get('options', {})}}
    if 'config' not in merged:
        raise UserError(f'{place}: config is missing\nName one of configs/, a file, or PACKAGE::NAME.py.')
    if 'measure' in merged:
        merged['measure'] = tuple(merged['measure'])
    row = Row(**{'label': own['name'], **merged})
    if not row.measurements():
        raise UserError(f'{place}: has nothing to train and nothing to measure')
    if row.checkpoint and '{seed}' not in row.checkpoint and len(row.seeds) > 1:
        raise UserError(f'{place}: {len(row.seeds)} seeds, but one checkpoint for all: {row.checkpoint}\n'
                        f'Put {{seed}} into its name, or set seeds: [0].')
    needs = [name for name in row.measure if name not in WITHOUT_WEIGHTS]
    if not row.trains and not row.checkpoint and needs:
        raise UserError(f'{place}: {needs[0]} needs trained weights\n'
                        f'Give the row iterations, schedule: full or checkpoint; without, there are: '
                        f'{", ".join(WITHOUT_WEIGHTS)}.')
    if 'curve' in row.measure and not row.trains:
        raise UserError(f'{place}: curve needs a training\nGive the row iterations or schedule: full.')
    return row


def _data(given: dict, place: str) -> dict[str, Any]:
    found = _known(given, f'{place}: data', scenes='text', layout='text', train='a whole number', val='a whole number',
                   seed='a whole number', size='a list', root='text')
    if 'root' in found and len(found) > 1 or found and not {'root', 'scenes'} & found.keys():
        raise UserError(f'{place}: data: either root, or scenes with train, val, seed, size and layout; found '
                        f'{", ".join(found)}')
    if 'size' in found:
        found['size'] = list(_shape(found['size'], f'{place}: data: size'))
    return found
