#!/usr/bin/env python3
"""Create `.venv` with everything that this project needs. `make setup` runs it. Imports the standard library only."""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / '.setup' / 'pip.log'
TORCH, MMCV_LITE = 'torch==2.13.0', 'mmcv-lite==2.1.0'
PINS = ('build', 'runtime', 'dev')
CONSTRAINTS = [f'-crequirements/{name}.txt' for name in (*PINS, 'extras', 'constraints')]
#: Program that prints name and version of each installed distribution.
LIST_INSTALLED = 'from importlib.metadata import distributions as d; [print(x.name, x.version) for x in d()]'
NETWORK = 'Check the named versions and the network connection, or name a mirror of the package index in PIP_INDEX_URL.'


def output_of(*command) -> str:
    """The output of a command, '' if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return ''
    return '' if done.returncode else done.stdout.strip()


def python_version(python) -> str:
    """The version of a Python interpreter, '' if it does not run."""
    return output_of(python, '-c', 'import platform; print(platform.python_version())')


def run_logged(command: list, name: str, remedy: str) -> None:
    """Run a command, log its output and show pip's steps on one line; exit with an error message if it fails."""
    lines: list[str] = []
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    try:
        with LOG.open('a', encoding='utf-8') as log:
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                if sys.stdout.isatty() and line.split(' ')[0] in ('Collecting', 'Installing'):
                    print(f'  {line.strip()[:100]:<100}', end='\r', flush=True)
    finally:
        process.wait()  # after Ctrl-C, pip restores what it was replacing
        if sys.stdout.isatty():
            print(' ' * 102, end='\r')
    if process.returncode:
        errors = [line for line in lines if line.startswith('ERROR')] or lines[-12:]
        sys.exit(f'error: {name} failed\n{"".join(errors)}{remedy}\nfull log: {LOG}')


class Environment:
    """A virtual environment, and the choices that it was made with."""

    def __init__(self, folder: Path) -> None:
        self.python, self.stamp = folder / 'bin' / 'python', folder / 'setup.json'
        try:
            self.choices = json.loads(self.stamp.read_text()) if self.stamp.is_file() else {}
        except ValueError:
            sys.exit(
                f'error: {self.stamp} is damaged\nDelete it; then name TORCH and EXTRAS again if you had chosen them.'
            )
        if not isinstance(self.choices.get('installed'), dict):
            self.choices.pop('installed', None)  # a list of an earlier version

    def installed(self) -> dict[str, str]:
        """The version of each installed distribution, by its name in lower case."""
        lines = output_of(self.python, '-c', LIST_INSTALLED).splitlines()
        return dict(line.lower().replace('_', '-').split() for line in lines)

    def import_error(self, module: str) -> str:
        """The last line of the error that an import raises, '' if it works."""
        done = subprocess.run([self.python, '-c', f'import {module}'], capture_output=True, text=True)
        return done.stderr.strip().splitlines()[-1] if done.returncode else ''

    def pip(self, *arguments, what: str = 'installing the dependencies', remedy: str = NETWORK) -> None:
        """Run pip in this environment."""
        run_logged([self.python, '-m', 'pip', '--disable-pip-version-check', *arguments], what, remedy)

    def fingerprint(self, *choices: str) -> str:
        """A hash of everything that the environment depends on."""
        files = [ROOT / 'pyproject.toml', *(ROOT / option[2:] for option in CONSTRAINTS)]
        parts = [MMCV_LITE, str(ROOT), python_version(self.python), *choices, *(path.read_text() for path in files)]
        return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


def known_extras() -> list[str]:
    """The extras of pyproject.toml that ``--extras`` takes; Python 3.10 has no reader of TOML."""
    section = (ROOT / 'pyproject.toml').read_text().partition('[project.optional-dependencies]')[2].partition('\n\n')[0]
    return [name for name in re.findall(r'^(\w+) =', section, re.MULTILINE) if name != 'lite']


def check_torchvision(venv: Environment, extras: str) -> None:
    """Remove a torchvision that was built for another torch: importing it fails, and so do packages that try to."""
    found = venv.installed()
    error = venv.import_error('torchvision') if 'torchvision' in found else ''
    if not error:
        return
    venv.pip('uninstall', '-y', 'torchvision')
    message = f'torchvision {found["torchvision"]} does not run with torch {found["torch"]}, and was removed: {error}'
    if {'timm', 'mmpretrain', 'weights'} & {*extras.split(',')}:
        sys.exit(
            f'error: {message}\nThe package index has no torchvision for this build of torch. Name another torch, or '
            f'an index that has both: make setup EXTRAS={extras} TORCH="torch==VERSION --extra-index-url URL"'
        )
    print(message)


