"""Compare two test results: conditions, metrics, classes, images, and a confidence interval of the difference."""

import argparse
import sys
from pathlib import Path

from replk_mm import cli
from replk_mm.bench.compare.compare import compare_results, render_comparison, write_comparison
from replk_mm.bench.compare.results import DataSource
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
    cli.add_out(p, 'write compare.json, compare.md and pictures there', required=False)
    p.add_argument(
        '--images',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='number of images to show, most changed first (default: 8)',
    )
    p.add_argument('--no-images', action='store_true', help='compare metrics only; needs neither data nor predictions')
    p.add_argument(
        '--kind', choices=['bbox', 'segm'], default='bbox', help='detection: compare boxes or masks (default: bbox)'
    )
    p.add_argument(
        '--score',
        type=float,
        default=0.3,
        metavar='S',
        help='detection: ignore detections below this score when comparing images (default: 0.3)',
    )
    p.add_argument('--seed', type=int, help=argparse.SUPPRESS)
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the results)')
    p.add_argument('--config', metavar='FILE', help='config of both results (default: as in the results)')
    cli.add_classes(p)
    cli.add_config_options(p)
    args = p.parse_args()
    if args.seed is not None:
        print('--seed is deprecated and has no effect: the interval no longer draws images', file=sys.stderr)
    out = Path(args.out) if args.out else None
    if out:
        pictures = (path.name for path in out.glob('changed_*.png'))
        cli.prepare_out(args, 'compare.json', 'compare.md', *pictures, inputs=[args.a, args.b])
    found = compare_results(
        args.a,
        args.b,
        DataSource(args.data_root, args.config, args.classes, args.cfg_options),
        images=None if args.no_images else args.images,
        kind=args.kind,
        score=args.score,
        out=out,
    )
    print(render_comparison(found))
    if out:
        written = write_comparison(found, out)
        print(f'\nwritten: {", ".join(str(path) for path in written)}')
