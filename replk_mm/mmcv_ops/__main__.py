"""``python -m replk_mm.mmcv_ops SCRIPT ARGUMENTS`` runs a script with :mod:`replk_mm.mmcv_ops` installed."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script as if Python had run it."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        what = f'{sys.argv[1]}: no such file' if len(sys.argv) > 1 else 'no script'
        print(f'error: {what}\nusage: python -m replk_mm.mmcv_ops SCRIPT [ARGUMENTS]', file=sys.stderr)
        sys.exit(2)
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
