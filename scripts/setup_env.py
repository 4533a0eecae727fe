#!/usr/bin/env python3
"""Create `.venv` with everything this project needs; `make setup` calls it. Imports the standard library only."""

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
# Name and version of everything installed, one a line.
LIST = 'from importlib.metadata import distributions as d; [print(x.name, x.version) for x in d()]'


def answer(command: list) -> str:
    """The output of a short command, '' if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return ''
    return '' if done.returncode else done.stdout.strip()


def version(python) -> str:
    """The version of an interpreter, '' if it does not run."""
    return answer([python, '-c', 'import platform; print(platform.python_version())'])


@contextlib.contextmanager
def stage(command: list, **options) -> Iterator[subprocess.Popen]:
    """A process in a group of its own: an interruption reaches it once, from here, and it has time to clean up."""
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


def run(command: list, name: str, remedy: str) -> None:
    """Run a stage with its output in the log, showing pip's steps on one line; stop everything if it fails."""
    lines: list[str] = []
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True, 'errors': 'replace'}
    with LOG.open('a', encoding='utf-8') as log, stage(command, **pipes) as process:
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            if sys.stdout.isatty() and line.split(' ')[0] in ('Collecting', 'Installing'):
                print(f'  {line.strip()[:100]:<100}', end='\r', flush=True)
    if sys.stdout.isatty():
        print(' ' * 102, end='\r')
    if process.returncode:
        errors = [line for line in lines if line.startswith('ERROR')] or lines[-12:]
        sys.exit(f'error: {name} failed\n{"".join(errors)}{remedy}\nthe whole log: {LOG}')


def fingerprint(torch: str) -> str:
    """Changes with anything that the finished environment depends on."""
    parts = [(ROOT / name).read_text() for name in ('pyproject.toml', *(option[2:] for option in OPTIONS))]
    return hashlib.sha256('\0'.join([*parts, torch, str(ROOT), version(PYTHON)]).encode()).hexdigest()


def main() -> None:
    """Create or update the environment; every stage skips what is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python3 scripts/setup_env.py --torch torch==2.5.1 --python python3.12'
    )
    parser.add_argument('--torch', help=f'requirement for torch. Defaults to that of .venv, or else {TORCH}')
    parser.add_argument('--python', help='interpreter for .venv. Defaults to that of .venv, or else the running one')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    LOG.parent.mkdir(exist_ok=True)
    stamp = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    chosen = args.torch or stamp.get('torch')
    torch, kept = chosen or TORCH, version(PYTHON)
    replaced = args.python and version(args.python) != kept
    same = not replaced and stamp.get('fingerprint') == fingerprint(torch)
    if same and set(stamp['installed']) <= set(answer([PYTHON, '-c', LIST]).splitlines()):
        print(f'.venv is ready (Python {kept}, {torch})')
        return
    STAMP.unlink(missing_ok=True)
    if replaced or not answer([PYTHON, '-m', 'pip', '--version']):
        run(
            [args.python or sys.executable, '-m', 'venv', '--clear', VENV],
            'making .venv',
            'Debian and Ubuntu keep this part of Python apart: apt-get install python3-venv',
        )
    print(f'installing {torch} and the other dependencies (a download of 0.3 GB, or 3 GB with CUDA)', flush=True)
    pip = [PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check']
    network = 'is there a network connection, and does pip know your mirror (PIP_INDEX_URL)?'
    # One command: on its own, torch would replace setuptools by one without pkg_resources.
    run([*pip, *torch.split(), *OPTIONS], 'installing the dependencies', network)
    if not answer([PYTHON, '-c', 'import cv2; print(cv2.__version__)']):
        found = answer([PYTHON, '-c', 'from importlib.metadata import version; print(version("opencv-python"))'])
        print('OpenCV lacks a system library for its windows here: taking the build without windows', flush=True)
        run([*pip, '--no-deps', '--force-reinstall', f'opencv-python-headless=={found}'], 'installing OpenCV', network)
    with stage([PYTHON, ROOT / 'scripts' / 'build_mmcv.py', '--build-dir', LOG.parent]) as process:
        if process.wait():  # it has printed why
            sys.exit(1)
    run([*pip, '--no-deps', '--no-build-isolation', '-e', ROOT], 'installing replk_mm', 'see the log')
    installed = answer([PYTHON, '-c', LIST]).splitlines()
    STAMP.write_text(json.dumps({'fingerprint': fingerprint(torch), 'torch': chosen, 'installed': installed}))
    print('.venv is ready. Check it: .venv/bin/python tools/doctor.py')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; the same command resumes')
    except OSError as error:
        sys.exit(f'error: {error}')
