"""Convert Cityscapes' label maps (_labelIds, 34 ids) to those that are trained on (_labelTrainIds, 19 classes)."""

from replk_mm import cli
from replk_mm.data.cityscapes import convert
from replk_mm.errors import UserError, command


@command
def main() -> None:
    p = cli.parser(__doc__, 'convert_cityscapes data/cityscapes --jobs 8')
    p.add_argument('root', metavar='ROOT', help='folder with gtFine (or gtCoarse); maps are written beside the source')
    p.add_argument('--jobs', type=cli.positive, metavar='N', help='files at a time (default: one a core)')
    p.add_argument('--force', action='store_true', help='replace maps that are there and differ')
    args = p.parse_args()
    result = convert(args.root, args.jobs, args.force)
    print(f'{args.root}: {result.written} label maps written, {result.kept} were there already')
    if result.problems:
        more = [f'... and {len(result.problems) - 20} more'] if len(result.problems) > 20 else []
        raise UserError(
            '\n'.join(
                [
                    f'{len(result.problems)} label maps not converted:',
                    *result.problems[:20],
                    *more,
                    'Replace these files with those of gtFine_trainvaltest.zip, then run this again.',
                ]
            )
        )
