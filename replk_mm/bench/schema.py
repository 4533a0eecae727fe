"""The schema of the benchmark: suite files, and the records that measurements append.

The field descriptions are the documentation. This command generates the tables of ``docs/suites.md`` from them::

    python -m replk_mm.bench.schema docs/suites.md
"""

import hashlib
import json
import math
import re
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from replk_mm import published
from replk_mm.analysis.corruptions import RobustnessSettings
from replk_mm.errors import UserError, did_you_mean, format_list
from replk_mm.text import update_page

VERSION = 1
#: Measurements that a suite may request; ``train`` is added to rows with a training budget.
Requested = Literal['complexity', 'metric', 'curve', 'erf', 'shape_bias', 'robustness', 'speed', 'memory']
Measurement = Literal['train', Requested]
#: In the order in which they are made.
MEASUREMENTS: tuple[str, ...] = get_args(Measurement)
#: Measurements that random weights allow.
WITHOUT_WEIGHTS = ('complexity', 'erf', 'speed', 'memory')
_BUDGETS = ('iterations', 'schedule', 'checkpoint')
#: Keys that describe a training, with their defaults.
_TRAINING = dict(protocol='finetune', fraction=100, pretrained=None, learning_rates=None)


class _Strict(BaseModel):
    """Values have the stated type, without conversion, and no other keys exist."""

    model_config = ConfigDict(strict=True, extra='forbid', frozen=True)


Shape = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class ErfImages(_Strict):
    """Images for the effective receptive field: their side in pixels, and how many."""

    size: PositiveInt | None = None
    count: PositiveInt | None = None


class SuiteData(_Strict):
    """The data of all rows of a suite."""

    root: str | None = Field(None, description='a data set; excludes the other keys')
    scenes: str | None = Field(None, description='kind of procedural scenes, as of `tools/make_demo_data.py`')
    layout: str | None = Field(None, description='`ade20k`, `cityscapes` or `coco`; default: what the config reads')
    train: int = Field(200, description='number of training images')
    val: int = Field(40, description='number of validation images')
    seed: int = Field(0, description='of the scenes')
    size: Shape = Field([256, 256], description='`[HEIGHT, WIDTH]` of the images in pixels')

    @model_validator(mode='after')
    def _root_or_scenes(self) -> 'SuiteData':
        found = self.model_fields_set
        if found and found != {'root'} and ('root' in found or 'scenes' not in found):
            raise ValueError(f'expected either root, or scenes and the other keys; found {", ".join(sorted(found))}')
        return self


