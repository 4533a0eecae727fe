"""``python -m replk_mm.mmcv_ops SCRIPT ARGUMENTS`` runs a script with :mod:`replk_mm.mmcv_ops` installed.

The script can also name our configs as ``replk_mm::NAME.py``, and read mmengine's checkpoints with torch 2.6 and newer.
"""

import runpy
import sys
from pathlib import Path

from replk_mm import register_configs
from replk_mm.checkpoints.io import register_safe_loaders


def main() -> None:
    """Run the script as if Python had run it."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        what = f'{sys.argv[1]}: no such file' if len(sys.argv) > 1 else 'no script'
        print(f'error: {what}\nusage: python -m replk_mm.mmcv_ops SCRIPT [ARGUMENTS]', file=sys.stderr)
        sys.exit(2)
    register_configs()
    register_safe_loaders()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
