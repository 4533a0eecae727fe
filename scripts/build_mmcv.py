#!/usr/bin/env python3
"""Compile and install mmcv for the torch of the running Python. Imports the standard library only.

There are no mmcv wheels for current torch releases, and a wheel built for another torch crashes or does not load.
"""

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = '2.1.0'
PIP = [sys.executable, '-m', 'pip']
#: CPU seconds of a build without CUDA and debug symbols; measured: 8 min 22 s on 2 cores.
BUILD_SECONDS = 1000
#: Program that runs NMS on three boxes, of which it must keep two; on each GPU too if its argument is "cuda".
CHECK = """
import sys, torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 20., 30., 30.]])
for device in ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()) if sys.argv[1] == 'cuda')]:
    kept = nms(boxes.to(device), torch.tensor([.9, .8, .7]).to(device), iou_threshold=.5)[1].tolist()
    assert kept == [0, 2], f'{device}: nms kept boxes {kept} instead of [0, 2]'
"""
#: Pattern in a build log, cause, remedy. The first match wins.
CAUSES = (
    (
        r'Killed signal terminated program|virtual memory exhausted|Cannot allocate memory|std::bad_alloc|: Killed',
        'the compiler ran out of memory',
        'Compile one file at a time: MAX_JOBS=1 make setup',
    ),
    (r'No space left on device', 'the disk is full', 'Free about 1 GB and run the same command again.'),
    (
        r"Python\.h: No such file|'Python\.h' file not found",
        "Python's header files are missing (Python.h)",
        'apt-get install python3-dev (Fedora: dnf install python3-devel)',
    ),
    (
        r"(g\+\+|gcc|c\+\+|clang)'?:? (command )?not found|No such file or directory: '[^']*(g\+\+|gcc|c\+\+|clang)'"
        r"|command '[^']*(g\+\+|gcc|c\+\+|clang)' failed: (No such file|\[Errno 2\])",
        'there is no C++ compiler',
        'apt-get install g++ (Fedora: dnf install gcc-c++; macOS: xcode-select --install)',
    ),
    (
        r"No module named 'pkg_resources'",
        'setuptools is missing or too new',
        f"{sys.executable} -m pip install 'setuptools<80'",
    ),
    (
        r'\.cuh?[(:].*error|nvcc (fatal|error)|CUDA_HOME environment variable is not set|The detected CUDA version',
        'the CUDA operators do not compile with this CUDA toolkit',
        'Build without them: MMCV_CUDA=0 make setup',
    ),
)


def find_cause(log: str) -> tuple[str, str]:
    """Cause and remedy of a failed build; the first error line if the cause is unknown."""
    for pattern, cause, remedy in CAUSES:
        if re.search(pattern, log):
            return cause, remedy
    first = re.search(r'^.*\berror:.*$', log, re.MULTILINE | re.IGNORECASE)
    return (first.group(0).strip() if first else 'the log names no cause'), 'Read the log.'


