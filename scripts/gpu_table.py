#!/usr/bin/env python3
"""Measure depthwise convolutions and the backbone of RepLKNet-31B on a GPU in ten minutes: table.md and table.json.

Kernels from 7 to 31 and 51x5 at the stages of RepLKNet-31B for images of 512x512, in each precision: plain torch in
both memory layouts and ours. In the time that is left, inference and training step of the backbone. The files are
written after each shape, so that Ctrl-C leaves what was measured.

Example:
    python scripts/gpu_table.py --out work_dirs/gpu_table
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch

from replk_mm import cli
from replk_mm.analysis.benchmark import report
from replk_mm.analysis.benchmark.case import BenchmarkCase
from replk_mm.analysis.benchmark.network_benchmark import BenchmarkSettings, benchmark_networks
from replk_mm.analysis.benchmark.operator_benchmark import LayerShape, benchmark_operator
from replk_mm.analysis.gpu import DTYPES, describe_gpu
from replk_mm.analysis.timing import print_progress
from replk_mm.commands.benchmark import check_precisions
from replk_mm.engine.process import keep_freed_memory, select_device
from replk_mm.errors import UserError, command
from replk_mm.files import write_output

KERNELS = [(7, 7), (9, 9), (13, 13), (17, 17), (21, 21), (31, 31), (51, 5)]
STAGES = [(128, 128), (256, 64), (512, 32), (1024, 16)]  # channels, and side of the map
NETWORK, SHAPE = Path(__file__).resolve().parents[1] / 'configs' / 'upernet_replk31b_ade20k.py', (512, 512)
#: Share of the time for the convolutions.
SHARE = 0.8
#: Largest number of rounds of a measurement.
ROUNDS = 100


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_out(parser, 'folder for table.md and table.json (default: work_dirs/gpu_table)', required=False)
    parser.add_argument('--minutes', type=float, default=10.0, metavar='M', help='time, approximately (default: 10)')
    parser.add_argument('--device', default='cuda', metavar='D', help='cuda, cuda:N or cpu (default: cuda)')
    parser.add_argument(
        '--kernels', type=cli.kernel_size, nargs='+', default=KERNELS, metavar='K', help='side, or HxW such as 51x5'
    )
    parser.add_argument('--batch', type=cli.positive_int, default=32, metavar='N', help='of the convolutions (32)')
    parser.add_argument('--dtype', nargs='+', choices=list(DTYPES), help='precisions (default: all, on CPUs float32)')
    return parser.parse_args()


class Table:
    """The files, which are written after each measurement."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.kept = out, keep_freed_memory()
        self.before = None if device == 'cpu' else describe_gpu()
        self.environment = report.describe_environment(self.kept, self.before)
        self.records: list[dict] = []

    def write(self) -> list[Path]:
        """Write all records."""
        records = [{**record, 'environment': self.environment} for record in self.records]
        text = '\n\n'.join(report.format_record(record, markdown=True) for record in records)
        return [
            write_output(self.out / 'table.md', f'{text}\n'),
            write_output(self.out / 'table.json', f'{report.record_to_json(dict(records=records))}\n'),
        ]

    def update(self, record: dict) -> None:
        """Add a record, or write one that was added before and has grown."""
        if all(record is not known for known in self.records):
            self.records.append(record)
        self.write()

    def finish(self) -> list[Path]:
        """Write all records with the state of the GPU at the end."""
        self.environment = report.describe_environment(self.kept, self.before)
        return self.write()


def measure(table: Table, args: argparse.Namespace, device: str, dtypes: list[str]) -> None:
    """Measure convolutions, then networks while there is time."""
    end = time.monotonic() + 60 * args.minutes
    shapes = [LayerShape(kernel, side, channels, args.batch) for kernel in args.kernels for channels, side in STAGES]
    limit = SHARE * 60 * args.minutes
    seconds = limit / (4 * len(shapes) * len(dtypes))
    settings = dict(repeats=ROUNDS, seconds=seconds, limit=limit, save=table.update)
    operators = benchmark_operator(shapes, dtypes, device=device, **settings)
    table.update(operators)
    case = BenchmarkCase(str(NETWORK), False, device=device, threads=torch.get_num_threads())
    for mode, share in (('inference', 0.5), ('train', 1.0)):
        left = end - time.monotonic()
        if left <= 0:
            operators['notes'].append(f'{NETWORK.stem}, {mode}: not measured for lack of time')
            continue
        each = BenchmarkSettings(dtypes, ROUNDS, seconds=share * left, memory=False, channels_last=True)
        try:
            table.update(benchmark_networks(case, each, [mode], [SHAPE], [1]))
        except UserError as error:  # such as too little memory
            operators['notes'].append(f'{NETWORK.stem}, {mode}: not measured: {str(error).splitlines()[0]}')


@command
def main() -> int:
    args = parse_args()
    device = select_device(args.device)
    dtypes = args.dtype or (['float32'] if device == 'cpu' else list(DTYPES))
    check_precisions(dtypes, device)
    args.out = args.out or Path('work_dirs', 'gpu_table')
    table = Table(cli.prepare_out(args, 'table.md', 'table.json'), device)
    files: list[Path] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print to it
            measure(table, args, device, dtypes)
    finally:
        files = table.finish() if table.records else []
        print_progress(f'written: {", ".join(map(str, files)) or "nothing"}')
    return 0 if all(map(report.all_equal, table.records)) else 1


if __name__ == '__main__':
    sys.exit(main())
