"""Arguments that several commands share."""
import argparse
import ast
import os
import warnings

from mmengine.config import DictAction

from replk_mm.checkpoints import register_safe_loaders
from replk_mm.engine.machine import Options, keep_freed_memory
from replk_mm.errors import printable

#: Longest list or dict in an override, characters, and deepest nesting.
_LONGEST, _DEEPEST = 3000, 20


class KeyValue(DictAction):
    """mmengine's action, which takes a dict in braces too; what cannot be read is refused as argparse refuses."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        options = dict(getattr(namespace, self.dest) or {})
        for text in values or ():
            key, given, value = text.partition('=')
            if not given:
                parser.error(f'argument {option_string}: {text!r:.200} is not KEY=VALUE')
            try:
                # mmengine's reading takes the square of a list's length, and the cube of its depth; a number in a dict that
                # is longer has more digits than Python writes.
                if len(value) > _LONGEST and set(value) & set(',[({'):
                    raise ValueError(f' (a list or dict of more than {_LONGEST:,} characters belongs into a config)')
                if _depth(value) > _DEEPEST:
                    raise ValueError(f' (lists within lists, more than {_DEEPEST} deep)')
                options[key] = ast.literal_eval(value) if value.startswith('{') else self._parse_iterable(value)
            except (ValueError, TypeError, SyntaxError, AssertionError, RecursionError, MemoryError) as error:
                why = str(error) if str(error).startswith(' (') else ''
                parser.error(f'argument {option_string}: the value of {printable(key):.80} cannot be read{why}: '
                             f'{printable(value):.80}')
        setattr(namespace, self.dest, options)


def _depth(value: str) -> int:
    """How deep brackets of any kind are nested in a text."""
    deepest = depth = 0
    for c in value:
        depth += (c in '([{') - (c in ')]}')
        deepest = max(deepest, depth)
    return deepest


def parser(doc: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help shows ``doc`` and an example."""
    return argparse.ArgumentParser(description=doc, epilog=f'example:\n  {example}',
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config_options(p: argparse.ArgumentParser) -> None:
    """Overrides of config fields; a checkpoint trained with some needs the same ones later."""
    p.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE', help='override config fields')


def add_classes(p: argparse.ArgumentParser) -> None:
    """Classes other than the config's; a checkpoint trained with some needs the same ones later."""
    p.add_argument('--classes', metavar='NAMES', help='classes of the data, for data sets and heads: NAME,NAME,... or a file '
                   "with one a line, or 'auto' for the annotation file's categories or classes.txt in the data root")


def add_run_arguments(p: argparse.ArgumentParser) -> None:
    """What training and testing have in common."""
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the config)')
    add_classes(p)
    p.add_argument('--work-dir', metavar='DIR', help='where logs and checkpoints go (default: work_dirs/CONFIG)')
    p.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    p.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                   help='how the processes of a distributed run were started (torchrun: pytorch)')
    add_config_options(p)
    p.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)  # older launchers pass it


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not at least 1')
    return value


def options_of(args: argparse.Namespace) -> Options:
    """The run options among parsed arguments."""
    known = {key: value for key, value in vars(args).items() if key in Options.__dataclass_fields__}
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return Options(**known)


def start_process() -> None:
    """What a command settles for its whole process: memory that is freed is kept, and warnings about the libraries' own
    future, which a user can do nothing about, are silent."""
    keep_freed_memory()
    register_safe_loaders()
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings('ignore', category=category)
    for message in ('pkg_resources is deprecated', '.*align_corners=.*', 'Fail to import.*MultiScaleDeformableAttention'):
        warnings.filterwarnings('ignore', message=message, category=UserWarning)
