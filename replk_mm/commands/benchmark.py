"""Measure speed and memory of a layer (op), a backbone or a whole model beside the same in plain torch.

Plain torch is the same network and weights with torch's own depthwise convolutions in the default memory layout. Both
run in turns in one process, and their results are compared: exit status 1 if they differ.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import torch

from replk_mm import cli
from replk_mm.analysis.benchmark import network_benchmark, operator_benchmark, report
from replk_mm.analysis.benchmark.case import BenchmarkCase, default_shape
from replk_mm.analysis.benchmark.inference_engines import ENGINES
from replk_mm.analysis.gpu import DTYPES, GPU_PRECISIONS, describe_gpu
from replk_mm.analysis.timing import MIN_ROUNDS, print_progress
from replk_mm.deploy.artefact import is_artefact, read_manifest
from replk_mm.engine.process import keep_freed_memory, select_device
from replk_mm.errors import UserError, command
from replk_mm.ops.cpu.direct import FLOAT32_INSTEAD, has_bfloat16_instructions

#: Name of plain torch's other memory layout in ``--compare``.
CHANNELS_LAST = 'channels-last'


def list_of(*choices: str) -> Callable[[str], list[str]]:
    """A type for argparse: names among ``choices``, separated by commas."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(',') if name]
        if not names or not set(names) <= set(choices):
            raise argparse.ArgumentTypeError(f'{text!r} is not a list of {",".join(choices)}')
        return list(dict.fromkeys(names))

    return parse


def compared(text: str) -> list[str]:
    """A type for argparse: what to compare with, separated by commas."""
    folders = [name for name in text.split(',') if is_artefact(name)]
    if missing := [name for name in text.split(',') if '/' in name and name not in folders]:
        raise argparse.ArgumentTypeError(f'{missing[0]} is no folder of an exported network')
    others = ','.join(name for name in text.split(',') if name not in folders)
    return folders + (list_of(CHANNELS_LAST, *ENGINES)(others) if others or not folders else [])


def parse_args() -> argparse.Namespace:
    p = cli.parser(__doc__, 'benchmark model configs/upernet_replk-nano_ade20k.py --sides 256 512')
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--threads', type=cli.positive_int, metavar='N', help="default: torch's, one per core")
    common.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    common.add_argument(
        '--repeats',
        type=cli.int_at_least(MIN_ROUNDS),
        default=15,
        metavar='N',
        help='largest number of measured rounds (default: 15)',
    )
    common.add_argument(
        '--warmup', type=cli.int_at_least(0), default=2, metavar='N', help='at most so many warm-up rounds (default: 2)'
    )
    common.add_argument(
        '--seconds',
        type=float,
        metavar='S',
        help=f'time budget of each measurement, with at least {MIN_ROUNDS} rounds '
        '(default: 60; op: 2 for each computation)',
    )
    cli.add_out(common, 'folder for table.txt and benchmark.json (default: work_dirs/benchmark/NAME)', required=False)
    common.add_argument('--json', action='store_true', help='print the JSON, and nothing else, to standard output')
    sub = p.add_subparsers(dest='what', required=True)
    op = sub.add_parser('op', parents=[common], help='the depthwise convolution alone')
    op.add_argument(
        '--kernels',
        type=cli.kernel_size,
        nargs='+',
        default=[(side, side) for side in (3, 7, 13, 31)],
        metavar='K',
        help='side, or HxW such as 51x5 (default: 3 7 13 31)',
    )
    for name, default, metavar in (('maps', [32, 64, 128], 'SIDE'), ('channels', [128], 'C'), ('batch', [1], 'N')):
        op.add_argument(
            f'--{name}',
            type=cli.positive_int,
            nargs='+',
            default=default,
            metavar=metavar,
            help=f'default: {" ".join(map(str, default))}',
        )
    op.add_argument('--stride', type=cli.positive_int, default=1, metavar='S')
    op.add_argument(
        '--dtype',
        nargs='+',
        choices=list(DTYPES),
        default=['float32'],
        help='precision, of plain torch too; tf32 and float16 on GPUs only (default: float32)',
    )
    op.add_argument(
        '--implementations', nargs='+', default=[], metavar='NAME', help='also measure each of these implementations'
    )
    for what, text in (
        ('backbone', "a config's backbone"),
        ('model', "a config's whole segmentor, detector or classifier"),
    ):
        net = sub.add_parser(what, parents=[common], help=text)
        net.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
        net.add_argument('--checkpoint', metavar='FILE', help='weights (default: random ones)')
        net.add_argument(
            '--mode',
            type=list_of('inference', 'train'),
            default=['inference', 'train'],
            metavar='MODES',
            help='inference, train, or both separated by a comma (default)',
        )
        net.add_argument(
            '--form',
            choices=['training', 'reparameterized'],
            default='reparameterized',
            help='form of all networks at inference (default: reparameterized)',
        )
        size = net.add_mutually_exclusive_group()
        size.add_argument(
            '--shape',
            type=cli.positive_int,
            nargs=2,
            metavar=('H', 'W'),
            help="image size in pixels (default: the config's crop)",
        )
        size.add_argument(
            '--sides', type=cli.positive_int, nargs='+', metavar='SIDE', help='square images of several sizes'
        )
        net.add_argument(
            '--batch',
            '--batches',
            type=cli.positive_int,
            nargs='+',
            default=[0],
            metavar='N',
            help='images per batch, one or several numbers (default: 1, or 2 where training needs it)',
        )
        net.add_argument(
            '--dtype',
            nargs='+',
            choices=list(DTYPES),
            default=['float32'],
            help='precision of our network; plain torch runs in float32, on GPUs in all of them; tf32 and float16 on '
            'GPUs only (default: float32)',
        )
        net.add_argument(
            '--compare',
            type=compared,
            default=[],
            metavar='NAMES',
            help=f'also measure {CHANNELS_LAST} (plain torch in this memory layout), engines ({",".join(ENGINES)}), or '
            'folders of the command export',
        )
        if what == 'model':
            net.add_argument(
                '--image', metavar='FILE', help='inference: from this file to the result, with the test pipeline'
            )
        net.add_argument('--no-memory', dest='memory', action='store_false', help='do not measure memory')
        net.add_argument(
            '--same-allocator',
            action='store_true',
            help='let plain torch keep freed memory too (a setting of the C library)',
        )
        cli.add_config_options(net)
    return p.parse_args()


