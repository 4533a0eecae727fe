"""Output of a benchmark: its environment, text tables, and a JSON file without NaN."""

import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from replk_mm.analysis.benchmark.case import PLAIN
from replk_mm.analysis.benchmark.operator_benchmark import format_kernel
from replk_mm.analysis.gpu import describe_gpu
from replk_mm.engine.record import environment_info, replace_non_finite
from replk_mm.environment import describe_machine, git_state
from replk_mm.files import GENERATOR, write_output
from replk_mm.text import markdown_table, text_table

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
_GPU_HEAD = (
    *('kernel', 'map', 'computation', 'implementation', 'ms (quartiles)', 'TFLOP/s', 'of product'),
    *('GB/s', 'of copy', 'memory MiB', 'times as fast', 'difference'),
)


def describe_environment(keeps_freed_memory: bool, gpu_before: dict | None = None) -> dict:
    """Everything about this machine that a time depends on; None for unknown values.

    Args:
        keeps_freed_memory: Result of :func:`replk_mm.engine.process.keep_freed_memory`.
        gpu_before: Result of :func:`replk_mm.analysis.gpu.describe_gpu` before the measurement, if it was on a GPU.
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
        **(dict(gpu_before=gpu_before, gpu_after=describe_gpu()) if gpu_before else {}),
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


def format_record(record: dict, markdown: bool = False) -> str:
    """A record as text: environment, tables, notes."""
    table = markdown_table if markdown else text_table
    tables = (
        _operator_tables(record, table)
        if record['what'] == 'op'
        else [_network_table(point, table) for point in record['points']]
    )
    head = _format_head(record).replace('\n', '  \n' if markdown else '\n')  # a line break in Markdown
    parts = [head, *tables, '\n'.join(f'- {note}' for note in record['notes'])]
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
        products = ', '.join(f'{gflops:.0f}' for gflops in record['matrix_products_gflops'].values())
        title = f'depthwise convolution, {", ".join(record["dtypes"])}; a matrix product runs at {products} GFLOP/s'
        if record['device'] != 'cpu':
            title += f', a copy at {record["copy_gbytes_per_second"]:.0f} GB/s'
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
        *_gpu_lines(env),
        f'{versions}; replk_mm {env["replk_mm"]}, commit {env["commit"] or "unknown"}',
        f'{env["system"]}, {env["date"]}',
        f'allocator: {allocator}',
        ' '.join(f'{key}={value}' for key, value in env['variables'].items()),
    ]
    return '\n'.join(line for line in lines if line)


def _gpu_lines(env: dict) -> list[str]:
    """The GPU, and its clocks and power before and after the measurement."""
    if 'gpu_before' not in env:
        return []
    gpu = env['gpu_after']
    state = '{sm_clock} of {sm_clock_max} MHz, memory {memory_clock} of {memory_clock_max} MHz, '
    state += '{power} of {power_limit} W, {temperature} °C'
    lines = [
        f'compute capability {gpu["capability"]}, {gpu["memory_gib"]:.0f} GiB, cuDNN {gpu["cudnn"]} '
        f'({"with" if gpu["cudnn_benchmark"] else "without"} its benchmark), driver {gpu.get("driver", "not stated")}'
    ]
    for when in ('before', 'after'):
        found = env[f'gpu_{when}']
        lines.append(f'{when}: {state.format(**found) if "driver" in found else "clocks and power not stated"}')
    return lines


def _network_table(point: dict, table: Any) -> str:
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
        f'{point["rounds"]} rounds after {point["warmup"]} to warm up\n{table(rows)}'
    )


def _operator_tables(record: dict, table: Any) -> list[str]:
    """A table for each number of channels, batch, stride and precision."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    on_gpu, several = record['device'] != 'cpu', len(record['dtypes']) > 1
    for p in record['points']:
        title = f'{p["channels"]} channels, batch {p["batch"]}, stride {p["stride"]}' + f', {p["dtype"]}' * several
        rows = tables.setdefault(title, [_GPU_HEAD if on_gpu else _OPERATOR_HEAD])
        rows += _gpu_rows(p) if on_gpu else _operator_rows(p)
    left = (2, 3) if on_gpu else (2, 5)
    return [f'{title}\n{table(rows, left)}' for title, rows in tables.items()]


def _operator_rows(p: dict) -> Iterator[tuple[str, ...]]:
    plain, *others = p['rows']
    start = (
        format_kernel(p['kernel']),
        str(p['size']),
        p['computation'],
        f'{plain["milliseconds"]["median"]:.2f}{_mark(plain)}',
        f'{plain["gflops"]:.1f}',
    )
    for row in others:
        yield (
            *start,
            row['name'],
            _milliseconds(row),
            f'{row["gflops"]:.1f}',
            f'{row["of_matrix_product"]:.0%}',
            _ratio(row, plain),
            _difference(row),
        )
        start = ('',) * 5


def _gpu_rows(p: dict) -> Iterator[tuple[str, ...]]:
    start = format_kernel(p['kernel']), str(p['size']), p['computation']
    for row in p['rows']:
        memory = row['memory_bytes']
        yield (
            *start,
            row['name'],
            '{median:.3f} ({low:.3f}-{high:.3f})'.format(**row['milliseconds']) + _mark(row),
            f'{row["gflops"] / 1e3:.2f}',
            f'{row["of_matrix_product"]:.1%}',
            f'{row["gbytes_per_second"]:.0f}',
            f'{row["of_copy"]:.0%}',
            '-' if memory is None else f'{memory / 2**20:.0f}',
            _ratio(row, p['rows'][0]),
            _difference(row),
        )
        start = ('', '', '')


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
