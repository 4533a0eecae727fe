"""Explain how two test results differ: conditions, classes, images that changed most, whether it is more than luck."""

from pathlib import Path

from replk_mm import cli
from replk_mm.bench.compare.compare import compare_results
from replk_mm.bench.compare.render import render_comparison, write_comparison
from replk_mm.bench.compare.results import DataSource
from replk_mm.engine.process import prepare_work_dir
from replk_mm.errors import command


@command
def main() -> None:
    p = cli.parser(__doc__, 'compare out/a out/b --out out/compared')
    for name in 'ab':
        p.add_argument(
            name,
            metavar=f'RESULT_{name.upper()}',
            help='folder that the test command wrote with --out, its metrics.json, or runs/ROW/SEED of a suite',
        )
    p.add_argument('--out', metavar='DIR', help='write compare.json, compare.md and pictures there')
    p.add_argument(
        '--images', type=cli.positive_int, default=8, metavar='N', help='images that changed most (default: 8)'
    )
    p.add_argument(
        '--no-images', action='store_true', help='compare the figures alone: needs neither data nor predictions'
    )
    p.add_argument(
        '--kind', choices=['bbox', 'segm'], default='bbox', help='detection: by boxes or by masks (default: bbox)'
    )
    p.add_argument(
        '--score',
        type=float,
        default=0.3,
        metavar='S',
        help='detection: least score of a detection when images are compared (default: 0.3)',
    )
    p.add_argument('--seed', type=int, default=0, metavar='S', help='of the resampling (default: 0)')
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: where it was tested)')
    p.add_argument('--config', metavar='FILE', help="for both, if the results' own is not there any more")
    cli.add_classes(p)
    cli.add_config_options(p)
    args = p.parse_args()
    out = Path(args.out) if args.out else None
    if out:
        prepare_work_dir(out, option='--out')
    found = compare_results(
        args.a,
        args.b,
        DataSource(args.data_root, args.config, args.classes, args.cfg_options),
        images=None if args.no_images else args.images,
        kind=args.kind,
        score=args.score,
        seed=args.seed,
        out=out,
    )
    print(render_comparison(found))
    if out:
        written = write_comparison(found, out)
        print(f'\nwritten: {", ".join(str(path) for path in written)}')
