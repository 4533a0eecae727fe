"""Draw docs/images/speed_kernel.png: milliseconds against the kernel size, from ``tools/benchmark.py op``."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

TITLES = {
    'forward': 'forward',
    'grad_input': 'gradient of the input',
    'grad_weight': 'gradient of the weight',
    'step': 'training step',
}
STYLES = {'plain torch': dict(color='black', marker='o'), 'ours': dict(color='#0072b2', marker='s')}


def draw(record: dict, out: Path) -> None:
    """Draw the points of one map size, batch and number of channels."""
    figure, axes = plt.subplots(1, len(TITLES), figsize=(17, 4.5), sharey=True, layout='constrained')
    for axis, (computation, title) in zip(axes, TITLES.items(), strict=True):
        points = sorted(
            (point for point in record['points'] if point['computation'] == computation), key=lambda p: p['kernel'][0]
        )
        sides = [point['kernel'][0] for point in points]
        for name, style in STYLES.items():
            times = [next(row['milliseconds'] for row in point['rows'] if row['name'] == name) for point in points]
            spread = [[t['median'] - t['low'] for t in times], [t['high'] - t['median'] for t in times]]
            axis.errorbar(sides, [t['median'] for t in times], spread, label=name, capsize=3, **style)
        product = [1e3 * point['gflop'] / record['matrix_product_gflops'] for point in points]
        axis.plot(sides, product, ':', color='gray', label='at the speed of a matrix product')
        axis.set(
            title=f'{title}\nmap {points[0]["size"]}x{points[0]["size"]}', xlabel='kernel side, pixels', yscale='log'
        )
        axis.set_xticks(sides)
        axis.yaxis.set_major_formatter('{x:g}')
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(color='0.9')
    axes[0].set_ylabel('milliseconds')
    point, environment = record['points'][0], record['environment']
    figure.suptitle(
        f'Depthwise convolution, {record["dtype"]}, batch {point["batch"]}, {point["channels"]} channels, stride '
        f'{point["stride"]}, {environment["cpu"]}, {environment["threads"]} threads'
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('record', type=Path, help='benchmark.json of tools/benchmark.py op')
    parser.add_argument('--out', type=Path, default=Path('docs/images/speed_kernel.png'), help='default: %(default)s')
    args = parser.parse_args()
    draw(json.loads(args.record.read_text()), args.out)
