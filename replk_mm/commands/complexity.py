"""Count parameters and multiply-accumulates (MACs, in papers FLOPs) by part, before and after reparameterization.

CONFIG is a segmentor, a detector, a classifier or a bare backbone: a file, or one that is installed with a package
(mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py). No weights are allocated and no image is read.
--published counts the networks of all published rows beside the published figures, --roadmap the steps of the
ConvNeXt paper from ResNet-50 to ConvNeXt-T.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from replk_mm import cli, published
from replk_mm.analysis.complexity import (
    INFERENCE,
    NEVER,
    TRAINING,
    ConfigComplexity,
    Operator,
    config_complexity,
    library_versions,
)
from replk_mm.analysis.published_complexity import (
    count_published,
    count_roadmap,
    format_roadmap,
    render_page,
    write_pages,
)
from replk_mm.errors import UserError, command, command_line
from replk_mm.text import text_table

FIELDS = """
fields of --json:
  config, shape [H, W], shape_from  network and size in pixels that were counted, and the origin of the size
  training, reparameterized         the two forms of the network, each with
    parameters                      all; inference_parameters: without auxiliary heads, which run in training only
    macs                            multiply-accumulates of one inference on one image, half of torch's count
    parts                           [{name, parameters, macs, runs: "inference" | "training" | "not run"}]
    uncounted                       [{name, calls, elements}]: operators without a formula; elements of their outputs
  changes                           summary of the merged and folded layers
  notes                             assumptions, and operations that were not run
  versions                          of the libraries
"""
#: Number of uncounted operators to describe in full.
_DESCRIBED = 6


def format_complexity(found: ConfigComplexity) -> str:
    """A table of the parts of both forms, with notes."""
    forms = found.training, found.deployed
    marks = {INFERENCE: '', TRAINING: ' *', NEVER: ' +'}
    by_name = [{part.name: (part.parameters, part.macs) for part in form.parts} for form in forms]
    runs = {part.runs for part in found.training.parts}

    def row(name: str, *pairs: tuple[int, int]) -> list[str]:
        return [name, *(cell for parameters, macs in pairs for cell in (f'{parameters:,}', f'{macs / 1e9:.2f} G'))]

    rows = [['', 'parameters', 'MACs', 'reparameterized: parameters', 'MACs']]
    rows += [
        row(part.name + marks[part.runs], *(parts.get(part.name, (0, 0)) for parts in by_name))
        for part in found.training.parts
    ]
    rows.append(row('inference', *((form.inference_parameters, form.macs) for form in forms)))
    if TRAINING in runs:
        rows.append(row('in training', *((form.parameters, sum(part.macs for part in form.parts)) for form in forms)))
    lines = [f'{found.config} at {found.shape[0]}x{found.shape[1]} pixels ({found.shape_from})', '', text_table(rows)]
    if TRAINING in runs:
        lines.append('* runs in training only')
    if NEVER in runs:
        lines.append('+ not called: its weights are used elsewhere, or its use depends on the image')
    lines += [
        '',
        f'reparameterized: {found.changes}',
        *found.training.notes,
        f'not counted, because torch has no formula: {_format_operators(found.training.uncounted)}',
        f'versions: {", ".join(f"{name} {number}" for name, number in library_versions().items())}',
    ]
    paper = published.for_config(found.config)
    if paper and paper.input == found.shape:
        lines.append(
            f'published: {paper.params_m:g} M parameters, {paper.flops_g:g} G ({paper.source}); '
            f'docs/complexity.md explains how they were counted'
        )
    return '\n'.join(lines)


def _format_operators(uncounted: Iterable[Operator]) -> str:
    """Operators as text, those with most elements in full."""
    operators = list(uncounted)
    described = [f'{o.name} ({o.calls} times, {o.elements / 1e6:.1f} M elements)' for o in operators[:_DESCRIBED]]
    return ', '.join([*described, *(o.name for o in operators[_DESCRIBED:])]) or 'nothing'


@command
def main() -> None:
    p = cli.parser(
        __doc__,
        'complexity configs/upernet_replk31b_ade20k.py --shape 512 512',
        'complexity --published --rows "ConvNeXt-T"',
    )
    p.epilog = f'{p.epilog}\n{FIELDS}'
    p.add_argument('config', nargs='?', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument(
        '--shape',
        type=cli.positive_int,
        nargs=2,
        metavar=('H', 'W'),
        help="image size in pixels (default: as published, otherwise the config's crop)",
    )
    p.add_argument('--json', action='store_true', help='print JSON only')
    p.add_argument('--published', action='store_true', help='count all published rows (minutes)')
    p.add_argument('--roadmap', action='store_true', help='count the steps from ResNet to ConvNeXt')
    p.add_argument(
        '--rows', metavar='REGEX', help='only published rows whose config, backbone or method matches; steps'
    )
    p.add_argument('--out', type=Path, metavar='DIR', help='write complexity.md, complexity.json and errata.md there')
    cli.add_config_options(p)
    args = p.parse_args()
    if args.published:
        record = count_published(args.rows, lambda line: print(line, file=sys.stderr, flush=True))
        print(json.dumps(record, indent=2) if args.json else render_page(record, tables_only=True), end='')
        if args.out:
            write_pages(record, args.out)
        return
    if args.roadmap:
        steps = count_roadmap(args.rows)
        print(json.dumps(steps, indent=2) if args.json else format_roadmap(steps), end='')
        return
    if not args.config:
        raise UserError('CONFIG: is missing\nName a config, or use --published or --roadmap.')
    found = config_complexity(args.config, tuple(args.shape) if args.shape else None, args.cfg_options)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(format_complexity(found))
        if any(part.name == 'backbone' for part in found.training.parts):
            exchanged = ['--backbone', args.backbone] if args.backbone else []
            words = ('model', args.config, *exchanged, '--shape', *found.shape)
            print(f'\nMeasure its speed: {command_line("benchmark", *words)}')
