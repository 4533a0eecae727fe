"""Output of a benchmark: its environment, text tables, and a JSON file without NaN."""

import json
import os
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from replk_mm.analysis.benchmark.case import PLAIN
from replk_mm.analysis.benchmark.operator_benchmark import format_kernel
from replk_mm.engine.record import environment_info, replace_non_finite
from replk_mm.environment import describe_machine, git_state
from replk_mm.files import GENERATOR, write_output
from replk_mm.text import text_table

_PACKAGES = ('mmsegmentation', 'mmdet', 'openvino', 'onnxruntime', 'onnx')
#: Prefixes of the environment variables that change speed.
_VARIABLES = (
    'OMP_',
    'KMP_',
    'GOMP_',
    'MKL_',
    'DNNL_',
    'ONEDNN_',
    'MALLOC_',
    'GLIBC_TUNABLES',
    'LD_PRELOAD',
    'REPLK_MM_',
)
_OPERATOR_HEAD = (
    'kernel',
    'map',
    'computation',
    'plain torch ms',
    'GFLOP/s',
    'implementation',
    'ms (quartiles)',
    'GFLOP/s',
    'of product',
    'times as fast',
    'difference',
)


def describe_environment(keeps_freed_memory: bool) -> dict:
    """Everything about this machine that a time depends on; None for unknown values.

    Args:
        keeps_freed_memory: Result of :func:`replk_mm.engine.process.keep_freed_memory`.
    """
    machine, git = describe_machine(), git_state()
    installed = {distribution.metadata['Name'] for distribution in metadata.distributions()}
    return {
        **environment_info(),
        'interop_threads': torch.get_num_interop_threads(),
        **{name: metadata.version(name) for name in _PACKAGES if name in installed},
        'cores': machine['usable_cpus'],
        'instruction_sets': machine['instruction_sets'],
        'torch_capability': torch.backends.cpu.get_cpu_capability(),
        'memory_gib': machine['memory_gib'],
        'keeps_freed_memory': keeps_freed_memory,
        'commit': git and git['commit'] + ' with changes' * git['dirty'],
        'date': datetime.now(timezone.utc).isoformat('T', 'seconds'),
        'variables': {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
    }


def record_to_json(record: dict) -> str:
    """A record as strict JSON; null for missing values and for those that are not finite."""
    return json.dumps({**GENERATOR, **replace_non_finite(record)}, indent=2, allow_nan=False)


def write_record(record: dict, folder: Path) -> list[Path]:
    """Write a record as ``table.txt`` and ``benchmark.json``; returns the files.

    Raises:
        UserError: If one of them cannot be written.
    """
    return [
        write_output(folder / 'table.txt', f'{format_record(record)}\n'),
        write_output(folder / 'benchmark.json', f'{record_to_json(record)}\n'),
    ]


def all_equal(record: dict) -> bool:
    """Whether every network that was compared computes the same as plain torch."""
    return all(row['equal'] is not False for point in record['points'] for row in point['rows'])


def format_record(record: dict) -> str:
    """A record as text: environment, tables, notes."""
    tables = _operator_tables(record) if record['what'] == 'op' else map(_network_table, record['points'])
    parts = [_format_head(record), *tables, '\n'.join(f'- {note}' for note in record['notes'])]
    reasons = dict.fromkeys(row['unreliable'] for point in record['points'] for row in point['rows'])
    if any(reasons):
        parts.append(f'? not reliable, measure again on an idle machine: {"; ".join(filter(None, reasons))}')
    if not all_equal(record):
        parts.append('DIFFERENT: this network does not compute the same as plain torch, so its time means nothing.')
    return '\n\n'.join(parts)


def _format_head(record: dict) -> str:
    env = record['environment']
    versions = ', '.join(f'{name} {env[name]}' for name in ('torch', 'mmengine', 'mmcv', *_PACKAGES) if name in env)
    if record['what'] == 'op':
        title = (
            f'depthwise convolution, {record["dtype"]}; a matrix product runs at '
            f'{record["matrix_product_gflops"]:.0f} GFLOP/s'
        )
        all_keep = True
    else:
        options = ' '.join(f'{key}={value}' for key, value in record['cfg_options'].items())
        title = (
            f'{record["what"]} {record["config"]} {options}'.rstrip()
            + f': {record["backbone"]}, {record["parameters"] / 1e6:.1f} M parameters in the last form measured'
        )
        all_keep = record['settings']['same_allocator'] or env.get('gpu')
    if not env['keeps_freed_memory']:
        allocator = 'freed memory is returned as the C library decides, for all networks alike'
    elif all_keep:
        allocator = 'freed memory is kept for the next tensor, for all networks alike'
    else:
        allocator = 'plain torch returns freed memory as the C library decides, all others keep it for the next tensor'
    lines = [
        title,
        f'{env.get("gpu") or env["cpu"]}, {env["threads"]} threads on {env["cores"]} cores, '
        f'{" ".join(env["instruction_sets"]) or "instruction sets unknown"} (torch uses '
        f'{env["torch_capability"]})',
        f'{versions}; replk_mm {env["replk_mm"]}, commit {env["commit"] or "unknown"}',
        f'{env["system"]}, {env["date"]}',
        f'allocator: {allocator}',
        ' '.join(f'{key}={value}' for key, value in env['variables'].items()),
    ]
    return '\n'.join(line for line in lines if line)


def _network_table(point: dict) -> str:
    rows = [('', 'ms, median (quartiles)', 'images/s', 'times as fast', 'memory MiB', 'difference', 'pixels')]
    for row in point['rows']:
        name = f'{row["name"]} ({row["how"]})' if row['how'] in ('autocast', 'converted') else row['name']
        memory, pixels = row['memory_bytes'], row['differing_pixels']
        rows.append(
            (
                name,
                _milliseconds(row),
                f'{1e3 * point["batch"] / row["milliseconds"]["median"]:.3g}',
                _ratio(row, point['rows'][0]),
                '-' if memory is None else f'{memory / 2**20:.0f}',
                _difference(row),
                '-' if pixels is None else f'{pixels:.3%}',
            )
        )
    return (
        f'{point["mode"]}, {point["batch"]} x {point["height"]}x{point["width"]} pixels, {point["form"]} form; '
        f'{point["rounds"]} rounds after {point["warmup"]} to warm up\n{text_table(rows)}'
    )


def _operator_tables(record: dict) -> list[str]:
    """A table for each number of channels, batch and stride."""
    tables: dict[tuple, list[tuple[str, ...]]] = {}
    for p in record['points']:
        rows = tables.setdefault((p['channels'], p['batch'], p['stride']), [_OPERATOR_HEAD])
        plain, *others = p['rows']
        start = (
            format_kernel(p['kernel']),
            str(p['size']),
            p['computation'],
            f'{plain["milliseconds"]["median"]:.2f}{_mark(plain)}',
            f'{plain["gflops"]:.1f}',
        )
        for row in others:
            rows.append(
                (
                    *start,
                    row['name'],
                    _milliseconds(row),
                    f'{row["gflops"]:.1f}',
                    f'{row["of_matrix_product"]:.0%}',
                    _ratio(row, plain),
                    _difference(row),
                )
            )
            start = ('',) * 5
    return [
        f'{channels} channels, batch {batch}, stride {stride}\n{text_table(rows, left=(2, 5))}'
        for (channels, batch, stride), rows in tables.items()
    ]


def _difference(row: dict) -> str:
    if row['equal'] is None:
        return 'reference' if row['name'] == PLAIN else '-'  # of an exported detector, nothing is compared
    found = '-' if row['difference'] is None else f'{row["difference"]:.1e}'
    return found if row['equal'] else f'{found} DIFFERENT'


def _milliseconds(row: dict) -> str:
    timing = row['milliseconds']
    digits = 0 if timing['median'] >= 1000 else 1 if timing['median'] >= 100 else 2
    return '{median:.{d}f} ({low:.{d}f}-{high:.{d}f})'.format(**timing, d=digits) + _mark(row)


def _ratio(row: dict, plain: dict) -> str:
    return '{median:.2f} ({low:.2f}-{high:.2f})'.format(**row['times_as_fast']) + _mark(row, plain)


def _mark(*rows: dict) -> str:
    return ' ?' if any(row['unreliable'] for row in rows) else ''
