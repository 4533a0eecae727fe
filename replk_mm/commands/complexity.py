"""Count parameters and multiply-accumulates (MACs, papers: FLOPs) by part, before and after reparameterization.

CONFIG is a segmentor, a detector or a bare backbone: a file, or one that is installed with a package
(mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py). No weights are allocated and no image is read.
--published counts every published result at its published size, and writes docs/complexity.md and docs/complexity.json.
"""

import json
import sys
from pathlib import Path

from replk_mm import cli
from replk_mm.analysis import complexity_table
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.errors import UserError, command
from replk_mm.files import write_atomic

FIELDS = """
fields of --json:
  config, shape [H, W], shape_from  what was counted, at which size in pixels, and where the size comes from
  training, reparameterized         the two forms of the network, each with
    parameters                      all; inference_parameters: without auxiliary heads, which run in training only
    macs                            multiply-accumulates of one inference on one image, half of torch's count
    parts                           [{name, parameters, macs, runs: "inference" | "training" | "not run"}]
    uncounted                       [{name, calls, elements}]: operators without a formula; elements of their outputs
  changes                           what was merged and folded
  notes                             assumptions, and what was not run
  versions                          of the libraries
"""


@command
def main() -> None:
    p = cli.parser(__doc__, 'complexity configs/upernet_replk31b_ade20k.py --shape 512 512')
    p.epilog = f'{p.epilog}\n{FIELDS}'
    p.add_argument('config', nargs='?', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument(
        '--shape',
        type=cli.positive,
        nargs=2,
        metavar=('H', 'W'),
        help="in pixels (default: the published row's, or else the config's crop)",
    )
    p.add_argument('--json', action='store_true', help='print JSON, and nothing else, to standard output')
    p.add_argument('--published', action='store_true', help='count every published result')
    p.add_argument(
        '--rows', metavar='REGEX', help='with --published: only configs whose name matches; writes only to --out'
    )
    p.add_argument('--out', metavar='DIR', help='with --published: folder of complexity.md and .json (default: docs)')
    cli.add_config_options(p)
    args = p.parse_args()
    if args.published == bool(args.config):
        p.error('name either a CONFIG or --published')
    if args.config:
        if args.rows or args.out:
            p.error('--rows and --out belong to --published')
        found = complexity_table.report(args.config, tuple(args.shape) if args.shape else None, args.cfg_options)
        print(json.dumps(found.to_dict(), indent=2) if args.json else complexity_table.to_text(found))
        return
    if args.shape or args.cfg_options:
        p.error('--published counts at the published sizes, with the configs as they are')
    configs = Path(complexity_table.CONFIGS)
    if not configs.is_dir():
        raise UserError(f'{configs}: no such folder\nRun --published at the root of the repository.')
    out = args.out or (None if args.rows else 'docs')
    folder = prepare_work_dir(out, option='--out') if out else None
    record = complexity_table.run(args.rows, lambda line: print(line, file=sys.stderr, flush=True))
    text = json.dumps(record, indent=1, allow_nan=False) + '\n'
    print(text if args.json else complexity_table.page(record, tables_only=True), end='')
    if folder:
        written = [
            write_atomic(folder / 'complexity.md', complexity_table.page(record)),
            write_atomic(folder / 'complexity.json', text),
        ]
        print(f'written: {", ".join(map(str, written))}', file=sys.stderr)