class Defaults(_Strict):
    """Keys that rows may have in common: all but ``name`` and ``label``."""

    config: str | None = Field(
        None, description='a path, also relative to the suite file; a name in `configs/`; `mmseg::...`; `mmdet::...`'
    )
    options: dict[str, Any] = Field({}, description='as `--cfg-options`; added to the options of `defaults`')
    backbone: str | None = Field(
        None, description='name in the catalogue, as `--backbone`; exchanges the backbone of the config'
    )
    protocol: Literal['finetune', 'linear', 'head', 'scratch'] = Field(
        'finetune',
        description='what is trained, see [protocols.md](protocols.md): `finetune`, the whole network; `linear`, a '
        'linear layer on fixed features; `head`, the heads on a fixed backbone; `scratch`, the whole network from '
        'random weights',
    )
    fraction: Literal[1, 5, 10, 25, 100] = Field(
        100, description='of the training images, in percent; the seed chooses them, equally for all rows'
    )
    pretrained: str | None = Field(
        None,
        description='initial weights of the backbone, as `--pretrained`; `none` is random weights, the floor of '
        '`linear` and `head`; `{row}`, `{seed}` and `{backbone}` are replaced',
    )
    recipe: Literal['authors', 'common'] | None = Field(
        None,
        description='origin of learning rate and schedule: `authors`, as published; `common`, that of the config; '
        'default: `authors` to fine-tune pretrained weights with a published recipe, else `common`',
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=2,
        description='of which the best is used: each trains on four fifths of the training images and is scored on the '
        'others, never on test images; equally many for each row',
    )
    seeds: list[Seed] = Field([0], min_length=1, description='one training each; default: `[0]`')
    iterations: PositiveInt | None = Field(None, description='train this long, warm-up and decay in proportion')
    schedule: Literal['full'] | None = Field(None, description='`full`: train as the config says')
    checkpoint: str | None = Field(
        None,
        description='trained weights, or the folder of an exported network; `{row}`, `{seed}` and `{backbone}` are '
        'replaced',
    )
    measure: list[Requested] = Field(
        ['complexity', 'metric', 'speed', 'memory'],
        description='see below; default: `metric`, `complexity`, `speed` and `memory`',
    )
    published: bool = Field(True, description='`false`: show no published figures next to this row')
    pretraining: str | None = Field(None, description='of the backbone; default: known from the name of the weights')
    shape: Shape | None = Field(None, description="`[HEIGHT, WIDTH]` for `speed` and `memory`; default: config's crop")
    batch: PositiveInt | None = Field(None, description='images for `speed` and `memory`; default: as few as possible')
    macs_shape: Shape | None = Field(
        None, description="`[HEIGHT, WIDTH]` for `complexity`; default: as published, or config's crop"
    )
    erf: ErfImages = Field(
        ErfImages(), description="`{size: PIXELS, count: IMAGES}`; default: config's crop, 50 images"
    )
    robustness: RobustnessSettings = Field(
        RobustnessSettings(),
        description='`{images: N, corruptions: [NAME, ...], severities: [1, ...], scales: [0.5, ...], '
        'shifted_root: DIR, seed: N}`; default: 50 images, all corruptions and severities, 0.5 to 2, no other data',
    )
    data_root: str | None = Field(None, description='data of this row')
    classes: str | list[str] | None = Field(None, description='a list of names, or as `--classes`, such as `auto`')
    preflight: bool = Field(True, description='`false`: skip the dry run before the training')

    @field_validator('seeds', 'learning_rates')
    @classmethod
    def _different(cls, values: list | None) -> list | None:
        if values and len(set(values)) < len(values):
            raise ValueError('a value is listed twice')
        return values

    @model_validator(mode='after')
    def _one_budget(self) -> 'Defaults':
        budgets = [key for key in _BUDGETS if getattr(self, key) is not None]
        budgets += ['protocol: linear'] * (self.protocol == 'linear')
        if len(budgets) > 1:
            raise ValueError(
                f'has both {budgets[0]} and {budgets[1]}\n'
                f'A row is trained (iterations, schedule: full or protocol: linear) or has a checkpoint.'
            )
        if self.protocol == 'scratch' and self.pretrained not in (None, 'none'):
            raise ValueError(f'protocol scratch starts from random weights\nRemove pretrained: {self.pretrained}.')
        if self.recipe == 'authors' and self.protocol != 'finetune':
            raise ValueError(f'recipe authors is for fine-tuning, not for protocol {self.protocol}\nUse common.')
        return self


