"""Costs on another device: the output of ``tools/benchmark.py --json`` there, as speed and memory of rows here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, ValidationError

from replk_mm.bench.records import StoredRecord
from replk_mm.errors import UserError, command_line, format_list

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Milliseconds(BaseModel):
    median: _Positive
    low: _Positive
    high: _Positive


class _Row(BaseModel):
    name: str
    dtype: str
    milliseconds: _Milliseconds
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


@dataclass(frozen=True)
class DeviceCost:
    """What one network costs on a device.

    Attributes:
        file: The output of the benchmark.
        network: The backbone's name in the catalogue, or else the config's, and options that change the backbone.
        protocol: Conditions, as of the measurement ``speed``: device, CPU, threads, shape, batch, precision, torch;
            and ``timed``, the backbone alone or which model.
        form: ``'reparameterized'`` or ``'training'``.
        milliseconds: Median, first and third quartile of a batch.
        memory_bytes: Peak of inference beyond the loaded network; None if it was not measured.
        joules: Of a batch; None if the device does not tell.
        load: Share of its CPUs that other processes used.
    """

    file: str
    network: tuple[str, str]
    protocol: dict[str, Any]
    form: str
    milliseconds: tuple[float, float, float]
    memory_bytes: int | None
    joules: float | None
    load: float

    def values(self) -> dict[str, dict[str, Any]]:
        """The ``values`` of its records, by measurement."""
        median, low, high = self.milliseconds
        times = dict(median_ms=median, low_ms=low, high_ms=high, throughput=1e3 * self.protocol['batch'] / median) | (
            dict(joules=self.joules) if self.joules else {}
        )
        memory = dict(memory=dict(inference_bytes=self.memory_bytes)) if self.memory_bytes else {}
        return dict(speed=dict(forms={self.form: times}, batch=self.protocol['batch']), **memory)


def network_of(config: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """What identifies the network of a record or of a benchmark: see :attr:`DeviceCost.network`."""
    name = options.get('backbone') or Path(config.rpartition('::')[2]).stem
    return str(name), str(sorted((k, v) for k, v in options.items() if k.startswith('model.backbone')))


def read_costs(paths: Iterable[str | Path]) -> list[DeviceCost]:
    """Read outputs of ``tools/benchmark.py backbone`` or ``model``, a file for each network.

    Raises:
        UserError: If a file is something else, has several sizes or batches, or repeats a network.
    """
    found: dict[tuple[str, str], DeviceCost] = {}
    for path in paths:
        cost = _read(Path(path))
        if cost.network in found:
            raise UserError(
                f'{path}: {cost.network[0]} is also in {found[cost.network].file}\nName one of the two files.'
            )
        found[cost.network] = cost
    return list(found.values())


def _read(path: Path) -> DeviceCost:
    again = 'Write it there with: ' + command_line(
        'benchmark', 'model', 'CONFIG', '--backbone', 'NAME', '--shape', 'H', 'W', '--mode', 'inference', '--json'
    )
    try:
        content = _Benchmark.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})\n{again}') from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = '.'.join(map(str, first['loc'])) or 'the file'
        raise UserError(f'{path}: not the output of a benchmark: {place}: {first["msg"]}\n{again}') from error
    points = [point for point in content.points if point.mode == 'inference']
    if len(points) != 1:
        sizes = format_list(f'{p.batch} x {p.height} x {p.width}' for p in points) or 'training only'
        raise UserError(f'{path}: points: expected one of inference; found {sizes}\n{again}')
    [point] = points
    ours = [row for row in point.rows if row.name.startswith('ours')]  # the first precision that was asked for
    if not ours:
        raise UserError(f"{path}: points: rows: none is named 'ours'\n{again}")
    row, env = ours[0], content.environment
    return DeviceCost(
        str(path),
        network_of(content.config, content.cfg_options),
        dict(
            device=env.get('gpu') or 'cpu',
            **{key: env.get(key) for key in ('cpu', 'threads', 'torch')},
            shape=[point.height, point.width],
            batch=point.batch,
            precision=row.dtype,
            timed='backbone alone' if content.what == 'backbone' else f'model of {Path(content.config).name}',
        ),
        point.form,
        (row.milliseconds.median, row.milliseconds.low, row.milliseconds.high),
        row.memory_bytes,
        row.joules,
        point.load,
    )


def replace_costs(found: Sequence[StoredRecord], costs: Sequence[DeviceCost]) -> list[StoredRecord]:
    """Replace speed and memory of the rows whose networks were measured on another device; others keep theirs.

    Args:
        found: Records.
        costs: From :func:`read_costs`.

    Raises:
        UserError: If a cost is of no row's network.
    """
    by_network = {cost.network: cost for cost in costs}
    networks = {id(r): network_of(str(r['config'].get('path')), r['config'].get('options') or {}) for r in found}
    for cost in costs:
        if cost.network not in networks.values():
            known = format_list(sorted({name for name, _ in networks.values()}))
            raise UserError(
                f'{cost.file}: no row has its network, {cost.network[0]}; those of the rows: {known}\n'
                f'Measure one of them with the same --backbone and model.backbone options.'
            )
    kept, done = [], set()
    for record in found:
        cost, row = by_network.get(networks[id(record)]), (record['suite'], record['row'])
        if cost is None:
            kept.append(record)
            continue
        # A device measures a network, not its seeds.
        asked = [name for name in record.get('asked') or () if name not in ('speed', 'memory')]
        if record['measurement'] not in ('speed', 'memory'):
            kept.append(StoredRecord({**record, 'asked': asked}, record.folder))
        if row not in done:
            done.add(row)
            shared = dict(status='done', reason=None, protocol=cost.protocol, checkpoint=None, files={}, asked=asked)
            facts = dict(load=cost.load, costs=cost.file)
            for name, values in cost.values().items():
                new = {**record, **shared, 'measurement': name, 'values': values, 'facts': facts}
                kept.append(StoredRecord(new, record.folder))
    return kept
