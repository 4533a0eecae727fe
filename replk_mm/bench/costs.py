"""Costs on another device: the output of ``tools/benchmark.py --json`` there, as speed and memory of rows here."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, ValidationError

from replk_mm.bench.records import StoredRecord
from replk_mm.errors import UserError, command_line, format_list

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Row(BaseModel):
    name: str
    dtype: str
    milliseconds: dict[Literal['median', 'low', 'high'], _Positive] = Field(min_length=3)
    memory_bytes: PositiveInt | None = None
    joules: _Positive | None = None


class _Point(BaseModel):
    mode: str
    form: Literal['training', 'reparameterized']
    batch: PositiveInt
    height: PositiveInt
    width: PositiveInt
    load: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    rows: list[_Row]


class _Benchmark(BaseModel):
    """The part of ``benchmark.json`` that is read."""

    what: Literal['backbone', 'model']
    config: str
    cfg_options: dict[str, Any] = {}
    points: list[_Point]
    environment: dict[str, Any]


#: By network, its name and the options that change its backbone: fields of its records, by measurement.
Costs = dict[tuple[str, str], dict[str, dict[str, Any]]]


def _network(config: str, options: Mapping[str, Any]) -> tuple[str, str]:
    name = options.get('backbone') or Path(config.rpartition('::')[2]).stem
    return str(name), str(sorted((k, v) for k, v in options.items() if k.startswith('model.backbone')))


def read_costs(paths: Iterable[str | Path]) -> Costs:
    """Read outputs of ``tools/benchmark.py backbone`` or ``model``, a file for each network.

    Raises:
        UserError: If a file is something else, has several sizes or batches, or repeats a network.
    """
    found: Costs = {}
    for path in paths:
        network, fields = _read(path)
        if network in found:
            raise UserError(
                f'{path}: {network[0]} is also in {found[network]["speed"]["facts"]["costs"]}\nName one of the files.'
            )
        found[network] = fields
    return found


def _read(path: str | Path) -> tuple[tuple[str, str], dict[str, dict[str, Any]]]:
    options = ('--backbone', 'NAME', '--shape', 'H', 'W', '--mode', 'inference', '--json')
    again = f'Write it there with: {command_line("benchmark", "model", "CONFIG", *options)}'
    try:
        content = _Benchmark.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})\n{again}') from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = '.'.join(map(str, first['loc'])) or 'the file'
        raise UserError(f'{path}: not the output of a benchmark: {place}: {first["msg"]}\n{again}') from error
    points = [point for point in content.points if point.mode == 'inference']
    # The first precision that was asked for.
    pairs = [(point, row) for point in points for row in point.rows if row.name.startswith('ours')][: len(points)]
    if len(points) != 1 or not pairs:
        sizes = format_list(f'{p.batch} x {p.height} x {p.width}' for p in points) or 'training only'
        raise UserError(f"{path}: points: expected one of inference with a row 'ours'; found {sizes}\n{again}")
    [(point, row)], env = pairs, content.environment
    ms = row.milliseconds
    times = dict(median_ms=ms['median'], low_ms=ms['low'], high_ms=ms['high'], joules=row.joules)
    times['throughput'] = 1e3 * point.batch / ms['median']
    protocol = dict(
        device=env.get('gpu') or 'cpu',
        **{key: env.get(key) for key in ('cpu', 'threads', 'torch')},
        **dict(shape=[point.height, point.width], batch=point.batch, precision=row.dtype),
        timed='backbone alone' if content.what == 'backbone' else f'model of {Path(content.config).name}',
    )
    values: dict[str, dict] = dict(speed=dict(forms={point.form: times}, batch=point.batch))
    if row.memory_bytes:
        values['memory'] = dict(inference_bytes=row.memory_bytes)
    shared = dict(status='done', reason=None, checkpoint=None, files={}, protocol=protocol)
    shared['facts'] = dict(load=point.load, costs=str(path))
    fields = {name: dict(shared, measurement=name, values=one) for name, one in values.items()}
    return _network(content.config, content.cfg_options), fields


def replace_costs(found: Sequence[StoredRecord], costs: Costs) -> tuple[list[StoredRecord], list[str]]:
    """Replace speed and memory of the rows whose networks were measured on another device; others keep theirs.

    Returns:
        The records, and a line for each cost of a network that no row has.
    """
    kept, used = [], set()
    for record in found:
        network = _network(str(record['config'].get('path')), record['config'].get('options') or {})
        of_device, row, old = costs.get(network, {}), (record['suite'], record['row']), ('speed', 'memory')
        asked = [name for name in record.get('asked') or () if not of_device or name not in old]
        if not of_device or record['measurement'] not in old:
            kept.append(StoredRecord({**record, 'asked': asked}, record.folder))
        for fields in of_device.values() if row not in used else ():  # a device measures a network, not its seeds
            kept.append(StoredRecord(dict(record, asked=asked, **fields), record.folder))
        used |= {row, network}
    unused = costs.keys() - used
    return kept, [f'{costs[n]["speed"]["facts"]["costs"]}: no row has its network, {n[0]}' for n in sorted(unused)]