class SuiteRow(Defaults):
    """A network of a suite: trained, loaded from a checkpoint, or with random weights."""

    name: str = Field(description='unique; lower-case letters, digits, `.`, `_`, `-`; a letter or digit first')
    label: str = Field(description='what reports show; default: the name')
    config: str = Field(description=str(Defaults.model_fields['config'].description))

    @field_validator('name')
    @classmethod
    def _names_files(cls, name: str) -> str:
        return _file_name(name, '._-')

    @model_validator(mode='after')
    def _possible(self) -> 'SuiteRow':
        needs = [name for name in self.measure if name not in WITHOUT_WEIGHTS]
        if not self.measurements():
            raise ValueError('has nothing to train and nothing to measure')
        if self.checkpoint and '{seed}' not in self.checkpoint and len(self.seeds) > 1:
            raise ValueError(
                f'{len(self.seeds)} seeds, but one checkpoint for all: {self.checkpoint}\n'
                f'Put {{seed}} into its name, or set seeds: [0].'
            )
        if not self.trains and not self.checkpoint and needs:
            raise ValueError(
                f'{needs[0]} needs trained weights\nSet iterations, schedule: full or checkpoint; random '
                f'weights allow {", ".join(WITHOUT_WEIGHTS)}.'
            )
        if 'curve' in self.measure and (not self.trains or self.protocol == 'linear'):
            raise ValueError('curve needs a training\nSet iterations or schedule: full; linear has no curve.')
        if not self.trains and self.training_keys():
            raise ValueError(f'{next(iter(self.training_keys()))} has no effect without a training\nRemove it.')
        return self

    def training_keys(self) -> dict[str, Any]:
        """What differs from fine-tuning on all training images at the learning rate of the config."""
        return {key: getattr(self, key) for key, usual in _TRAINING.items() if getattr(self, key) != usual}

    @property
    def trains(self) -> bool:
        """Whether there is something to train."""
        return self.iterations is not None or self.schedule is not None or self.protocol == 'linear'

    def measurements(self) -> tuple[str, ...]:
        """Measurements of the row, in the order in which they are made."""
        return tuple(m for m in MEASUREMENTS if m in self.measure or (m == 'train' and self.trains))

    def checkpoint_of(self, seed: int) -> str | None:
        """The file of trained weights, if the row names one."""
        return self._file(self.checkpoint, seed)

    def pretrained_of(self, seed: int) -> str | None:
        """Initial weights of the backbone; ``'none'`` for random ones, None for those of the config."""
        return 'none' if self.protocol == 'scratch' else self._file(self.pretrained, seed)

    def _file(self, name: str | None, seed: int) -> str | None:
        backbone = self.backbone or ''
        return name and name.replace('{row}', self.name).replace('{seed}', str(seed)).replace('{backbone}', backbone)


class Suite(_Strict):
    """A suite file."""

    path: Path = Field(Path(), exclude=True)
    name: str = Field(description='names the work dir, `work_dirs/suites/NAME`')
    question: str = Field('', description='what the suite answers, a line for the report')
    quotes: list[str] = Field([], description='published tables that the report shows, such as `guidelines.shortcut`')
    data: SuiteData = Field(
        SuiteData(), description="of all rows; default: each config's own. `--data-root DIR` overrides it"
    )
    defaults: Defaults = Field(Defaults(), description='any key of a row but `name` and `label`')
    rows: list[SuiteRow] = Field(
        min_length=1, description='at least one; a word is a row with that `backbone`, named after it'
    )

    @model_validator(mode='before')
    @classmethod
    def _merge_defaults(cls, given: Any) -> Any:
        defaults, rows = given.get('defaults', {}), given.get('rows')
        if not isinstance(defaults, dict) or not isinstance(rows, list):
            return given  # the fields are invalid, which their own errors tell
        rows = [_named_row(row) if isinstance(row, str) else row for row in rows]
        return {**given, 'rows': [_with_defaults(row, defaults) if isinstance(row, dict) else row for row in rows]}

    @field_validator('name')
    @classmethod
    def _names_folder(cls, name: str) -> str:
        return _file_name(name, '_-')

    @field_validator('question')
    @classmethod
    def _one_line(cls, question: str) -> str:
        return ' '.join(question.split())

    @field_validator('quotes')
    @classmethod
    def _published(cls, quotes: list[str]) -> list[str]:
        known = published.table('quotes')
        if unknown := set(quotes) - set(known):
            raise ValueError(
                f'{format_list(sorted(unknown))} is no published table\nKnown tables: {format_list(known)}.'
            )
        return quotes

    @field_validator('rows')
    @classmethod
    def _comparable(cls, rows: list[SuiteRow]) -> list[SuiteRow]:
        names = [row.name for row in rows]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f'{twice!r} names {names.count(twice)} rows\nGive each row its own name.')
        counts = {row.name: len(row.learning_rates) for row in rows if row.learning_rates}
        if len(set(counts.values())) > 1:
            first, *_, last = sorted(counts, key=lambda name: counts[name])
            raise ValueError(
                f'{first} has {counts[first]} learning_rates, {last} has {counts[last]}\nTry equally many in each row.'
            )
        return rows

    def pairs(self) -> list[tuple[SuiteRow, int]]:
        """Every row with each of its seeds; ``--only`` and ``--list`` number them in this order."""
        return [(row, seed) for row in self.rows for seed in row.seeds]


