"""See a large-kernel network train, get reparameterized and be evaluated, in minutes on a CPU."""

import sys
import time
from pathlib import Path

from replk_mm import cli, demo
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.errors import UserError, command


@command
def main() -> None:
    p = cli.parser(__doc__, 'python tools/demo.py --task detection --out demo/detection')
    p.add_argument(
        '--task',
        choices=sorted(demo.STORIES),
        default='segmentation',
        help='label maps, or boxes and masks (default: segmentation)',
    )
    p.add_argument(
        '--out', default='demo', metavar='DIR', help='folder for data, checkpoints and pictures (default: demo)'
    )
    p.add_argument('--seed', type=int, default=0, metavar='N', help='of scenes and training (default: 0)')
    p.add_argument('--max-iters', type=cli.positive, metavar='N', help='train N iterations instead of the full demo')
    p.add_argument('--resume', action='store_true', help='go on where an interrupted demo stopped')
    args = p.parse_args()
    start, story = time.monotonic(), demo.STORIES[args.task]
    rows, picture = demo.run(prepare_work_dir(args.out, option='--out'), args.seed, args.max_iters, args.resume, story)
    print(demo.table(rows))
    print(
        f'\n{", ".join(story.metrics)} in percent over {demo.VAL_SCENES} scenes never trained on; '
        f'{(time.monotonic() - start) / 60:.1f} minutes'
    )
    if story.remark:
        print(story.remark)
    print(f'predictions: {picture}\nfigures with their protocol: {Path(args.out) / "demo.json"}')
    if not demo.equal(rows, story.tolerance):
        raise UserError(
            f'{", ".join(story.metrics)} before and after reparameterization differ by more than '
            f'{story.tolerance:g} percentage points: see the table'
        )


if __name__ == '__main__':
    cli.setup_process()
    sys.exit(main())
