"""Measure the effective receptive field of a backbone: the pixels that contribute to the center of its feature map.

CONFIG is a segmentor, a detector or a bare backbone: a file, or one that is installed with a package
(mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py). Writes erf.json (areas, protocol), erf.npz (scores of all
pixels) and erf.png (heat maps), as docs/erf.md defines them. --compare shows several results side by side.
"""

import os
from pathlib import Path

from replk_mm import cli
from replk_mm.analysis.erf import Erf, image_files, measure_erf
from replk_mm.analysis.erf_report import comparison_warnings, disambiguate, draw_heat_maps, format_tables
from replk_mm.engine.config import load_config
from replk_mm.errors import command, command_line
from replk_mm.files import write_output
from replk_mm.text import markdown_text, update_page


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
        names = [f'{args.name}.png'] + [f'{args.name}.md'] * (not args.page)
        compare(args.compare, cli.prepare_out(args, *names), args.name, args.page)
        return
    if not args.images:
        p.error('--images DIR is missing')
    if args.page:
        p.error('--page needs --compare')
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
        progress=True,
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


def compare(paths: list[Path], out: Path, name: str, page: Path | None) -> None:
    """Write one table and one picture of several receptive fields."""
    found = disambiguate([Erf.load(path) for path in paths], paths)
    text = '\n'.join(
        [format_tables(found), *(f'{markdown_text(warning)}  ' for warning in comparison_warnings(found)), '']
    )
    picture = out / f'{name}.png'
    draw_heat_maps(found, picture)
    if page:
        link = Path(os.path.relpath(picture, page.parent)).as_posix()
        update_page(page, name, f'![Heat maps of effective receptive fields]({link})\n\n{text}')
    else:
        page = write_output(picture.with_suffix('.md'), text)
    print(text)
    print(f'written: {page}, {picture}')
