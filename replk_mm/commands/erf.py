"""Measure the effective receptive field of a backbone: the pixels that contribute to the center of its feature map.

CONFIG is a segmentor, a detector or a bare backbone: a file, or one that is installed with a package
(mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py). Writes erf.json (areas, protocol), erf.npz (scores of all
pixels) and erf.png (heat maps), as docs/erf.md defines them. --compare shows several results side by side, and the
course of a training. --objects measures at objects of the test images, --kernels the kernels themselves.
"""

import argparse
import copy
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from mmengine.config import Config

from replk_mm import cli
from replk_mm.analysis.erf import Erf, image_files, measure_erf
from replk_mm.analysis.erf_objects import measure_objects
from replk_mm.analysis.erf_report import (
    comparison_warnings,
    disambiguate,
    draw_heat_maps,
    draw_lines,
    draw_training,
    format_tables,
)
from replk_mm.analysis.kernel_energy import measure_kernels
from replk_mm.analysis.statistics import paired_difference
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.process import RunOptions
from replk_mm.errors import command, command_line
from replk_mm.files import write_output
from replk_mm.text import format_metrics, markdown_text, text_table, update_page

#: Sides of the central squares in the table of kernels.
_SIDES = (3, 5, 7, 13, 21)


@command
def main() -> None:
    p = cli.parser(
        __doc__,
        'erf configs/upernet_replk31b_ade20k.py x.pth --images photos --out erf',
        'erf --compare erf/31b/erf.json erf/r50/erf.json --out erf',
    )
    p.add_argument('config', nargs='?', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument(
        'checkpoint', nargs='?', help='trained checkpoint of that model, merged or not (default: random weights)'
    )
    cli.add_out(p, 'folder for the results')
    p.add_argument('--images', type=Path, metavar='DIR', help='folder of images, subfolders included')
    p.add_argument(
        '--size',
        type=cli.positive_int,
        default=1024,
        metavar='N',
        help='side in pixels to which images are resized (default: 1024, as in the paper)',
    )
    p.add_argument(
        '--count', type=cli.positive_int, default=50, metavar='N', help='use the first N images by path (default: 50)'
    )
    p.add_argument(
        '--stage', type=int, metavar='N', help="index among the backbone's outputs, from 0 (default: the last)"
    )
    p.add_argument(
        '--position',
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=('Y', 'X'),
        help='of the map, as fractions of its height and width (default: the center)',
    )
    p.add_argument(
        '--objects',
        action='store_true',
        help='of a segmentor: measure at the centers of objects in the test images, by class and size, beside the IoU',
    )
    p.add_argument(
        '--kernels', action='store_true', help='show how much of the energy of merged depthwise kernels is central'
    )
    p.add_argument(
        '--crop',
        type=cli.positive_int,
        metavar='K',
        help='with --kernels: set kernels outside their central K x K pixels to zero, and test before and after',
    )
    p.add_argument('--data-root', metavar='DIR', help='with --objects and --crop: data set (default: as in the config)')
    cli.add_classes(p)
    p.add_argument('--pretrained', metavar='FILE', help='weights of the backbone, such as an ImageNet classifier')
    p.add_argument('--seed', type=int, default=0, metavar='N', help='seed of random weights (default: 0)')
    p.add_argument(
        '--randomize',
        action='store_true',
        help='with random weights: also randomize norms and layer scales, which start as constants '
        '(1e-6 in ConvNeXt, so that a block contributes nothing)',
    )
    p.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    cli.add_config_options(p)
    p.add_argument(
        '--compare', nargs='+', type=Path, metavar='JSON', help='erf.json files for one table and one picture'
    )
    p.add_argument(
        '--name', default='erf', metavar='NAME', help='with --compare: write NAME.md and NAME.png (default: erf)'
    )
    p.add_argument(
        '--page',
        type=Path,
        metavar='FILE',
        help='with --compare: replace the block NAME of this page instead of writing NAME.md',
    )
    args = p.parse_args()
    if bool(args.compare) == bool(args.config):
        p.error('give either a CONFIG or --compare JSON JSON ...')
    if args.compare:
        names = [f'{args.name}.png', f'{args.name}_training.png'] + [f'{args.name}.md'] * (not args.page)
        compare(args.compare, cli.prepare_out(args, *names), args.name, args.page)
        return
    if args.page:
        p.error('--page needs --compare')
    if args.crop and not args.kernels:
        p.error('--crop needs --kernels')
    if args.kernels or args.objects:
        if not args.checkpoint:
            p.error('--kernels and --objects need a CHECKPOINT')
        names = ['kernels.json', 'kernels.png', 'cropped.pth'] if args.kernels else ['objects.json']
        cli.prepare_out(args, *names)
        cfg = load_config(args.config, args.cfg_options)
        options = RunOptions(args.data_root, args.classes, str(Path(args.out, 'test')), device=args.device)
        (show_kernels if args.kernels else show_objects)(cfg, args, options)
        print(f'written: {args.out}')
        return
    if not args.images:
        p.error('--images DIR is missing')
    if not all(0 <= fraction < 1 for fraction in args.position):
        p.error('--position: fractions are at least 0 and less than 1')
    cli.prepare_out(args, 'erf.json', 'erf.npz', 'erf.png', inputs=image_files(args.images, args.count))
    cfg = load_config(args.config, args.cfg_options, needs=('model',))
    found = measure_erf(
        cfg,
        args.checkpoint,
        args.images,
        args.size,
        args.count,
        Path(args.out),
        args.stage,
        args.device,
        pretrained=args.pretrained,
        seed=args.seed,
        randomize=args.randomize,
        position=tuple(args.position),
    )
    draw_heat_maps([found], Path(args.out, 'erf.png'))
    print(format_tables([found]))
    for note in found.notes():
        print(note)
    if found.images < args.count:
        print(f'--images {args.images}: the folder has {found.images} of the {args.count} requested images')
    print(f'written: {args.out}')
    record = Path(args.out, 'erf.json')
    print(f'Compare with others: {command_line("erf", "--compare", record, "OTHER/erf.json", "--out", "DIR")}')


def show_kernels(cfg: Config, args: argparse.Namespace, options: RunOptions) -> None:
    """Print and draw the energy of kernels; with ``--crop``, test the network before and after."""
    out = Path(args.out)
    layers = measure_kernels(cfg, args.checkpoint, out, args.crop)
    rows = [('layer', 'kernel', 'channels', *(f'{side} px' for side in _SIDES))]
    groups: dict[str, list] = defaultdict(list)
    for layer in layers:
        shares = (layer['energy'][min(side // 2, len(layer['energy']) - 1)] for side in _SIDES)
        kind = 'x'.join(map(str, layer['kernel_size'])), str(layer['channels'])
        rows.append((layer['layer'], *kind, *(f'{100 * share:.1f} %' for share in shares)))
        groups['{} kernels, {} channels'.format(*kind)].append(layer['energy'])
    print(f'{text_table(rows)}\nshare of the squared weights within the central square of this side')
    lines = {
        name: [(2 * i + 1, np.mean(part)) for i, part in enumerate(zip(*group, strict=True))]
        for name, group in groups.items()
    }
    draw_lines(out / 'kernels.png', 'side of the central square', 'share of the squared weights', lines)
    tests = []
    for name, file in dict(before=args.checkpoint, after=str(out / 'cropped.pth')).items() if args.crop else ():
        tested = copy.deepcopy(cfg)
        tested.experiment_name = f'{name}_cropping'  # mmengine keeps what runs of one name logged in one place
        tests.append(evaluate(tested, file, options))
        print(f'{name} cropping to {args.crop} x {args.crop}: {format_metrics(tests[-1].metrics)}')
    for score, before in tests[0].statistics.items() if tests else ():
        found = paired_difference([tests[1].statistics[score]], [before])
        ends = (
            'no interval' if found.low is None else f'95 % interval over images {found.low:+.2f} to {found.high:+.2f}'
        )
        print(f'{score}: {found.value:+.2f}, {ends}')


def show_objects(cfg: Config, args: argparse.Namespace, options: RunOptions) -> None:
    """Print the receptive fields at objects by class and by size."""
    found = measure_objects(cfg, args.checkpoint, options, args.count, Path(args.out), args.stage)
    rows = [('', 'objects', 'images', 'mean area', '50 % side', '95 % interval', 'IoU')]
    for row in found:
        ends = '-' if row['low'] is None else f'{row["low"]:.1f} to {row["high"]:.1f}'
        numbers = f'{row["mean_area"]:.0f}', f'{row["side"]:.1f}', ends, f'{row["iou"]:.2f}'
        rows.append((row['name'], str(row['objects']), str(row['images']), *numbers))
    print(text_table(rows))


def compare(paths: list[Path], out: Path, name: str, page: Path | None) -> None:
    """Write one table and one picture of several receptive fields."""
    found = disambiguate([Erf.load(path) for path in paths], paths)
    text = '\n'.join(
        [format_tables(found), *(f'{markdown_text(warning)}  ' for warning in comparison_warnings(found)), '']
    )
    picture = out / f'{name}.png'
    draw_heat_maps(found, picture)
    if len({erf.iteration for erf in found} - {None}) > 1:
        draw_training(found, out / f'{name}_training.png')
    if page:
        link = Path(os.path.relpath(picture, page.parent)).as_posix()
        update_page(page, name, f'![Heat maps of effective receptive fields]({link})\n\n{text}')
    else:
        page = write_output(picture.with_suffix('.md'), text)
    print(text)
    print(f'written: {page}, {picture}')
