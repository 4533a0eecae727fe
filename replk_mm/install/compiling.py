"""Compile mmcv's sources: resumable, with a visible progress, and a cause instead of a log when it fails."""
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import TextIO

from replk_mm.errors import UserError

#: Processor seconds of a whole CPU build without debug symbols: 8 min 22 s on 2 cores.
BUILD_SECONDS = 1000
#: Memory that one compiler process may take, in GiB.
GIB_PER_JOB = 2

#: What a log says, what that means, and what to do. The first match wins.
CAUSES = (
    (r'Killed signal terminated program|internal compiler error: Killed|fatal error: Killed|virtual memory exhausted'
     r'|Cannot allocate memory|std::bad_alloc',
     'the compiler ran out of memory', 'compile one file at a time, from where it stopped: MAX_JOBS=1 make setup'),
    (r'No space left on device', 'the disk is full', 'free about 1 GB and run the same command again'),
    (r'Python\.h: No such file|\'Python\.h\' file not found', "Python's header files are missing (Python.h)",
     'apt-get install python3-dev (Fedora: dnf install python3-devel)'),
    (r"(g\+\+|gcc|c\+\+|clang\+\+|cc)'?:? (command )?not found"
     r"|No such file or directory: '[^']*(g\+\+|gcc|c\+\+|cc|clang)'"
     r"|command '[^']*(g\+\+|gcc|c\+\+|cc|clang)' failed: (No such file|\[Errno 2\])",
     'there is no C++ compiler', 'apt-get install g++ (Fedora: dnf install gcc-c++; macOS: xcode-select --install)'),
    (r"No such file or directory: '[^']*ninja'|ninja: (command )?not found|Ninja is required",
     'ninja is missing', f'install it beside torch: {sys.executable} -m pip install ninja'),
    (r"No module named 'pkg_resources'", 'setuptools is missing or too new: pkg_resources is not there',
     f"{sys.executable} -m pip install 'setuptools<80'"),
    (r'unrecognized command[- ]line option .-std=|You need C\+\+(17|20)',
     'the C++ compiler is too old', 'install g++ 9 or newer and name it: CXX=g++-12 CC=gcc-12 make setup'),
    (r'\.cuh?[(:].*error|nvcc (fatal|error)|CUDA_HOME environment variable is not set|The detected CUDA version',
     'the CUDA operators do not compile with this CUDA toolkit', 'leave them out: MMCV_CUDA=0 make setup'),
)


def find_cause(log: str) -> tuple[str, str]:
    """What a failed build's log blames, and the remedy; without a known sign the first error line."""
    for pattern, cause, remedy in CAUSES:
        if re.search(pattern, log):
            return cause, remedy
    first = re.search(r'^.*\berror:.*$', log, re.MULTILINE | re.IGNORECASE)
    return (first.group(0).strip() if first else 'the log names no cause'), 'read the log'


