"""List the configs: what each trains, what was published for it, and its parameters.

Example:
    python tools/list_configs.py
    python tools/list_configs.py --write docs/configs.md --readme README.md
"""

import argparse
import sys
from pathlib import Path

from replk_mm.bench import config_table
from replk_mm.errors import UserError, command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--configs', type=Path, default=Path('configs'), metavar='DIR', help='folder of the configs (default: configs)'
    )
    parser.add_argument('--write', type=Path, metavar='PAGE', help='write the page here, such as docs/configs.md')
    parser.add_argument(
        '--readme',
        type=Path,
        metavar='FILE',
        help=f'renew the block of tables that is marked {config_table.BLOCK} in this file',
    )
    return parser.parse_args()


def write_if_changed(path: Path, text: str) -> None:
    """Write ``text``, and say whether that changed anything."""
    if path.is_file() and path.read_text(encoding='utf-8') == text:
        print(f'{path}: up to date')
        return
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}\nCreate it first.')
    path.write_text(text, encoding='utf-8')
    print(f'{path}: written')


@command
def main() -> None:
    args = parse_args()
    if args.readme and not args.readme.is_file():
        raise UserError(f'--readme {args.readme}: no such file')
    rows = config_table.read_configs(args.configs)
    if not (args.write or args.readme):
        print(config_table.to_markdown(rows, args.configs.as_posix()), end='')
    if args.write:
        write_if_changed(args.write, config_table.page(rows))
    if args.readme:
        text = args.readme.read_text(encoding='utf-8')
        write_if_changed(args.readme, config_table.update_readme(text, rows, str(args.readme)))


if __name__ == '__main__':
    sys.exit(main())
