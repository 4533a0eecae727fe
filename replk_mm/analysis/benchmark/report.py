"""Output of a benchmark: its environment, text tables, a JSON file without NaN, and plots."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from replk_mm.engine import results
from replk_mm.environment import describe_machine
from replk_mm.errors import UserError
from replk_mm.files import write_atomic
from replk_mm.text import text_table

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ('mmsegmentation', 'mmdet', 'openvino', 'onnxruntime', 'onnx')
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
# Colours of Okabe and Ito, which are safe for colour-blind readers; markers repeat them. bfloat16 has the colour of its
# float32, dashed.
_STYLES = {
    'plain torch': ('#000000', 'o'),
    'plain torch, training form': ('#888888', 'o'),
    'ours': ('#0072B2', 's'),
    'openvino': ('#D55E00', '^'),
    'onnxruntime': ('#009E73', 'D'),
}
_OTHERS = (('#CC79A7', 'v'), ('#E69F00', 'P'), ('#56B4E9', 'X'), ('#D55E00', '^'), ('#009E73', 'D'))
_BFLOAT16 = ', bfloat16'
_BOUND = 'at the speed of a matrix product'
_COMPUTATIONS = {
    'forward': 'forward',
    'grad_input': 'gradient of the input',
    'grad_weight': 'gradient of the weight',
    'step': 'training step',
}


def environment(keeps_freed_memory: bool) -> dict:
    """Everything about this machine that a time depends on; None for what is not known.

    Args:
        keeps_freed_memory: Result of :func:`replk_mm.engine.machine.keep_freed_memory`.
    """
    machine = describe_machine({})
    installed = {distribution.metadata['Name'] for distribution in metadata.distributions()}
    return {
        **results.environment(),
        'interop_threads': torch.get_num_interop_threads(),
        **{name: metadata.version(name) for name in _PACKAGES if name in installed},
        'cores': machine['usable_cpus'],
        'instruction_sets': machine['instruction_sets'],
        'torch_capability': torch.backends.cpu.get_cpu_capability(),
        'memory_gib': machine['memory_gib'],
        'keeps_freed_memory': keeps_freed_memory,
        'commit': _commit(),
        'date': datetime.now(timezone.utc).isoformat('T', 'seconds'),
        'variables': {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
    }


def _commit() -> str | None:
    """The commit of this checkout, marked if files have been changed since."""
    if not (_ROOT / '.git').exists() or shutil.which('git') is None:
        return None
    command = ['git', '-C', str(_ROOT), 'describe', '--always', '--exclude=*', '--abbrev=40', '--dirty= with changes']
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def to_json(record: dict) -> str:
    """A record as strict JSON: null for what was not measured or is not finite."""
    return json.dumps(results.finite(record), indent=2, allow_nan=False)


def write(record: dict, folder: Path) -> list[Path]:
    """Write a record as ``table.txt``, ``benchmark.json`` and plots; returns the files.

    Raises:
        UserError: If one of them cannot be written.
    """
    try:
        return [
            write_atomic(folder / 'table.txt', f'{text(record)}\n'),
            write_atomic(folder / 'benchmark.json', f'{to_json(record)}\n'),
            *draw(record, folder),
        ]
    except OSError as error:
        raise UserError(
            f'{folder}: cannot be written to ({error.strerror})\nChoose another folder with --out DIR.'
        ) from error


def all_equal(record: dict) -> bool:
    """Whether every network that was compared computes the same as plain torch."""
    return all(row['equal'] is not False for point in record['points'] for row in point['rows'])


def text(record: dict) -> str:
    """A record as text."""
    parts = [_head(record), *(_operators(record) if record['what'] == 'op' else map(_point, record['points']))]
    parts.append('\n'.join(f'- {note}' for note in record['notes']))
    if not all_equal(record):
        parts.append('DIFFERENT: this network does not compute the same as plain torch; its time means nothing.')
    return '\n\n'.join(parts)


def _head(record: dict) -> str:
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


def _point(point: dict) -> str:
    rows = [('', 'ms, median (quartiles)', 'times as fast', 'memory MiB', 'difference', 'pixels')]
    for row in point['rows']:
        name = f'{row["name"]} ({row["how"]})' if row['how'] in ('autocast', 'converted') else row['name']
        memory, pixels = row['memory_bytes'], row['differing_pixels']
        rows.append(
            (
                name,
                _milliseconds(row),
                _ratio(row),
                '-' if memory is None else f'{memory / 2**20:.0f}',
                _difference(row),
                '-' if pixels is None else f'{pixels:.3%}',
            )
        )
    return (
        f'{point["mode"]}, {point["batch"]}x3x{point["height"]}x{point["width"]}, {point["form"]} form; '
        f'{point["rounds"]} rounds after {point["warmup"]} to warm up\n{text_table(rows)}'
    )


def _operators(record: dict) -> list[str]:
    head = (
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
    tables: dict[tuple, list[tuple[str, ...]]] = {}
    for p in record['points']:
        rows = tables.setdefault((p['channels'], p['batch'], p['stride']), [head])
        plain, *others = p['rows']
        start = (
            str(p['kernel']),
            str(p['size']),
            p['computation'],
            f'{plain["milliseconds"]["median"]:.2f}',
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
                    _ratio(row),
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
        return 'reference'
    found = '-' if row['difference'] is None else f'{row["difference"]:.1e}'
    return found if row['equal'] else f'{found} DIFFERENT'


def _milliseconds(row: dict) -> str:
    timing = row['milliseconds']
    digits = 0 if timing['median'] >= 1000 else 1 if timing['median'] >= 100 else 2
    return '{median:.{d}f} ({low:.{d}f}-{high:.{d}f})'.format(**timing, d=digits)


def _ratio(row: dict) -> str:
    return '{median:.2f} ({low:.2f}-{high:.2f})'.format(**row['times_as_fast'])


def draw(record: dict, folder: Path) -> list[Path]:
    """Write the plots of a record.

    Args:
        record: Of :func:`replk_mm.analysis.benchmark.network_benchmark.run`
            or :func:`replk_mm.analysis.benchmark.operator_benchmark.run`.
        folder: Existing folder.

    Returns:
        The files; none if every point stands alone, so that there is no line to draw.
    """
    figures = _operator_figures(record) if record['what'] == 'op' else _network_figures(record)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f'{name}.png')
        FigureCanvasAgg(figure)
        figure.savefig(paths[-1], dpi=150)
    return paths


def _operator_figures(record: dict) -> dict[str, Figure]:
    figures = {}
    points, sides = record['points'], {'kernel': 'kernel', 'size': 'map'}
    for channels, batch, stride in dict.fromkeys((p['channels'], p['batch'], p['stride']) for p in points):
        chosen = [p for p in points if (p['channels'], p['batch'], p['stride']) == (channels, batch, stride)]
        kernels, sizes = (sorted({p[key] for p in chosen}) for key in ('kernel', 'size'))
        if len(kernels) == len(sizes) == 1:
            continue
        # Against the kernel, a row of panels for each map; with one kernel only, against the map.
        axis, across, values = ('kernel', 'size', sizes) if len(kernels) > 1 else ('size', 'kernel', kernels)
        panels = [
            [
                (
                    f'{title}\n{sides[across]} {value}x{value}',
                    [p for p in chosen if p['computation'] == computation and p[across] == value],
                )
                for computation, title in _COMPUTATIONS.items()
            ]
            for value in values
        ]
        title = f'Depthwise convolution, {record["dtype"]}, batch {batch}, {channels} channels, stride {stride}'
        name = f'{axis}_side_{channels}x{batch}' + (f'_stride{stride}' if stride > 1 else '')
        figures[name] = _figure(record, title, panels, itemgetter(axis), f'{sides[axis]} side, pixels', (3.4, 3.0))
    return figures


def _network_figures(record: dict) -> dict[str, Figure]:
    figures = {}
    ways: tuple[tuple[str, str, Callable[[dict], Any], Callable[[dict], str]], ...] = (
        ('image_side', 'image side, pixels', itemgetter('height'), lambda p: f'batch {p["batch"]}'),
        ('batch', 'images per batch', itemgetter('batch'), lambda p: f'{p["height"]}x{p["width"]} pixels'),
    )
    for name, label, at, rest in ways:
        groups: dict[str, list[dict]] = {}
        for p in record['points']:
            if name == 'batch' or p['height'] == p['width']:
                mode = 'inference' if p['mode'] == 'inference' else 'training step'
                groups.setdefault(f'{mode}, {rest(p)}', []).append(p)
        row = [(title, part) for title, part in groups.items() if len({at(p) for p in part}) > 1]
        if row:
            title = f'{record["what"]} {Path(record["config"]).stem}'
            figures[name] = _figure(record, title, [row], at, label, (4.8, 4.6))
    return figures


def _figure(
    record: dict,
    title: str,
    panels: Sequence[Sequence[tuple[str, list[dict]]]],
    at: Callable[[dict], Any],
    label: str,
    size: tuple[float, float],
) -> Figure:
    """Lines over ``at`` of a point, in rows of panels with a title and points each; size of a panel in inches."""
    figure = Figure(figsize=(size[0] * len(panels[0]), size[1] * len(panels)), layout='constrained')
    axes = figure.subplots(len(panels), len(panels[0]), sharex=record['what'] == 'op', sharey='row', squeeze=False)
    for row, parts in zip(axes, panels, strict=True):
        for axis, (name, points) in zip(row, parts, strict=True):
            _lines(axis, points, at, record['points'])
            if record['what'] == 'op':
                bound = [1e3 * p['gflop'] / record['matrix_product_gflops'] for p in points]
                axis.plot([at(p) for p in points], bound, ':', color='#777777', label=_BOUND)
            axis.set_title(name, fontsize=9)
        row[0].set_ylabel('milliseconds')
    for axis in axes[-1]:
        axis.set_xlabel(label)
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(shown, key=lambda label: label == _BOUND)  # the bound last
    figure.legend(
        [shown[label] for label in labels],
        labels,
        loc='outside lower center',
        frameon=False,
        fontsize=9,
        ncols=min(max(1, int(figure.get_figwidth() / 2.4)), len(labels)),
    )
    env = record['environment']
    figure.suptitle(f'{title}, {env.get("gpu") or env["cpu"]}, {env["threads"]} threads', fontsize=11)
    return figure


def _lines(panel: Any, points: Sequence[dict], at: Callable[[dict], Any], styled: Sequence[dict]) -> None:
    """A line with quartiles for each row of some points; colours are the same in all panels of ``styled``."""
    names = list(dict.fromkeys(row['name'] for p in styled for row in p['rows']))
    others = [name for name in names if name.removesuffix(_BFLOAT16) not in _STYLES]
    for name in names:
        known = name.removesuffix(_BFLOAT16)
        color, marker = _STYLES.get(known) or _OTHERS[others.index(name) % len(_OTHERS)]
        found = sorted(
            (at(p), *(row['milliseconds'][key] for key in ('median', 'low', 'high')))
            for p in points
            for row in p['rows']
            if row['name'] == name
        )
        if found:
            xs, medians, lows, highs = zip(*found, strict=True)
            bars = [
                [median - low for median, low in zip(medians, lows, strict=True)],
                [high - median for median, high in zip(medians, highs, strict=True)],
            ]
            panel.errorbar(
                xs,
                medians,
                yerr=bars,
                label=name,
                color=color,
                marker=marker,
                markersize=4.5,
                linewidth=1.4,
                capsize=3,
                linestyle='-' if name == known else '--',
                markerfacecolor=color if name == known else 'white',
            )
    panel.set_yscale('log')
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(sorted({at(p) for p in points}))
    panel.grid(True, which='major', color='#dddddd', linewidth=0.6)
    panel.set_axisbelow(True)