def parallel_jobs() -> int:
    """Number of parallel compiler processes: ``MAX_JOBS``, or what cores and memory (2 GiB each) allow."""
    asked = os.environ.get('MAX_JOBS', '')
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    memory = 2**40
    try:
        import psutil

        memory = psutil.virtual_memory().available
    except ImportError:
        pass
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min(cpus, memory // 2**31))


def check_operators(cuda: bool) -> str:
    """Run an operator of the installed mmcv; return the error, '' if it works."""
    done = subprocess.run([sys.executable, '-c', CHECK, 'cuda' if cuda else 'cpu'], capture_output=True, text=True)
    return '' if not done.returncode else (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]


def install(wheel: Path, cuda: bool) -> str:
    """Install a wheel and return ''; if its operators do not run, uninstall it and return the error."""
    done = subprocess.run(
        [*PIP, 'install', '-q', '--no-deps', '--force-reinstall', str(wheel)], capture_output=True, text=True
    )
    failure = done.stderr.strip() or 'pip failed' if done.returncode else check_operators(cuda)
    if failure:
        subprocess.run([*PIP, 'uninstall', '-q', '-y', 'mmcv'], capture_output=True)
    return failure


def fetch_sources(folder: Path) -> Path:
    """Download and unpack the sources, once: new time stamps would make every object file look outdated."""
    source = folder / 'source'
    if source.is_dir():
        return source
    done = subprocess.run(
        [
            *PIP,
            'download',
            '--no-deps',
            '--no-binary',
            ':all:',
            '--no-build-isolation',
            '-d',
            str(folder / 'download'),
            f'mmcv=={VERSION}',
        ],
        capture_output=True,
        text=True,
    )
    archives = list((folder / 'download').glob('*.tar.gz'))
    if done.returncode or not archives:
        sys.exit(
            f'error: pip could not fetch the sources of mmcv\n{done.stderr.strip()[-1500:]}\n'
            f'Check the network connection, or name a mirror of the package index in PIP_INDEX_URL.'
        )
    unpacked = folder / 'unpacked'
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(unpacked, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    next(unpacked.iterdir()).rename(source)
    return source


def compile_wheel(folder: Path, cuda: bool) -> Path:
    """Compile in ``folder`` and return the wheel. Object files stay there, so that an interrupted build can resume."""
    if not shutil.which(os.environ.get('CXX', 'c++').split()[0]) and not shutil.which('g++'):
        sys.exit('error: mmcv cannot be compiled: {}\n{}'.format(*find_cause('c++: command not found')))
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        sys.exit('error: mmcv cannot be compiled: {}\n{}'.format(*find_cause('Python.h: No such file')))
    folder.mkdir(parents=True, exist_ok=True)
    source, log_path, count = fetch_sources(folder), folder / 'build.log', parallel_jobs()
    print(
        f'compiling mmcv {VERSION}: about {BUILD_SECONDS / count / 60:.0f} minutes with {count} processes'
        f'{", longer with CUDA" if cuda else ""}; log: {log_path}',
        flush=True,
    )
    environment = {
        **os.environ,
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': str(count),
        'FORCE_CUDA': '1' if cuda else '0',
        # Debug symbols double the build time and make the wheel twenty times as large.
        'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0'.strip(),
        # torch finds ninja in PATH; its folder is not there unless the environment is activated.
        'PATH': os.pathsep.join((str(Path(sys.executable).parent), os.environ.get('PATH', ''))),
    }
    if not cuda:  # with a visible GPU, mmcv's setup.py requires a CUDA toolkit
        environment['CUDA_VISIBLE_DEVICES'] = ''
    # Not `pip wheel`, which removes all object files when a build fails. The process has its own group, so that Ctrl-C
    # can be passed on to setup.py, ninja and the compilers together.
    process = subprocess.Popen(
        [sys.executable, 'setup.py', 'bdist_wheel', '--dist-dir', str(folder / 'wheel')],
        cwd=source,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,
    )
    assert process.stdout is not None
    start = shown = time.monotonic()
    try:
        with log_path.open('w', encoding='utf-8') as log:
            for line in process.stdout:
                log.write(line)
                progress = re.match(r'\[(\d+)/(\d+)\]', line)
                if progress and (sys.stdout.isatty() or time.monotonic() - shown > 30):
                    shown = time.monotonic()
                    print(
                        f'  {progress[1]} of {progress[2]} files, {shown - start:.0f} s',
                        end='\r' if sys.stdout.isatty() else '\n',
                        flush=True,
                    )
        status = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)  # ninja then removes unfinished object files
        process.wait()
        raise
    if status:
        cause, remedy = find_cause(log_path.read_text(encoding='utf-8'))
        sys.exit(f'error: mmcv does not compile: {cause}\n{remedy}\nfull log: {log_path}')
    return next((folder / 'wheel').glob('*.whl'))


def main() -> None:
    """Install a working mmcv: the installed one, one from the cache of earlier builds, or a new build."""
    parser = argparse.ArgumentParser(
        description=f'Install mmcv {VERSION} with compiled operators: from the cache of earlier builds, or compiled, '
        'which takes minutes. An interrupted build resumes.',
        epilog='example: MAX_JOBS=4 python scripts/build_mmcv.py. Other variables: MMCV_CACHE=0 ignores the cache '
        '(~/.cache/replk_mm), MMCV_CUDA=0 omits the CUDA operators.',
    )
    parser.add_argument('--build-dir', type=Path, default=ROOT / '.setup', help='folder for sources and object files')
    parser.add_argument('--rebuild', action='store_true', help='compile even if a working mmcv is installed or cached')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the compilers too
    # Importing OpenCV here tells its missing system libraries from a broken mmcv wheel.
    facts = subprocess.run(
        [sys.executable, '-c', 'import cv2, torch; print(torch.__version__, torch.version.cuda)'],
        capture_output=True,
        text=True,
    )
    if facts.returncode:
        sys.exit(
            f'error: mmcv needs torch and OpenCV: {facts.stderr.strip().splitlines()[-1]}\n'
            f'Install them first: {sys.executable} -m pip install torch opencv-python-headless'
        )
    torch, with_cuda = facts.stdout.split()
    cuda = with_cuda != 'None' and os.environ.get('MMCV_CUDA') != '0' and shutil.which('nvcc') is not None
    if with_cuda != 'None' and not cuda:
        print("mmcv's operators will be built for the CPU only: no CUDA toolkit (nvcc), or MMCV_CUDA=0", flush=True)
    libc = '-'.join(filter(None, platform.libc_ver())) or 'libc'
    key = '-'.join(
        (
            f'mmcv-{VERSION}',
            f'cp{sys.version_info.major}{sys.version_info.minor}',
            f'torch{torch}',
            'cuda' if cuda else 'cpu',
            sysconfig.get_platform(),
            libc,
        )
    )
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'replk_mm', 'wheels', key)
    use_cache = os.environ.get('MMCV_CACHE') != '0'
    folder = args.build_dir.resolve() / key
    if args.rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        if not check_operators(cuda):
            print(f'mmcv {VERSION}: the installed operators run')
            return
        for wheel in cache.glob('*.whl') if use_cache else ():
            if not install(wheel, cuda):
                print(f'mmcv {VERSION}: installed from {wheel}, the operators run')
                return
            print(f'the operators in {wheel} do not run: rebuilding', flush=True)
            wheel.unlink()
    wheel = compile_wheel(folder, cuda)
    failure = install(wheel, cuda)
    if failure:
        sys.exit(
            f'error: mmcv is compiled, but its operators do not run: {failure}\n'
            f'Remove {folder} to start again; its build.log shows how mmcv was built.'
        )
    if use_cache:
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f'{os.getpid()}.partial'
        shutil.copyfile(wheel, partial)
        partial.replace(cache / wheel.name)
    print(f'mmcv {VERSION}: compiled and installed, the operators run')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ninterrupted; run the same command to resume')
