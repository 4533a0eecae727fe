"""What a benchmark leaves behind: its circumstances, text tables, and a JSON file without NaN."""
import json
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from replk_mm.analysis import plots
from replk_mm.engine import results
from replk_mm.environment import describe_machine
from replk_mm.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ('mmsegmentation', 'mmdet', 'openvino', 'onnxruntime', 'onnx')
_VARIABLES = ('OMP_', 'KMP_', 'GOMP_', 'MKL_', 'DNNL_', 'ONEDNN_', 'MALLOC_', 'GLIBC_TUNABLES', 'LD_PRELOAD', 'REPLK_MM_')


def environment(keeps_freed_memory: bool) -> dict:
    """Everything about this machine that a time depends on; what is not known is None.

    Args:
        keeps_freed_memory: What :func:`replk_mm.engine.machine.keep_freed_memory` returned.
    """
    machine = describe_machine({})
    found: dict[str, Any] = {**results.environment(), 'interop_threads': torch.get_num_interop_threads()}
    found.update({name: version for name in _PACKAGES if (version := _version(name))})
    found.update(
        cores=machine['usable_cpus'], instruction_sets=machine['instruction_sets'],
        torch_capability=torch.backends.cpu.get_cpu_capability(), memory_gib=machine['memory_gib'],
        keeps_freed_memory=keeps_freed_memory, commit=_commit(), date=datetime.now(timezone.utc).isoformat('T', 'seconds'),
        variables={key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)})
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that this package is checked out at, marked if files have been changed since."""
    if not (_ROOT / '.git').exists() or shutil.which('git') is None:
        return None
    ran = [subprocess.run(['git', '-C', str(_ROOT), *args], capture_output=True, text=True, check=False)
           for args in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])]
    if ran[0].returncode:
        return None
    return ran[0].stdout.strip() + (' with changes' if ran[1].stdout.strip() else '')


def to_json(record: dict) -> str:
    """A record as strict JSON: what was not measured, or is not finite, is null."""
    return json.dumps(_finite(record), indent=2, allow_nan=False)


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def write(record: dict, folder: Path) -> list[Path]:
    """Write a record as ``table.txt``, ``benchmark.json`` and pictures; returns the files.

    Raises:
        UserError: If one of them cannot be written.
    """
    paths = [folder / 'table.txt', folder / 'benchmark.json']
    try:
        for path, content in zip(paths, (text(record), to_json(record)), strict=True):
            path.write_text(f'{content}\n')
        return paths + plots.draw(record, folder)
    except OSError as error:
        raise UserError(f'{folder}: cannot be written to ({error.strerror})\nChoose another place with --out DIR.') from error


def all_equal(record: dict) -> bool:
    """Whether every network that was compared computes what plain torch does."""
    return all(row['equal'] is not False for point in record['points'] for row in point['rows'])


def text(record: dict) -> str:
    """A record as text."""
    parts = [_head(record), *(_operators(record) if record['what'] == 'op' else map(_point, record['points']))]
    parts.append('\n'.join(f'- {note}' for note in record['notes']))
    if not all_equal(record):
        parts.append('DIFFERENT: a network marked so does not compute what plain torch does; its time is worth nothing.')
    return '\n\n'.join(parts)


def _head(record: dict) -> str:
    env = record['environment']
    versions = ', '.join(f'{name} {env[name]}' for name in ('torch', 'mmengine', 'mmcv', *_PACKAGES) if name in env)
    lines = [f'{env.get("gpu") or env["cpu"]}, {env["threads"]} threads on {env["cores"]} cores, '
             f'{" ".join(env["instruction_sets"]) or "instruction sets unknown"} (torch uses {env["torch_capability"]})',
             f'{versions}; replk_mm {env["replk_mm"]}, commit {env["commit"] or "unknown"}', f'{env["system"]}, {env["date"]}',
             _allocator(record)]
    if env['variables']:
        lines.append(' '.join(f'{key}={value}' for key, value in env['variables'].items()))
    if record['what'] == 'op':
        title = (f'depthwise convolution, {record["dtype"]}; a matrix product runs at '
                 f'{record["matrix_product_gflops"]:.0f} GFLOP/s')
    else:
        options = ' '.join(f'{key}={value}' for key, value in record['cfg_options'].items())
        title = (f'{record["what"]} {record["config"]} {options}'.rstrip()
                 + f': {record["backbone"]}, {record["parameters"] / 1e6:.1f} M parameters in the last form measured')
    return '\n'.join([title, *lines])


def _allocator(record: dict) -> str:
    if not record['environment']['keeps_freed_memory']:
        return 'allocator: freed memory is given back as the C library sees fit, for all networks alike'
    all_keep = (record['what'] == 'op' or record['settings']['same_allocator'] or record['environment'].get('gpu'))
    return ('allocator: freed memory is kept for the next tensor, for all networks alike' if all_keep else
            'allocator: plain torch gives freed memory back as the C library sees fit, all others keep it for the next tensor')


def _point(point: dict) -> str:
    rows = [('', 'ms, median (quartiles)', 'times as fast', 'memory MiB', 'difference', 'pixels')]
    rows += [(_name(row), _milliseconds(row['milliseconds']), _ratio(row['times_as_fast']),
              _or_dash(row['memory_bytes'], lambda value: f'{value / 2**20:.0f}'),
              'reference' if row['equal'] is None else
              _or_dash(row['difference'], '{:.1e}'.format) + _verdict(row),
              _or_dash(row['differing_pixels'], '{:.3%}'.format)) for row in point['rows']]
    return (f'{point["mode"]}, {point["batch"]}x3x{point["height"]}x{point["width"]}, {point["form"]} form; '
            f'{point["rounds"]} rounds after {point["warmup"]} to warm up\n' + _aligned(rows, [0]))


def _operators(record: dict) -> list[str]:
    tables: dict[tuple, list[tuple[str, ...]]] = {}
    for p in record['points']:
        key = p['channels'], p['batch'], p['stride']
        plain, *others = p['rows']
        for i, row in enumerate(others):
            first = i == 0
            tables.setdefault(key, [('kernel', 'map', 'computation', 'plain torch ms', 'GFLOP/s', 'implementation',
                                     'ms (quartiles)', 'GFLOP/s', 'of product', 'times as fast', 'difference')]).append((
                *((str(p['kernel']), str(p['size']), p['computation'], f'{plain["milliseconds"]["median"]:.2f}',
                   f'{plain["gflops"]:.1f}') if first else ('',) * 5),
                row['name'], _milliseconds(row['milliseconds']), f'{row["gflops"]:.1f}', f'{row["of_matrix_product"]:.0%}',
                _ratio(row['times_as_fast']), _or_dash(row['difference'], '{:.1e}'.format) + _verdict(row)))
    return [f'{channels} channels, batch {batch}, stride {stride}\n{_aligned(rows, [2, 5])}'
            for (channels, batch, stride), rows in tables.items()]


def _name(row: dict) -> str:
    return f'{row["name"]} ({row["how"]})' if row['how'] in ('autocast', 'converted') else row['name']


def _verdict(row: dict) -> str:
    return ' DIFFERENT' if row['equal'] is False else ''


def _milliseconds(timing: dict) -> str:
    digits = 0 if timing['median'] >= 1000 else 1 if timing['median'] >= 100 else 2
    return '{median:.{d}f} ({low:.{d}f}-{high:.{d}f})'.format(**timing, d=digits)


def _ratio(timing: dict) -> str:
    return '{median:.2f} ({low:.2f}-{high:.2f})'.format(**timing)


def _or_dash(value: Any, shown: Any) -> str:
    return '-' if value is None else shown(value)


def _aligned(rows: Sequence[tuple[str, ...]], texts: Sequence[int]) -> str:
    """Rows with aligned columns, the columns ``texts`` to the left and all figures to the right, the first row underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) if i in texts else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])