def usable_jobs() -> int:
    """Compiler processes to run at once: ``MAX_JOBS``, or as many as processors and memory allow."""
    asked = os.environ.get('MAX_JOBS', '')
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        available = re.search(r'MemAvailable:\s+(\d+) kB', Path('/proc/meminfo').read_text())
    except OSError:
        available = None
    return max(1, min(cpus, int(available.group(1)) // (GIB_PER_JOB * 2**20))) if available else cpus


def compile_wheel(project: str, folder: Path, cuda: bool) -> Path:
    """Compile ``project`` (such as ``mmcv==2.1.0``) in ``folder`` and return its wheel.

    Sources and objects stay in ``folder``, so that an interrupted build goes on where it stopped; the compiler's
    output goes to ``folder/build.log``.

    Raises:
        UserError: If a tool is missing, the sources cannot be fetched, or the build fails.
    """
    _require_tools()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('w') as lock:
        # The build inherits the lock: where this process was killed, its compilers may go on for a while.
        _lock(lock, folder)
        source = _fetch(project, folder)
        environment = _environment(cuda)
        jobs = int(environment['MAX_JOBS'])
        resumed = any(source.glob('build/temp*/**/*.o'))
        print(f'compiling {project}: {"resuming, " if resumed else ""}a whole build takes about '
              f'{BUILD_SECONDS / jobs / 60:.0f} minutes with {jobs} processes{", longer with CUDA" if cuda else ""}; '
              f'log: {folder / "build.log"}', flush=True)
        command = [sys.executable, 'setup.py', 'bdist_wheel', '--dist-dir', str(folder / 'wheel')]
        # Not `pip wheel`: when a build fails, pip removes all that was compiled.
        _run_with_progress(command, source, environment, folder / 'build.log', lock.fileno())
    return next((folder / 'wheel').glob('*.whl'))


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f'another build is running in {folder}: waiting for it', flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def _require_tools() -> None:
    """Find out in a second what the compilation would find out in minutes."""
    compiler = os.environ.get('CXX', 'c++').split()[0]
    missing = [] if shutil.which(compiler) or shutil.which('g++') else [f"{compiler}: command not found"]
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        missing.append('Python.h: No such file')
    if missing:
        raise UserError('mmcv cannot be compiled:\n' + '\n'.join('{}: {}'.format(*find_cause(m)) for m in missing))


def _fetch(project: str, folder: Path) -> Path:
    """The unpacked sources. Unpacked once only: new time stamps would make every object look outdated."""
    source = folder / 'source'
    if source.is_dir():
        return source
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:', '--no-build-isolation',
               '-d', str(folder / 'download'), project]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list((folder / 'download').glob('*.tar.gz'))
    if done.returncode or not archives:
        cause, remedy = find_cause(done.stdout + done.stderr)
        raise UserError(f'pip could not fetch the sources of {project}: {cause}\n{done.stderr.strip()[-1500:]}\n'
                        f'{remedy}; is there a network connection, and does pip know your mirror (PIP_INDEX_URL)?')
    unpacked = folder / 'unpacked'
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archives[0]) as archive:
        if hasattr(tarfile, 'data_filter'):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(unpacked)
    next(unpacked.iterdir()).rename(source)
    return source


def _environment(cuda: bool) -> dict[str, str]:
    """The variables that mmcv's setup.py and torch's build extension read."""
    environment = {
        **os.environ, 'MMCV_WITH_OPS': '1', 'MAX_JOBS': str(usable_jobs()), 'FORCE_CUDA': '1' if cuda else '0',
        # Debug symbols double the time and make the wheel twenty times as large.
        'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0'.strip(),
        # ninja is called by name, and lies beside a Python that may not be activated.
        'PATH': os.pathsep.join((str(Path(sys.executable).parent), os.environ.get('PATH', ''))),
    }
    if not cuda:  # where torch sees a GPU, setup.py would insist on a CUDA toolkit
        environment['CUDA_VISIBLE_DEVICES'] = ''
    return environment


def _run_with_progress(command: list[str], source: Path, environment: dict[str, str], log_path: Path,
                       lock: int) -> None:
    """Run a ninja build, its output in ``log_path``, its progress on one line of the terminal."""
    start = shown = time.monotonic()
    with log_path.open('w', encoding='utf-8') as log:
        # A group of its own, so that an interruption reaches setup.py, ninja and the compilers alike, from here.
        process = subprocess.Popen(command, cwd=source, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
                                   pass_fds=(lock,), start_new_session=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                count = re.match(r'\[(\d+)/(\d+)\]', line)
                if count is None:
                    continue
                done, todo, now = int(count.group(1)), int(count.group(2)), time.monotonic()
                if sys.stdout.isatty() or now - shown > 30 or done in (1, todo):
                    shown = now
                    status_line = _status(source, done, todo, now - start, int(environment['MAX_JOBS']))
                    print(status_line, end='\r' if sys.stdout.isatty() else '\n', flush=True)
            status = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)  # ninja then removes what is half written
            process.stdout.read()  # until the last of them is gone
            process.wait()
            raise
    if sys.stdout.isatty():
        print()
    if status:
        cause, remedy = find_cause(log_path.read_text(encoding='utf-8'))
        raise UserError(f'mmcv does not compile: {cause}\n{remedy}\nthe whole log: {log_path}')


def _status(source: Path, done: int, todo: int, elapsed: float, jobs: int) -> str:
    """The progress line. ninja counts what is left to do, so what was there before is added."""
    objects = sum(path.read_text().count('\nbuild ') for path in source.glob('build/temp*/build.ninja'))
    before = max(0, objects - todo)
    # The usual pace counts like ten objects, because the first ones say little.
    pace = (elapsed + 10 * BUILD_SECONDS / jobs / max(objects, 1)) / (done + 10)
    rest = pace * (todo - done)
    return (f'  {before + done}/{before + todo} objects, {elapsed // 60:.0f}:{elapsed % 60:02.0f} elapsed, '
            f'about {rest // 60:.0f}:{rest % 60:02.0f} left    ')