def _named_row(backbone: str) -> dict:
    """The row that a word in the list of rows stands for."""
    return dict(name=re.sub(r'[^a-z0-9._-]+', '-', backbone.lower()), label=backbone, backbone=backbone)


def _with_defaults(row: dict, defaults: dict) -> dict:
    if any(key in row for key in _BUDGETS) or row.get('protocol') == 'linear':  # replaces the budget of the defaults
        defaults = {key: value for key, value in defaults.items() if key not in _BUDGETS}
    merged = {'label': row.get('name'), **defaults, **row}
    common, own = defaults.get('options'), row.get('options')
    if isinstance(common, dict) and isinstance(own, dict):
        merged['options'] = {**common, **own}
    exchange = {key: merged[key] for key in ('backbone', 'recipe') if merged.get(key) is not None}
    if merged.get('protocol', 'finetune') != 'finetune':
        exchange = {'recipe': 'common', **exchange}
        if merged['protocol'] in ('linear', 'head'):
            exchange['freeze_backbone'] = True
    if exchange and isinstance(merged.get('options', {}), dict):
        merged['options'] = {**merged.get('options', {}), **exchange}
    return merged


def _file_name(name: str, marks: str) -> str:
    if not re.fullmatch(f'[a-z0-9][a-z0-9{marks}]*', name) or name.isdigit():
        raise ValueError(
            f'{name!r} cannot name files\nUse lower-case letters, digits and {" ".join(marks)}, beginning '
            f'with a letter or digit; not digits alone, which number rows for --only.'
        )
    return name


class _Loader(yaml.SafeLoader):
    """YAML 1.1 whose numbers are those of Python: ``1e-3``, without a point, is one."""


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$'), list('-+0123456789')
)