def main() -> None:
    """Create or update the environment; each step is skipped if it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python3 scripts/setup_env.py --torch torch==2.5.1 --extras timm,onnx'
    )
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='folder of the environment')
    parser.add_argument('--torch', help=f'requirement for torch, and options of pip (default: as before, or {TORCH})')
    parser.add_argument('--python', help='interpreter (default: as before, or the running one)')
    parser.add_argument(
        '--mmcv',
        choices=('lite', 'compiled'),
        help='mmcv-lite, or mmcv with operators compiled for this torch, which takes minutes and a C++ compiler '
        '(default: as before, or lite)',
    )
    parser.add_argument('--extras', default='', help=f'add optional dependencies: {",".join(known_extras())}')
    args = parser.parse_args()
    unknown = set(filter(None, args.extras.split(','))) - {*known_extras()}
    if unknown:
        other = ' For mmcv-lite, use MMCV=lite.' if 'lite' in unknown else ''
        sys.exit(f'error: no extra {", ".join(sorted(unknown))}\nChoose from {", ".join(known_extras())}.{other}')
    LOG.parent.mkdir(exist_ok=True)

    venv = Environment(args.venv.resolve())
    found, kept = venv.installed(), python_version(venv.python)
    chosen = args.torch or venv.choices.get('torch')
    torch = chosen or TORCH
    mmcv = args.mmcv or ('compiled' if 'mmcv' in found else 'lite')
    extras = ','.join(sorted({*args.extras.split(','), *venv.choices.get('extras', '').split(',')} - {''}))
    replaced = args.python and python_version(args.python) != kept
    same = not replaced and venv.choices.get('fingerprint') == venv.fingerprint(torch, mmcv, extras)
    recorded = venv.choices.get('installed', {})
    added = (found.keys() - recorded.keys()) & {'mmcv', 'mmcv-lite', 'torchvision'}  # these can break the others
    if same and recorded.items() <= found.items() and not added:
        print(f'{args.venv} is ready (Python {kept}, {torch}{f", {extras}" if extras else ""})')
        return

    if venv.choices:  # an interrupted run keeps them
        venv.stamp.write_text(json.dumps({**venv.choices, 'fingerprint': ''}))
    if replaced or not output_of(venv.python, '-m', 'pip', '--version'):
        if args.venv.exists() and any(args.venv.iterdir()) and not (args.venv / 'pyvenv.cfg').is_file():
            sys.exit(f'error: {args.venv} is not a virtual environment\nName another folder.')
        run_logged(
            [args.python or sys.executable, '-m', 'venv', '--clear', args.venv.resolve()],
            f'creating {args.venv}',
            'On Debian and Ubuntu: apt-get install python3-venv',
        )
    other = 'mmcv' if mmcv == 'lite' else 'mmcv-lite'
    if other in found:  # both install the package mmcv: removing one breaks the other
        venv.pip('uninstall', '-y', 'mmcv', 'mmcv-lite', what='removing mmcv')
    print(f'installing {torch} and the other dependencies (a download of 0.3 GB, or 3 GB with CUDA)', flush=True)
    # One command, since torch alone would pull in a newer setuptools. Python compiles a module when it is imported;
    # compiling all of torch's takes longer than everything else.
    requirements = [*(f'-rrequirements/{name}.txt' for name in PINS), *([MMCV_LITE] if mmcv == 'lite' else [])]
    venv.pip('install', '--no-compile', *torch.split(), *requirements, *CONSTRAINTS)
    found = venv.installed()
    if venv.import_error('cv2'):
        print('OpenCV cannot load its GUI libraries: installing the headless build', flush=True)
        headless = f'opencv-python-headless=={found["opencv-python"]}'
        venv.pip('install', '--no-deps', '--force-reinstall', headless)
    # Extras depend on torch or torchvision: keep the installed torch, with a torchvision that fits it.
    keep = [*torch.split(), f'torch=={found["torch"]}', *(['torchvision'] if 'torchvision' in found else [])]
    package = f'{ROOT}[{extras}]' if extras else ROOT
    venv.pip('install', '--no-build-isolation', *keep, *CONSTRAINTS, '-e', package)
    check_torchvision(venv, extras)
    if mmcv == 'compiled':
        build = [venv.python, ROOT / 'scripts' / 'build_mmcv.py']
        if subprocess.run(build, stdin=subprocess.DEVNULL).returncode:  # it has printed the reason
            sys.exit(1)
    choices = {'torch': chosen, 'extras': extras, 'installed': venv.installed()}
    venv.stamp.write_text(json.dumps({**choices, 'fingerprint': venv.fingerprint(torch, mmcv, extras)}))
    print(f'{args.venv} is ready. Activate it: source {args.venv}/bin/activate; check it: replk doctor')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; run the same command to resume')
    except OSError as error:
        sys.exit(f'error: {error}')
