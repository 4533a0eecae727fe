#!/usr/bin/env python3
"""Run the fast tests with other versions of Python, torch, numpy and setuptools; updates the table in docs/install.md.

Each combination gets an environment, which is removed after its tests. A CUDA build of torch downloads 3 GB and takes
8 GB of disk. The named Python must be on PATH. Results of combinations that do not run now stay in the table.

Example:
    python scripts/test_matrix.py
    python scripts/test_matrix.py newest oldest --keep
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from setup_env import ROOT, Environment, output_of, python_version

RESULTS, PAGE = ROOT / 'docs' / 'test_matrix.json', ROOT / 'docs' / 'install.md'
BEGIN, END = '<!-- test_matrix:begin -->\n', '<!-- test_matrix:end -->'
VERSIONS = ('torch', 'torchvision', 'numpy', 'setuptools')
HEAD = ('Name', 'Python', *VERSIONS, 'Passed', 'Failed', 'Skipped', 'Set-up', 'Tests', 'Date')


@dataclass(frozen=True)
class Combination:
    """Versions to test together."""

    python: str  #: release of Python
    torch: str  #: requirements for pip
    replaced: str = ''  #: requirements that replace the pinned versions


COMBINATIONS = {
    'default': Combination('3.11', 'torch==2.13.0'),
    'torchvision': Combination('3.11', 'torch==2.14.1 torchvision==0.29.1'),
    'newest': Combination('3.13', 'torch==2.15.0'),
    'oldest': Combination('3.10', 'torch==2.5.1', 'numpy==1.26.4 opencv-python==4.11.0.86'),
    'setuptools': Combination('3.11', 'torch==2.13.0', 'setuptools==84.0.0'),
    'between': Combination('3.12', 'torch==2.8.0'),
}


def set_up(combination: Combination, folder: Path) -> str:
    """Create or update an environment; returns an error, '' if it worked."""
    interpreter = shutil.which(f'python{combination.python}') or ''
    if not python_version(interpreter):
        return f'no python{combination.python} on PATH'
    script = [sys.executable, ROOT / 'scripts' / 'setup_env.py', '--venv', folder, '--python', interpreter]
    if subprocess.run([*script, '--torch', combination.torch], stdin=subprocess.DEVNULL).returncode:
        return 'set-up failed'  # it has printed the reason
    if combination.replaced:
        command = [folder / 'bin' / 'python', '-m', 'pip', 'install', '-q', *combination.replaced.split()]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            return f'no {combination.replaced}'
    return ''


def run_tests(folder: Path, arguments: list[str]) -> dict:
    """Run the fast tests in an environment; returns the number of tests by outcome, and an error if pytest crashed."""
    report = folder / 'tests.xml'
    report.unlink(missing_ok=True)
    options = ['-q', '-m', 'not slow', '-n', 'auto', '--dist', 'loadfile', '--no-loadscope-reorder', '-p']
    options += ['no:cacheprovider', f'--junitxml={report}', *arguments]
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([folder / 'bin' / 'python', '-m', 'pytest', *options], cwd=ROOT, env=environment)
    try:
        if done.returncode in (0, 1):  # others mean that pytest failed, or that there were no tests
            return read_report(report)
    except (OSError, ElementTree.ParseError):
        pass
    return {'error': 'pytest failed'}


def read_report(report: Path) -> dict:
    """The number of tests by outcome in a JUnit report. Errors, also of collection, count as failed."""
    suites = list(ElementTree.parse(report).getroot().iter('testsuite'))
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ('tests', 'failures', 'errors', 'skipped')
    )
    return {'passed': total - failures - errors - skipped, 'failed': failures + errors, 'skipped': skipped}


def run(name: str, folder: Path, arguments: list[str]) -> dict:
    """Set up and test a combination; returns its result."""
    started = time.monotonic()
    result = {'error': set_up(COMBINATIONS[name], folder)}
    if not result['error']:
        result = {'setup_s': round(time.monotonic() - started)}
        venv = Environment(folder)
        result['versions'] = {key: value for key, value in venv.installed().items() if key in VERSIONS}
        started = time.monotonic()
        result |= run_tests(folder, arguments) | {'tests_s': round(time.monotonic() - started)}
    commit = output_of('git', '-C', ROOT, 'rev-parse', '--short', 'HEAD')
    python = python_version(folder / 'bin' / 'python') or COMBINATIONS[name].python
    return {'date': f'{date.today()}', 'commit': commit, 'python': python, **result}


def format_table(results: dict[str, dict]) -> str:
    """Results as a Markdown table, in the order of :data:`COMBINATIONS`."""

    def row(name: str, found: dict) -> tuple:
        versions = [found.get('versions', {}).get(key, '-') for key in VERSIONS]
        counts = [found.get('error', '-')] * 3 if 'passed' not in found else [found['passed'], found['failed']]
        counts += [found['skipped']] if 'passed' in found else []
        seconds = [f'{found[key]} s' if key in found else '-' for key in ('setup_s', 'tests_s')]
        return (name, found['python'], *versions, *counts, *seconds, found['date'])

    rows = [HEAD, ('---',) * len(HEAD), *(row(name, results[name]) for name in COMBINATIONS if name in results)]
    return ''.join(f'| {" | ".join(map(str, cells))} |\n' for cells in rows)


def main() -> None:
    """Run the named combinations one by one, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help=f'{", ".join(COMBINATIONS)} (default: all)')
    parser.add_argument('--venvs', type=Path, default=ROOT / '.setup' / 'matrix', help='folder for the environments')
    parser.add_argument('--keep', action='store_true', help='keep the environments')
    parser.add_argument('--pytest-args', default='', help='arguments of pytest; the results are not recorded')
    args = parser.parse_args()
    if unknown := {*args.names} - {*COMBINATIONS}:
        parser.error(f'no combination {", ".join(sorted(unknown))}: choose from {", ".join(COMBINATIONS)}')
    failed = []
    for name in args.names or COMBINATIONS:
        print(f'== {name}: {COMBINATIONS[name]}', flush=True)
        folder = args.venvs.resolve() / name
        try:
            result = run(name, folder, args.pytest_args.split())
        finally:
            if not args.keep and (folder / 'pyvenv.cfg').is_file():  # not a folder that was there before
                shutil.rmtree(folder, ignore_errors=True)
        print(f'== {name}: {result}', flush=True)
        if result.get('failed', 1):
            failed.append(name)
        if not args.pytest_args:
            results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            results[name] = result
            RESULTS.write_text(json.dumps(results, indent=2) + '\n')
            before, _, rest = PAGE.read_text(encoding='utf-8').partition(BEGIN)
            page = f'{before}{BEGIN}{format_table(results)}{END}{rest.partition(END)[2]}'
            PAGE.write_text(page, encoding='utf-8')
    if failed:
        sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
