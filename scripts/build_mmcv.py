#!/usr/bin/env python3
"""Compile and install mmcv for the torch of the running Python; `make setup MMCV=compiled` runs it.

There are no mmcv wheels for current torch releases, and a wheel built for another torch crashes or does not load. Built
wheels are kept in ~/.cache/replk_mm. Imports the standard library only.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = '2.1.0'
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
#: CPU seconds of a build without CUDA and debug symbols; measured: 8 min 22 s on 2 cores.
BUILD_SECONDS = 1000
#: Program that runs NMS on three boxes, of which it must keep two; on each GPU too if its argument is "cuda".
CHECK = """
import sys, torch, mmcv._ext
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 20., 30., 30.]])
for device in ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()) if sys.argv[1] == 'cuda')]:
    kept = nms(boxes.to(device), torch.tensor([.9, .8, .7]).to(device), iou_threshold=.5)[1].tolist()
    assert kept == [0, 2], f'{device}: nms kept boxes {kept} instead of [0, 2]'
"""


def last_line(done: subprocess.CompletedProcess) -> str:
    """The last line of a failed command's errors, '' if it succeeded."""
    lines = done.stderr.strip().splitlines() or [f'exit status {done.returncode}']
    return lines[-1] if done.returncode else ''


def check_operators(kind: str) -> str:
    """Run an operator of the installed mmcv on ``kind``, 'cpu' or 'cuda'; return the error, '' if it works."""
    return last_line(subprocess.run([sys.executable, '-c', CHECK, kind], capture_output=True, text=True))


def install(wheel: Path, kind: str) -> str:
    """Install a wheel and return ''; if its operators do not run, delete and uninstall it and return the error."""
    command = [*PIP, 'install', '-q', '--no-deps', '--force-reinstall', str(wheel)]
    failure = last_line(subprocess.run(command, capture_output=True, text=True)) or check_operators(kind)
    if failure:
        wheel.unlink()
        subprocess.run([*PIP, 'uninstall', '-q', '-y', 'mmcv'], capture_output=True)
    return failure


def parallel_jobs() -> int:
    """Number of parallel compiler processes: ``MAX_JOBS``, or what cores and memory (2 GiB each) allow."""
    asked = os.environ.get('MAX_JOBS', '')
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return max(1, min(cpus, memory // 2**31))


def compile_wheel(folder: Path, kind: str, log_path: Path) -> Path:
    """Compile mmcv and return the wheel, in ``folder``."""
    no_compiler = 'the C++ compiler (apt-get install g++, dnf install gcc-c++, xcode-select --install)'
    no_headers = "Python's headers (apt-get install python3-dev, dnf install python3-devel)"
    compiler = shutil.which(os.environ.get('CXX', 'c++').split()[0]) or shutil.which('g++')
    for found, what in (
        (compiler, no_compiler),
        (Path(sysconfig.get_path('include'), 'Python.h').is_file(), no_headers),
    ):
        if not found:
            sys.exit(f'error: mmcv cannot be compiled without {what}\nmake setup MMCV=lite compiles nothing.')
    jobs = parallel_jobs()
    print(
        f'compiling mmcv {VERSION}: about {BUILD_SECONDS / jobs / 60:.0f} minutes with {jobs} processes'
        f'{", longer with CUDA" if kind == "cuda" else ""}; log: {log_path}',
        flush=True,
    )
    environment = {
        **os.environ,
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': str(jobs),
        'FORCE_CUDA': '1' if kind == 'cuda' else '0',
        # Debug symbols double the build time and make the wheel twenty times as large.
        'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0'.strip(),
        # torch finds ninja in PATH; its folder is not there unless the environment is activated.
        'PATH': os.pathsep.join((str(Path(sys.executable).parent), os.environ.get('PATH', ''))),
        # With a visible GPU, mmcv's setup.py requires a CUDA toolkit.
        **({} if kind == 'cuda' else {'CUDA_VISIBLE_DEVICES': ''}),
    }
    # pip's cache would return this wheel for any torch.
    options = ('-v', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', 'mmcv', '-w', str(folder))
    command = [*PIP, 'wheel', *options, f'mmcv=={VERSION}']
    streams = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    start = shown = time.monotonic()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        log_path.open('w', encoding='utf-8') as log,
        subprocess.Popen(command, env=environment, text=True, errors='replace', **streams) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            progress = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if progress and (sys.stdout.isatty() or time.monotonic() - shown > 30):
                shown = time.monotonic()
                end = '\r' if sys.stdout.isatty() else '\n'
                print(f'  {progress[1]} of {progress[2]} files, {shown - start:.0f} s', end=end, flush=True)
    if process.returncode:
        text = log_path.read_text(encoding='utf-8')
        cause = re.search(r'^.*(Killed|No space left|[Ee]rror:).*$', text, re.MULTILINE)
        sys.exit(
            f'error: mmcv does not compile: {cause[0].strip() if cause else "the log names no error"}\n'
            'MAX_JOBS=1 needs less memory, MMCV_CUDA=0 omits CUDA, make setup MMCV=lite compiles nothing.\n'
            f'full log: {log_path}'
        )
    return next(folder.glob('*.whl'))


def main() -> None:
    """Install a working mmcv: the installed one, one from the cache of earlier builds, or a new build."""
    parser = argparse.ArgumentParser(
        description=f'Install mmcv {VERSION} with compiled operators: from the cache of earlier builds, or compiled, '
        'which takes minutes.',
        epilog='example: MAX_JOBS=4 python scripts/build_mmcv.py. MMCV_CUDA=0 omits the CUDA operators.',
    )
    parser.add_argument('--rebuild', action='store_true', help='compile even if a working mmcv is installed or cached')
    args = parser.parse_args()
    # Importing OpenCV here tells its missing system libraries from a broken mmcv wheel.
    facts = subprocess.run(
        [sys.executable, '-c', 'import cv2, torch; print(torch.__version__, torch.version.cuda)'],
        capture_output=True,
        text=True,
    )
    if facts.returncode:
        sys.exit(f'error: mmcv needs torch and OpenCV: {last_line(facts)}\nInstall them first.')
    torch, with_cuda = facts.stdout.split()
    kind = 'cuda' if with_cuda != 'None' and os.environ.get('MMCV_CUDA') != '0' and shutil.which('nvcc') else 'cpu'
    if with_cuda != 'None' and kind == 'cpu':
        print("mmcv's operators are for the CPU only: no CUDA toolkit (nvcc), or MMCV_CUDA=0", flush=True)
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    libc = '-'.join(filter(None, platform.libc_ver())) or 'libc'
    key = '-'.join((f'mmcv-{VERSION}', python, f'torch{torch}', kind, sysconfig.get_platform(), libc))
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'replk_mm', 'wheels', key)
    if args.rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    elif not check_operators(kind):
        print(f'mmcv {VERSION}: the installed operators run')
        return
    for wheel in folder.glob('*.whl'):
        if not install(wheel, kind):
            print(f'mmcv {VERSION}: installed from {wheel}, the operators run')
            return
        print(f'the operators in {wheel} do not run: rebuilding', flush=True)
    failure = install(compile_wheel(folder, kind, ROOT / '.setup' / 'build.log'), kind)
    if failure:
        sys.exit(f'error: mmcv is compiled, but its operators do not run: {failure}\nmake setup MMCV=lite needs none.')
    print(f'mmcv {VERSION}: compiled and installed, the operators run')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ninterrupted')