def check_options(args: argparse.Namespace) -> None:
    """Reject options that would have no effect.

    Raises:
        UserError: For the first one.
    """
    folders = [name for name in getattr(args, 'compare', ()) if is_artefact(name)]
    for folder in folders:
        read_manifest(folder)
    if args.what == 'backbone' and folders:
        raise UserError(f'--compare {folders[0]}: is an exported model, not a backbone\nUse benchmark model.')
    image = getattr(args, 'image', None)
    if image and args.mode != ['inference']:
        raise UserError('--image: training reads no image file\nAdd --mode inference.')
    if image and not Path(image).is_file():
        raise UserError(f'--image {image}: no such file')


def check_precisions(dtypes: Iterable[str], device: str) -> None:
    """Reject precisions that a device does not have.

    Raises:
        UserError: For the first one.
    """
    if rejected := [dtype for dtype in dtypes if device == 'cpu' and dtype in GPU_PRECISIONS]:
        raise UserError(
            f'--dtype {rejected[0]}: is measured on GPUs only; the device is cpu\nUse --dtype float32 or bfloat16.'
        )


def run_benchmark(args: argparse.Namespace) -> dict:
    device, kept, notes = select_device(args.device), keep_freed_memory(), []
    check_precisions(args.dtype, device)
    gpu = None if device == 'cpu' else describe_gpu()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if device == 'cpu' and 'bfloat16' in args.dtype and not has_bfloat16_instructions():
        notes.append(f'--dtype bfloat16: {FLOAT32_INSTEAD}')
        print_progress(notes[0])
        args.dtype = ['float32']
    if args.what == 'op':
        points = [
            operator_benchmark.LayerShape(kernel, size, channels, batch, args.stride)
            for channels, batch, size, kernel in product(args.channels, args.batch, args.maps, args.kernels)
        ]
        record = operator_benchmark.benchmark_operator(
            points, args.dtype, args.implementations, device, args.repeats, args.warmup, args.seconds or 2.0
        )
    else:
        shapes = [(side, side) for side in args.sides or ()]
        shapes = shapes or [tuple(args.shape or default_shape(args.config, args.cfg_options))]
        case = BenchmarkCase(
            args.config,
            args.what == 'model',
            form=args.form,
            options=args.cfg_options,
            image=getattr(args, 'image', None),
            checkpoint=args.checkpoint,
            device=device,
            threads=torch.get_num_threads(),
        )
        settings = network_benchmark.BenchmarkSettings(
            args.dtype,
            args.repeats,
            args.warmup,
            args.seconds or 60.0,
            args.memory,
            [name for name in args.compare if name in ENGINES],
            [name for name in args.compare if is_artefact(name)],
            CHANNELS_LAST in args.compare,
            args.same_allocator,
        )
        record = network_benchmark.benchmark_networks(case, settings, args.mode, shapes, args.batch)
    return {**record, 'notes': notes + record['notes'], 'environment': report.describe_environment(kept, gpu)}


@command
def main() -> int:
    args = parse_args()
    check_options(args)
    name = 'op'
    if args.what != 'op':
        exchanged = f'-{args.backbone.replace("/", "-")}' if args.backbone else ''
        name = f'{Path(args.config.rpartition("::")[2]).stem}{exchanged}-{args.what}'
    args.out = args.out or Path('work_dirs', 'benchmark', name)
    out = cli.prepare_out(args, 'table.txt', 'benchmark.json')
    with contextlib.redirect_stdout(sys.stderr):  # libraries print to it
        record = run_benchmark(args)
        files = report.write_record(record, out)
    print(
        report.record_to_json(record)
        if args.json
        else f'\n{report.format_record(record)}\n\nwritten: {", ".join(map(str, files))}'
    )
    return 0 if report.all_equal(record) else 1
