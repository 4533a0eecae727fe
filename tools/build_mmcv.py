#!/usr/bin/env python3
"""Compile and install mmcv for the torch of the Python that runs this."""
import argparse
import signal
import sys
from pathlib import Path

# Runs before anything is installed, this package included.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from replk_mm.errors import command
from replk_mm.install.mmcv_wheel import MMCV_VERSION, ensure_mmcv


@command
def main() -> int:
    """Parse, build, say what was done."""
    parser = argparse.ArgumentParser(
        description=f'Install mmcv {MMCV_VERSION} with compiled operators: from the cache of earlier builds, or '
                    'compiled, which takes minutes. An interrupted build goes on where it stopped.',
        epilog='example: MAX_JOBS=4 python tools/build_mmcv.py. Other variables: MMCV_CACHE=0 neither reads nor fills '
               'the cache, MMCV_CUDA=0 leaves the CUDA operators out.')
    parser.add_argument('--build-dir', type=Path, default=Path(__file__).resolve().parents[1] / '.setup',
                        help='where sources and objects stay meanwhile')
    parser.add_argument('--rebuild', action='store_true', help='compile even if a working mmcv is installed or cached')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the compilers too
    print(ensure_mmcv(args.build_dir.resolve(), args.rebuild))
    return 0


if __name__ == '__main__':
    sys.exit(main())
