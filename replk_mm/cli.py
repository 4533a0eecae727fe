"""Arguments that several commands share."""

import argparse
import ast
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from mmengine.config import DictAction

from replk_mm.checkpoints.loading import RESIZE_KERNELS
from replk_mm.data.subsets import FRACTIONS
from replk_mm.engine.process import RunOptions, prepare_work_dir
from replk_mm.errors import command_line, printable
from replk_mm.files import check_outputs


class KeyValue(DictAction):
    """mmengine's action, which also takes a Python dict, and a list or tuple of dicts."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        options = dict(getattr(namespace, self.dest) or {})
        namespace.cfg_texts = [*getattr(namespace, 'cfg_texts', ()), *(values or ())]
        for text in values or ():
            key, given, value = text.partition('=')
            if not given:
                parser.error(f'argument {option_string}: {text!r:.200} is not KEY=VALUE')
            try:
                options[key] = ast.literal_eval(value) if '{' in value else self._parse_iterable(value)
            except (ValueError, TypeError, SyntaxError, AssertionError, RecursionError, MemoryError):
                parser.error(
                    f'argument {option_string}: cannot parse the value of {printable(key):.80}: {printable(value):.80}'
                    + (' (write a Python dict or list, quoted for the shell)' if '{' in value else '')
                )
        setattr(namespace, self.dest, options)


def parser(doc: str | None, *examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows a command's docstring and examples.

    Args:
        doc: The docstring.
        *examples: Command lines without the program, such as ``'test CONFIG CHECKPOINT'``.
    """
    lines = [command_line(*shlex.split(example)) for example in examples]
    return argparse.ArgumentParser(
        description=doc,
        epilog='\n  '.join(['examples:' if len(lines) > 1 else 'example:', *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class Override(argparse.Action):
    """An option that :func:`load_config` takes as an override of the config, such as ``backbone``."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.cfg_options = {**(namespace.cfg_options or {}), self.dest: values}


def add_config_options(p: argparse.ArgumentParser) -> None:
    """Overrides of config fields. Test a checkpoint with the overrides it was trained with."""
    p.add_argument(
        '--backbone',
        action=Override,
        metavar='NAME',
        help='backbone of the catalogue instead of that of the config, with channels of heads, normalization of images '
        'and recipe (the command backbones lists names)',
    )
    p.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE', help='override config fields')


def add_classes(p: argparse.ArgumentParser) -> None:
    """Classes that replace those of the config."""
    p.add_argument(
        '--classes',
        metavar='NAMES',
        help='classes of data sets and heads: NAME,NAME,..., or a file with one name per line, or '
        "'auto' for the categories of the annotation file or classes.txt in the data root",
    )


def add_resize_kernels(p: argparse.ArgumentParser) -> None:
    """How to load weights into a network with depthwise kernels of another size."""
    p.add_argument(
        '--resize-kernels',
        action=Override,
        choices=RESIZE_KERNELS,
        help='fit depthwise kernels of the weights that have another size: pad them with zeros, or interpolate them',
    )


def add_run_arguments(p: argparse.ArgumentParser, distributed: bool = True) -> None:
    """Arguments of training and testing."""
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the config)')
    add_classes(p)
    p.add_argument('--work-dir', metavar='DIR', help='folder for logs and checkpoints (default: work_dirs/CONFIG)')
    p.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    add_config_options(p)
    add_resize_kernels(p)
    if distributed:
        p.add_argument(
            '--launcher',
            choices=['none', 'pytorch', 'slurm', 'mpi'],
            default='none',
            help='launcher that started the processes of a distributed run (torchrun: pytorch)',
        )
        p.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)  # older launchers pass it


def add_training(p: argparse.ArgumentParser) -> None:
    """Initial weights, and the share of the images to train on."""
    p.add_argument('--pretrained', metavar='FILE', help="initial weights of the backbone, or 'none' for random weights")
    p.add_argument(
        '--fraction', type=int, choices=FRACTIONS, default=100, help='percentage of the training images; see --seed'
    )


def add_overwrite(p: argparse.ArgumentParser) -> None:
    """Permission to replace files, see :func:`replk_mm.files.check_outputs`."""
    p.add_argument('--overwrite', action='store_true', help='replace files that this command did not write')


def add_out(p: argparse.ArgumentParser, text: str, required: bool = True) -> None:
    """The folder of the output, and ``--overwrite``."""
    p.add_argument('--out', required=required, metavar='DIR', help=text)
    add_overwrite(p)


def add_costs(p: argparse.ArgumentParser) -> None:
    """``--costs``: measurements of another device."""
    p.add_argument(
        '--costs',
        nargs='+',
        default=[],
        metavar='FILE',
        help='speed and memory on another device instead: outputs of tools/benchmark.py --json there, one per network',
    )


def prepare_out(args: argparse.Namespace, *names: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """Create the folder of ``--out``, check that these files may be written there, and return it."""
    out = prepare_work_dir(args.out, option='--out')
    check_outputs((out / name for name in names), inputs=inputs, overwrite=args.overwrite)
    return out


def follow_up(name: str, args: argparse.Namespace, *arguments: object) -> str:
    """The command line of the next step, with the data, classes and overrides of this one.

    Args:
        name: Of the next command, which takes a config first.
        args: Arguments of this command.
        *arguments: Those that follow the config.
    """
    words = [args.config, *arguments]
    takes_data = name in ('train', 'test')
    for option in (
        ('backbone', 'data_root', 'classes', 'device') if takes_data else ('backbone', 'resize_kernels', 'device')
    ):
        if getattr(args, option, None):
            words += [f'--{option.replace("_", "-")}', getattr(args, option)]
    if getattr(args, 'cfg_texts', None):
        words += ['--cfg-options', *args.cfg_texts]
    return command_line(name, *words)


def int_at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``smallest``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f'{text!r} is not an integer of at least {smallest}')
        return int(text)

    return parse


positive_int = int_at_least(1)


def seed(text: str) -> int:
    """An argparse type: a seed that numpy accepts."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f'{value} is not in 0..{2**32 - 1}')
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{value} is not in 0..1')
    return value


def kernel_size(text: str) -> tuple[int, int]:
    """An argparse type: height and width of a kernel, from ``31`` or ``51x5``."""
    sides = [positive_int(side) for side in text.split('x')]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f'{text!r} is not a kernel such as 31 or 51x5')
    return sides[0], sides[-1]


def run_options(args: argparse.Namespace) -> RunOptions:
    """The options of a run, from parsed arguments."""
    known = {key: value for key, value in vars(args).items() if key in RunOptions.__dataclass_fields__}
    if getattr(args, 'local_rank', None) is not None:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return RunOptions(**known)
