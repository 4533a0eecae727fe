#!/usr/bin/env python3
"""Make `.venv` hold everything this project needs; `make setup` calls it. Standard library only, nothing is installed yet."""
import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'setup.json'
LOG = ROOT / '.setup' / 'pip.log'
TORCH = 'torch==2.13.0'
REQUIREMENTS = [ROOT / 'requirements' / f'{name}.txt' for name in ('build', 'runtime', 'dev')]
CONSTRAINTS = ROOT / 'requirements' / 'constraints.txt'
MODULES = ('torch', 'mmengine', 'mmcv', 'mmseg', 'mmdet', 'replk_mm', 'pkg_resources', 'pytest', 'ruff', 'mypy')


def answer(command: list) -> str:
    """The output of a short command, '' if it fails."""
    try:
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def version(python) -> str:
    """The version of an interpreter, '' if it does not run."""
    return answer([python, '-c', 'import platform; print(platform.python_version())'])


def run(command: list, stage: str, remedy: str) -> None:
    """Run a stage with its output in the log, showing pip's steps on one line; stop everything if it fails."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open('a', encoding='utf-8') as log:
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, text=True, errors='replace', cwd=ROOT)
        lines = []
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            if sys.stdout.isatty() and line.split(' ')[0] in ('Collecting', 'Installing'):
                print(f'  {line.strip()[:100]:<100}', end='\r', flush=True)
    if sys.stdout.isatty():
        print(' ' * 102, end='\r')
    if process.wait():
        sys.exit(f'error: {stage} failed\n{"".join(lines[-12:])}{remedy}\nthe whole log: {LOG}')


def fingerprint(torch: str) -> str:
    """Changes with anything that the finished environment depends on."""
    parts = [path.read_bytes() for path in (*REQUIREMENTS, CONSTRAINTS, ROOT / 'setup.py', Path(__file__))]
    return hashlib.sha256(b'\0'.join([*parts, torch.encode(), str(ROOT).encode(), version(PYTHON).encode()])).hexdigest()


def is_complete(stamp: dict, torch: str) -> bool:
    """Whether the last set-up was for the same things, and its modules are still there."""
    find = f'from importlib.util import find_spec as f; print(all(map(f, {MODULES})))'
    return stamp.get('fingerprint') == fingerprint(torch) and answer([PYTHON, '-c', find]) == 'True'


def main() -> None:
    """Bring the environment to the wanted state; every stage finds out by itself what is done already."""
    parser = argparse.ArgumentParser(description=__doc__, epilog='example: python3 tools/setup_env.py --torch torch==2.5.1')
    parser.add_argument('--torch', help=f'requirement for torch. Defaults to what .venv was made with, or else {TORCH}')
    parser.add_argument('--python', help='interpreter for .venv. Defaults to that of .venv, or else the one running this')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stamp = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    torch = args.torch or stamp.get('torch', TORCH)
    kept = version(PYTHON)
    if VENV.is_dir() and (not kept or (args.python and version(args.python) != kept)):
        print(f'.venv {"has Python " + kept if kept else "does not run"}: making it anew', flush=True)
        shutil.rmtree(VENV)
    if is_complete(stamp, torch):
        print(f'.venv is ready (Python {kept}, {torch})')
        return
    STAMP.unlink(missing_ok=True)
    if not answer([PYTHON, '-m', 'pip', '--version']):
        run([args.python or sys.executable, '-m', 'venv', '--clear', VENV], 'making .venv',
            'Debian and Ubuntu keep this part of Python apart: apt-get install python3-venv')
    print(f'installing {torch} and the other dependencies (a download of 0.3 GB, or 3 GB with CUDA)', flush=True)
    pip = [PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check']
    network = 'is there a network connection, and does pip know your mirror (PIP_INDEX_URL)?'
    files = [part for path in REQUIREMENTS for part in ('-r', path)]
    # One command: torch, mmdet and others each ask for packages whose versions have to fit the others' too.
    run([*pip, *torch.split(), *files, '-c', CONSTRAINTS], 'installing the dependencies', network)
    if not answer([PYTHON, '-c', 'import cv2; print(cv2.__version__)']):
        found = answer([PYTHON, '-c', 'from importlib.metadata import version; print(version("opencv-python"))'])
        print('OpenCV lacks a system library for its windows here: taking the build without windows', flush=True)
        run([*pip, '--no-deps', '--force-reinstall', f'opencv-python-headless=={found}'], 'installing OpenCV', network)
    if subprocess.call([PYTHON, ROOT / 'tools' / 'build_mmcv.py', '--build-dir', LOG.parent]):
        sys.exit(1)
    run([*pip, '--no-deps', '--no-build-isolation', '-e', ROOT], 'installing replk_mm', 'see the log')
    STAMP.write_text(json.dumps({'fingerprint': fingerprint(torch), 'torch': torch}))
    print('.venv is ready. Check it: .venv/bin/python tools/doctor.py')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; the same command goes on where it stopped')
