#!/usr/bin/env python3
"""Create `.venv` with everything that this project needs. `make setup` runs it. Imports the standard library only."""

import argparse
import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STAMP, LOG = VENV / 'setup.json', ROOT / '.setup' / 'pip.log'
TORCH = 'torch==2.13.0'
OPTIONS = [*(f'-rrequirements/{name}.txt' for name in ('build', 'runtime', 'dev')), '-crequirements/constraints.txt']
#: Program that prints name and version of each installed distribution.
LIST_INSTALLED = 'from importlib.metadata import distributions as d; [print(x.name, x.version) for x in d()]'


def output_of(command: list) -> str:
    """The output of a command, '' if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return ''
    return '' if done.returncode else done.stdout.strip()


def python_version(python) -> str:
    """The version of a Python interpreter, '' if it does not run."""
    return output_of([python, '-c', 'import platform; print(platform.python_version())'])


@contextlib.contextmanager
def start_process(command: list, **options) -> Iterator[subprocess.Popen]:
    """Start a process in its own group; on Ctrl-C, terminate it and wait until it has cleaned up."""
    process = subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True, **options
    )
    try:
        yield process
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def run_logged(command: list, name: str, remedy: str) -> None:
    """Run a command, log its output and show pip's steps on one line; exit with an error message if it fails."""
    lines: list[str] = []
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True, 'errors': 'replace'}
    with LOG.open('a', encoding='utf-8') as log, start_process(command, **pipes) as process:
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            if sys.stdout.isatty() and line.split(' ')[0] in ('Collecting', 'Installing'):
                print(f'  {line.strip()[:100]:<100}', end='\r', flush=True)
    if sys.stdout.isatty():
        print(' ' * 102, end='\r')
    if process.returncode:
        errors = [line for line in lines if line.startswith('ERROR')] or lines[-12:]
        sys.exit(f'error: {name} failed\n{"".join(errors)}{remedy}\nfull log: {LOG}')


def fingerprint(torch: str) -> str:
    """A hash of everything that the environment depends on."""
    parts = [(ROOT / name).read_text() for name in ('pyproject.toml', *(option[2:] for option in OPTIONS))]
    return hashlib.sha256('\0'.join([*parts, torch, str(ROOT), python_version(PYTHON)]).encode()).hexdigest()


def main() -> None:
    """Create or update the environment; each step is skipped if it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python3 scripts/setup_env.py --torch torch==2.5.1 --python python3.12'
    )
    parser.add_argument('--torch', help=f'requirement for torch (default: as in .venv, or {TORCH})')
    parser.add_argument('--python', help='interpreter for .venv (default: as in .venv, or the running one)')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    LOG.parent.mkdir(exist_ok=True)
    stamp = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    chosen = args.torch or stamp.get('torch')
    torch, kept = chosen or TORCH, python_version(PYTHON)
    replaced = args.python and python_version(args.python) != kept
    same = not replaced and stamp.get('fingerprint') == fingerprint(torch)
    if same and set(stamp['installed']) <= set(output_of([PYTHON, '-c', LIST_INSTALLED]).splitlines()):
        print(f'.venv is ready (Python {kept}, {torch})')
        return
    STAMP.unlink(missing_ok=True)
    if replaced or not output_of([PYTHON, '-m', 'pip', '--version']):
        run_logged(
            [args.python or sys.executable, '-m', 'venv', '--clear', VENV],
            'creating .venv',
            'On Debian and Ubuntu: apt-get install python3-venv',
        )
    print(f'installing {torch} and the other dependencies (a download of 0.3 GB, or 3 GB with CUDA)', flush=True)
    pip = [PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check']
    network = 'Check the network connection, or name a mirror of the package index in PIP_INDEX_URL.'
    # One command, since torch alone would pull in a setuptools without pkg_resources.
    run_logged([*pip, *torch.split(), *OPTIONS], 'installing the dependencies', network)
    if not output_of([PYTHON, '-c', 'import cv2; print(cv2.__version__)']):
        found = output_of([PYTHON, '-c', 'from importlib.metadata import version; print(version("opencv-python"))'])
        print('OpenCV cannot load its GUI libraries: installing the headless build', flush=True)
        run_logged(
            [*pip, '--no-deps', '--force-reinstall', f'opencv-python-headless=={found}'], 'installing OpenCV', network
        )
    with start_process([PYTHON, ROOT / 'scripts' / 'build_mmcv.py', '--build-dir', LOG.parent]) as process:
        if process.wait():  # it has printed the reason
            sys.exit(1)
    run_logged([*pip, '--no-deps', '--no-build-isolation', '-e', ROOT], 'installing replk_mm', 'See the log.')
    installed = output_of([PYTHON, '-c', LIST_INSTALLED]).splitlines()
    STAMP.write_text(json.dumps({'fingerprint': fingerprint(torch), 'torch': chosen, 'installed': installed}))
    print('.venv is ready. Check it: .venv/bin/replk doctor')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; run the same command to resume')
    except OSError as error:
        sys.exit(f'error: {error}')