def read_suite(path: str | Path) -> Suite:
    """Read and validate a suite file.

    Raises:
        UserError: If it cannot be read, or something in it is unknown, missing or contradicts itself.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), _Loader)
    except OSError as error:
        raise UserError(
            f'{path}: no such suite ({error.strerror})\nShipped ones are named replk_mm::suites/NAME.yaml.'
        ) from error
    except Exception as error:  # PyYAML raises anything on values that it cannot construct
        raise UserError(f'{path}: not valid YAML: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise UserError(
            f'{path}: expected a mapping with name and rows; found {reprlib.repr(content)}\n'
            f'docs/suites.md shows a whole suite.'
        )
    try:
        return Suite.model_validate(content).model_copy(update=dict(path=path))
    except ValidationError as error:
        raise UserError(f'{path}: {_explain(error, content)}') from error


def _explain(error: ValidationError, content: dict) -> str:
    """The first unknown key, or else the first error, as ``rows[2] (name): field: what``, followed by advice."""
    first = min(error.errors(include_url=False), key=lambda one: one['type'] != 'extra_forbidden')
    *parents, last = first['loc'] or ('',)
    place = ''
    for i, part in enumerate(first['loc']):
        place += f'[{part}]' if isinstance(part, int) else f'{": " * (i > 0)}{part}'
        if i == 1 and parents[:1] == ['rows'] and isinstance(part, int) and isinstance(content['rows'][part], dict):
            place += f' ({content["rows"][part].get("name", "?")})'
    if first['type'] == 'extra_forbidden':
        parent = next((part for part in reversed(parents) if isinstance(part, str)), '')
        models: dict[str, type[BaseModel]] = dict(
            rows=SuiteRow, data=SuiteData, defaults=Defaults, erf=ErfImages, robustness=RobustnessSettings
        )
        known = models.get(parent, Suite).model_fields.keys() - {'path'}
        return f'{place}: unknown key\n{did_you_mean(last, known)}Known keys: {", ".join(sorted(known))}.'
    if first['type'] == 'missing':
        return f'{place} is missing\ndocs/suites.md shows a whole suite.'
    if first['type'] == 'value_error':
        return f'{place}: {first["ctx"]["error"]}'
    return f'{place}: {first["msg"]}; found {reprlib.repr(first["input"])}\ndocs/suites.md describes every key.'


class Record(BaseModel):
    """One measurement of one row and seed: a line of JSON. Percentages are 0 to 100, COCO's AP too."""

    model_config = ConfigDict(strict=True, extra='allow')

    version: Literal[1] = Field(description='of this schema')
    suite: str = Field(description='name of the suite')
    question: str = Field(description='that the suite answers')
    row: str = Field(description='name of the row')
    label: str = Field(description='of the row')
    seed: int = Field(description='of the training')
    measurement: Measurement = Field(description=', '.join(f'`{name}`' for name in MEASUREMENTS))
    status: Literal['done', 'failed'] = Field(description='`done` or `failed`')
    reason: str | None = Field(description='why it failed')
    values: dict[str, Any] = Field(description='the figures')
    protocol: dict[str, Any] = Field(description='must be equal for values to be ranked: data, budget, device ...')
    facts: dict[str, Any] = Field(description='anything else')
    config: dict[str, Any] = Field(description='path, SHA-256 of what it resolves to, options')
    checkpoint: dict[str, Any] | None = Field(description='the weights: path, SHA-256, iteration, trained here or not')
    published: dict[str, Any] | None = Field(description='what the paper reports')
    git: dict[str, Any] | None = Field(description='commit, and whether files differ from it')
    environment: dict[str, Any] = Field(description='versions, CPU, GPU, threads')
    started: str = Field(description='time in UTC, ISO 8601 with microseconds')
    seconds: float = Field(description='that the measurement took')
    files: dict[str, Any] = Field(description='paths relative to the work dir, by what they are')
    key: str = Field(description='identifies what was measured, for `--resume`')
    quotes: list[str] = Field([], description='published tables of the suite; absent in older records')
    asked: list[Any] = Field([], description='all measurements of the row; absent in older records')

    @model_validator(mode='after')
    def _sound(self) -> 'Record':
        if self.status == 'failed' and not self.reason:
            raise ValueError('failed without a reason')
        for place in _not_finite(self.__dict__, ''):
            raise ValueError(f'{place} is not a finite number')
        return self


def _not_finite(node: object, place: str) -> Iterator[str]:
    """The places of numbers that JSON does not have."""
    if isinstance(node, float) and not math.isfinite(node):
        yield place
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in items:
        yield from _not_finite(value, f'{place}.{key}' if place else str(key))


def record_problem(record: object) -> str | None:
    """The reason why an object is not a record of this version; None if it is one."""
    if not isinstance(record, dict):
        return f'not a record: {type(record).__name__} instead of an object'
    if record.get('version') != VERSION:
        return f'version {record.get("version")!r}; this replk_mm reads version {VERSION}'
    try:
        Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = '.'.join(map(str, first['loc']))
        return f'{place}: {first["msg"]}' if place else str(first['ctx']['error'])
    return None


def fingerprint(data: object) -> str:
    """SHA-256 of plain data, in hexadecimal; the order of a dict's keys does not matter."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def table(model: type[BaseModel]) -> str:
    """The fields of a model as a Markdown table."""
    names = sorted(model.model_fields, key=lambda name: model is SuiteRow and name not in ('name', 'label'))
    lines = [f'| `{name}` | {text} |\n' for name in names if (text := model.model_fields[name].description)]
    return ''.join(['| Key | |\n', '| --- | --- |\n', *lines])


#: The tables of ``docs/suites.md``, by the name of their block.
TABLES: dict[str, type[BaseModel]] = dict(suite=Suite, data=SuiteData, row=SuiteRow, record=Record)

if __name__ == '__main__':
    for name, model in TABLES.items():
        update_page(Path(sys.argv[1]), name, table(model))
