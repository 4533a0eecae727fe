"""Convert the label maps of Cityscapes (_labelIds, 34 ids) to those for training (_labelTrainIds, 19 classes)."""

from replk_mm import cli
from replk_mm.data.cityscapes import convert_labels
from replk_mm.errors import UserError, command, command_line

_SHOWN = 20


@command
def main() -> None:
    p = cli.parser(__doc__, 'convert_cityscapes data/cityscapes --jobs 8')
    p.add_argument(
        'root', metavar='ROOT', help='folder with gtFine (or gtCoarse); new maps are written beside the originals'
    )
    p.add_argument('--jobs', type=cli.positive_int, metavar='N', help='number of threads (default: one per core)')
    p.add_argument('--force', action='store_true', help='replace existing maps that differ')
    args = p.parse_args()
    result = convert_labels(args.root, args.jobs, args.force)
    print(f'{args.root}: {result.written} label maps written, {result.kept} existed already')
    if result.errors:
        more = [f'... and {len(result.errors) - _SHOWN} more'] if len(result.errors) > _SHOWN else []
        lines = [f'{len(result.errors)} label maps not converted:', *result.errors[:_SHOWN], *more]
        raise UserError('\n'.join([*lines, 'Replace these files by those of gtFine_trainvaltest.zip, and run again.']))
    config = 'configs/upernet_replk31b_cityscapes.py'
    print(f'next: {command_line("check_data", config, "--data-root", args.root)}')
