"""Generate a data set of procedural scenes, without a download.

Kinds of scenes, and the cues for their classes:
    demo       shape and a distant cue, never colour
    context    a cue 36 to 64 pixels away, and nothing else
    conflict   shape and texture, which contradict each other in an additional test split
    shapes     shape and texture of one object, for image classification
Run the same command again to resume an interrupted run.
"""

import argparse
from pathlib import Path

from replk_mm import cli
from replk_mm.data.scenes.kinds import SCENES
from replk_mm.data.scenes.layouts import LAYOUTS
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.errors import command, command_line


def parse_args() -> argparse.Namespace:
    p = cli.parser(
        __doc__,
        'make_demo_data data/demo --train 200 --val 40',
        'make_demo_data data/demo --format coco --train 500 --val 100 --seed 1 --size 256 512 --overwrite',
        'make_demo_data data/conflict --scenes conflict --train 400 --val 60 --size 96 96',
        'make_demo_data data/shapes --scenes shapes --train 1600 --val 150 --size 64 64',
    )
    p.add_argument('out', type=Path, metavar='OUT', help='folder to write: new, empty, or of an interrupted run')
    p.add_argument('--scenes', choices=sorted(SCENES), help='kind of scenes (default: demo; of imagenet: shapes)')
    p.add_argument(
        '--format', choices=sorted(LAYOUTS), help='layout of the files (default: ade20k; of shapes: imagenet)'
    )
    p.add_argument('--train', type=int, default=200, metavar='N', help='training scenes (default: 200)')
    p.add_argument('--val', type=int, default=40, metavar='N', help='validation scenes (default: 40)')
    p.add_argument('--seed', type=int, default=0, metavar='S', help='seed of the scenes (default: 0)')
    size = 'height and width of a scene in pixels (default: 256 256)'
    p.add_argument('--size', type=int, nargs=2, default=(256, 256), metavar=('H', 'W'), help=size)
    p.add_argument('--overwrite', action='store_true', help='first remove the files of an earlier run in OUT')
    return p.parse_args()


@command
def main() -> None:
    args = parse_args()
    kind = SCENES[args.scenes or next(name for name, k in SCENES.items() if args.format in (None, *k.layouts))]
    args.format = args.format or kind.layouts[0]
    layout = LAYOUTS[args.format]
    size = args.size[0], args.size[1]
    meta = write_demo_data(args.out, args.format, args.train, args.val, args.seed, size, args.overwrite, kind)
    scenes = ', '.join(f'{count} {split}' for split, count in meta['scenes'].items())
    print(f'{len(meta["classes"])} classes: {", ".join(meta["classes"])}')
    print(f'written: {args.out} ({scenes} scenes of {size[0]}x{size[1]} pixels, {args.format} layout)')
    classes = ['--classes', 'auto'] if 'classes' in kind.meta else []
    print(f'next: {command_line("train", f"configs/{layout.config}", "--data-root", args.out, *classes)}')
