"""Write a procedural data set to train and test on in minutes, with nothing to download.

Kinds of scenes, with what tells their classes apart:
    demo       shape and a cue far away, never colour (replk_mm/data/scenes/spec.py)
    context    a cue 36 to 64 pixels away, and nothing else (replk_mm/data/scenes/context.py)
    conflict   shape or texture, which contradict each other in a separate test split (cue_conflict.py there)
The same command resumes an interrupted run.
"""

import argparse
from pathlib import Path

from replk_mm import cli
from replk_mm.data.scenes.writer import LAYOUTS, SCENES, write_demo_data
from replk_mm.errors import command


def parse_args() -> argparse.Namespace:
    parser = cli.parser(
        __doc__,
        'make_demo_data data/demo --train 200 --val 40',
        'make_demo_data data/demo --format coco --train 500 --val 100 --seed 1 --size 256 512 --overwrite',
        'make_demo_data data/conflict --scenes conflict --train 400 --val 40 --size 160 160',
    )
    parser.add_argument('out', type=Path, metavar='OUT', help='folder to write to: new, empty, or an interrupted run')
    parser.add_argument(
        '--scenes', choices=sorted(SCENES), default='demo', help='kind of scenes, see above (default: demo)'
    )
    parser.add_argument(
        '--format', choices=sorted(LAYOUTS), default='ade20k', help='layout of the files (default: ade20k)'
    )
    parser.add_argument('--train', type=int, default=200, metavar='N', help='training scenes (default: 200)')
    parser.add_argument('--val', type=int, default=40, metavar='N', help='validation scenes (default: 40)')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='names the data set (default: 0)')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(256, 256),
        metavar=('H', 'W'),
        help='height and width of a scene in pixels (default: 256 256)',
    )
    parser.add_argument('--overwrite', action='store_true', help='first remove what an earlier run wrote to OUT')
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    meta = write_demo_data(
        args.out,
        args.format,
        args.train,
        args.val,
        args.seed,
        (args.size[0], args.size[1]),
        args.overwrite,
        progress=True,
        kind=SCENES[args.scenes],
    )
    more = ''.join(f' and {count} {split}' for split, count in meta['scenes'].items() if split not in ('train', 'val'))
    advice = LAYOUTS[args.format].advice.format(classes=len(meta['classes']))
    print(
        f'{args.out}: {args.train} training and {args.val} validation{more} scenes of {args.size[0]}x{args.size[1]}, '
        f'{len(meta["classes"])} classes ({", ".join(meta["classes"])}), {args.format} layout. To train on it, set '
        f"data_root='{args.out}', {advice}."
    )
