"""Pictures of benchmarks: milliseconds against the kernel's side, and against the image's side or the batch."""
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

# Colours of Okabe and Ito, which people who see fewer of them can tell apart; markers say the same again. bfloat16 has the
# colour of its float32, dashed.
_STYLES = {'plain torch': ('#000000', 'o'), 'plain torch, training form': ('#888888', 'o'), 'ours': ('#0072B2', 's'),
           'openvino': ('#D55E00', '^'), 'onnxruntime': ('#009E73', 'D')}
_OTHERS = (('#CC79A7', 'v'), ('#E69F00', 'P'), ('#56B4E9', 'X'), ('#D55E00', '^'), ('#009E73', 'D'))
_BFLOAT16 = ', bfloat16'
_BOUND = 'at the speed of a matrix product'
_COMPUTATIONS = {'forward': 'forward', 'grad_input': 'gradient of the input', 'grad_weight': 'gradient of the weight',
                 'step': 'training step'}


def draw(record: dict, folder: Path) -> list[Path]:
    """Write the pictures of a record.

    Args:
        record: Of :func:`replk_mm.analysis.benchmark.run` or :func:`replk_mm.analysis.benchmark_op.run`.
        folder: Existing folder.

    Returns:
        The files. None if every point stands alone, so that there is no line to draw.
    """
    figures = _of_operators(record) if record['what'] == 'op' else _of_networks(record)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f'{name}.png')
        FigureCanvasAgg(figure)
        figure.savefig(paths[-1], dpi=150)
    return paths


def _of_operators(record: dict) -> dict[str, Figure]:
    figures = {}
    points = record['points']
    for channels, batch, stride in _distinct(points, 'channels', 'batch', 'stride'):
        chosen = [p for p in points if (p['channels'], p['batch'], p['stride']) == (channels, batch, stride)]
        kernels, sizes = (sorted({p[key] for p in chosen}) for key in ('kernel', 'size'))
        # Against the kernel, a row for each map; with one kernel only against the map.
        axis, across, values = ('kernel', 'size', sizes) if len(kernels) > 1 else ('size', 'kernel', kernels)
        if len(kernels) == len(sizes) == 1:
            continue
        figure = Figure(figsize=(3.4 * len(_COMPUTATIONS), 0.9 + 2.7 * len(values)), layout='constrained')
        panels = figure.subplots(len(values), len(_COMPUTATIONS), sharex=True, sharey='row', squeeze=False)
        names = list(dict.fromkeys(row['name'] for p in chosen for row in p['rows']))
        for row, value in zip(panels, values, strict=True):
            for panel, (computation, title) in zip(row, _COMPUTATIONS.items(), strict=True):
                part = [p for p in chosen if p['computation'] == computation and p[across] == value]
                _lines(panel, part, itemgetter(axis), names)
                xs = [p[axis] for p in part]
                panel.plot(xs, [1e3 * p['gflop'] / record['matrix_product_gflops'] for p in part], ':', color='#777777',
                           label=_BOUND)
                panel.set_title(f'{title}\n{_side(across, value)}', fontsize=9)
                _log_axis(panel, xs)
            row[0].set_ylabel('milliseconds')
        for panel in panels[-1]:
            panel.set_xlabel('kernel side, pixels' if axis == 'kernel' else 'map side, pixels')
        _legend(figure, panels[0, 0])
        figure.suptitle(f'Depthwise convolution, {record["dtype"]}, batch {batch}, {channels} channels, stride {stride}, '
                        f'{_threads(record)}', fontsize=11)
        figures[f'{axis}_side_{channels}x{batch}' + (f'_stride{stride}' if stride > 1 else '')] = figure
    return figures


def _side(name: str, value: int) -> str:
    return f'{"map" if name == "size" else "kernel"} {value}x{value}'


def _of_networks(record: dict) -> dict[str, Figure]:
    figures = {}
    points = record['points']
    ways: tuple[tuple[str, str, Callable[[dict], Any], Callable[[dict], str]], ...] = (
        ('image_side', 'image side, pixels', lambda p: p['height'], lambda p: f'batch {p["batch"]}'),
        ('batch', 'images a batch', lambda p: p['batch'], lambda p: f'{p["height"]}x{p["width"]} pixels'))
    for name, label, at, rest in ways:
        groups: dict[tuple[str, str], list[dict]] = {}
        for p in points:
            if name == 'batch' or p['height'] == p['width']:
                groups.setdefault((p['mode'], rest(p)), []).append(p)
        groups = {key: part for key, part in groups.items() if len({at(p) for p in part}) > 1}
        if not groups:
            continue
        figure = Figure(figsize=(1 + 4.6 * len(groups), 4.6), layout='constrained')
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        names = list(dict.fromkeys(row['name'] for part in groups.values() for p in part for row in p['rows']))
        for panel, ((mode, what), part) in zip(panels, groups.items(), strict=True):
            _lines(panel, part, at, names)
            panel.set_title(f'{"inference" if mode == "inference" else "training step"}, {what}', fontsize=10)
            panel.set_xlabel(label)
            panel.set_ylabel('milliseconds')
            _log_axis(panel, [at(p) for p in part])
        _legend(figure, *panels)
        figure.suptitle(f'{record["what"]} {Path(record["config"]).stem}, {_threads(record)}', fontsize=11)
        figures[name] = figure
    return figures


def _lines(panel: Any, points: Sequence[dict], at: Callable[[dict], Any], names: Sequence[str]) -> None:
    others = [name for name in names if name.removesuffix(_BFLOAT16) not in _STYLES]
    for name in names:
        known = name.removesuffix(_BFLOAT16)
        color, marker = _STYLES.get(known) or _OTHERS[others.index(name) % len(_OTHERS)]
        found = sorted((at(p), *(row['milliseconds'][key] for key in ('median', 'low', 'high')))
                       for p in points for row in p['rows'] if row['name'] == name)
        if found:
            xs, medians, lows, highs = zip(*found, strict=True)
            bars = [[m - low for m, low in zip(medians, lows, strict=True)],
                    [high - m for m, high in zip(medians, highs, strict=True)]]
            panel.errorbar(xs, medians, yerr=bars, label=name, color=color, marker=marker, markersize=4.5, linewidth=1.4,
                           capsize=3, linestyle='-' if name == known else '--',
                           markerfacecolor=color if name == known else 'white')


def _log_axis(panel: Any, xs: Sequence[int]) -> None:
    panel.set_yscale('log')
    panel.yaxis.set_major_locator(LogLocator(subs=(1., 2., 5.)))
    panel.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(sorted(set(xs)))
    panel.grid(True, which='major', color='#dddddd', linewidth=0.6)
    panel.set_axisbelow(True)


def _legend(figure: Figure, *panels: Any) -> None:
    shown = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    labels = [label for label in shown if label != _BOUND] + [label for label in shown if label == _BOUND]
    columns = max(1, int(figure.get_figwidth() / 2.4))
    figure.legend([shown[label] for label in labels], labels, loc='outside lower center', ncols=min(columns, len(labels)),
                  frameon=False, fontsize=9)


def _threads(record: dict) -> str:
    env = record['environment']
    return f'{env.get("gpu") or env["cpu"]}, {env["threads"]} threads'


def _distinct(points: Sequence[dict], *keys: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(p[key] for key in keys) for p in points))
