"""Entry point of the commands: ``replk NAME``, ``python -m replk_mm NAME``, and ``python tools/NAME.py``."""

import os
import sys
from importlib import import_module
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 (doctor must start on any interpreter)
    sys.exit(f'error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}\nmake setup PYTHON=python3.11')

from replk_mm.errors import USER_ERROR_STATUS, command, did_you_mean  # noqa: E402

USAGE = 'usage: replk COMMAND [ARGUMENTS]\n       replk COMMAND --help'


def commands() -> dict[str, str]:
    """Summary line of each command, by name."""
    found = {}
    for path in sorted(Path(__file__).with_name('commands').glob('[a-z]*.py')):
        found[path.stem] = path.read_text(encoding='utf-8').split('"""')[1].partition('\n')[0]
    return found


def main(name: str | None = None) -> int:
    """Run a command with the arguments of this process.

    Args:
        name: Of the command. Defaults to the first argument.

    Returns:
        The exit status.
    """
    if name is None:
        known = commands()
        name = sys.argv[1].replace('-', '_') if len(sys.argv) > 1 else ''
        if name not in known:
            print(USAGE + '\n\n' + '\n'.join(f'  {key:20} {line}' for key, line in known.items()))
            if name in ('__help', '_h'):
                return 0
            print(
                f'error: {f"no command {name!r}. {did_you_mean(name, known)}" if name else "no command"}',
                file=sys.stderr,
            )
            return USER_ERROR_STATUS
        sys.argv[:2] = [f'replk {name}']
    # OpenCV reads its limit when it is imported: Pillow's number of pixels, not six times as many.
    os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '178956970')
    return run(name)


@command
def run(name: str) -> int:
    """Set up this process and run a command; torch, mmengine or mmcv may be missing."""
    if name != 'doctor':  # which reports what is missing
        from replk_mm.engine.process import setup_process

        setup_process()
    return import_module(f'replk_mm.commands.{name}').main()


if __name__ == '__main__':
    sys.exit(main())
