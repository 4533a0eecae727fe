"""Check the data sets of a config: folders, pairs, annotations, classes and images, with every problem found.

Without --full a sample of the images is decoded, as before a training. Exit status: 0 without errors (there may be
warnings and notes), 1 with errors, 2 for a mistake in the command.
"""

import sys
from pathlib import Path

from replk_mm import cli
from replk_mm.data.checks import picture, report
from replk_mm.data.checks.audit import audit
from replk_mm.data.classes import use_classes
from replk_mm.engine.config import load_config, set_data_root
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.errors import UserError, command
from replk_mm.files import write_atomic


@command
def main() -> int:
    p = cli.parser(__doc__, 'python tools/check_data.py configs/upernet_replk31b_ade20k.py --full --json data.json')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the config)')
    p.add_argument('--full', action='store_true', help='decode every image, label map and mask')
    cli.add_classes(p)
    p.add_argument('--json', type=Path, metavar='FILE', help='write all problems, class frequencies and image sizes')
    p.add_argument('--picture', type=Path, metavar='FILE.png', help='draw class frequencies and image sizes')
    p.add_argument('--jobs', type=cli.positive, metavar='N', help='processes (default: one a core)')
    cli.add_config_options(p)
    args = p.parse_args()
    if args.picture:
        picture.check_suffix(args.picture)
    for option, path in (('--json', args.json), ('--picture', args.picture)):
        if path and path.is_dir():
            raise UserError(f'{option} {path}: is a folder\nName a file.')
        if path:  # before the long look, not after it
            prepare_work_dir(path.parent, option=option)
    cfg = load_config(args.config, args.cfg_options)
    if args.data_root:
        set_data_root(cfg, args.data_root)
    for note in use_classes(cfg, args.classes, ('train', 'val')) if args.classes is not None else []:
        print(note)
    result = audit(cfg, args.full, args.jobs)
    print(report.text(result))
    if args.json:
        write_atomic(args.json, report.as_json(result))
        print(f'written: {args.json}')
    if args.picture:
        drawn = picture.draw(result, args.picture)
        print(f'written: {args.picture}' if drawn else f'not written: {args.picture}; no data set has anything to draw')
    return 1 if result.counts()['error'] else 0


if __name__ == '__main__':
    cli.setup_process()
    sys.exit(main())
