"""The compilation of mmcv by scripts/build_mmcv.py, with small stand-ins for its sources."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from replk_mm.environment import REQUIREMENTS

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location('build_mmcv', ROOT / 'scripts' / 'build_mmcv.py')
build_mmcv = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_mmcv)


def test_mmcv_to_build_is_in_range():
    (accepted,) = [requirement.range for requirement in REQUIREMENTS if requirement.name == 'mmcv']
    assert build_mmcv.VERSION in SpecifierSet(accepted)


@pytest.mark.parametrize(
    ('log', 'cause', 'remedy'),
    [
        (
            'c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.',
            'of memory',
            'MAX_JOBS=1',
        ),
        ('nms.cpp:1:10: fatal error: Python.h: No such file or directory\n', 'Python.h', 'python3-dev'),
        ("error: command 'g++' failed: No such file or directory", 'no C++ compiler', 'apt-get install g++'),
        (
            '/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed.',
            'no C++ compiler',
            'apt-get install g++',
        ),
        ("ModuleNotFoundError: No module named 'pkg_resources'", 'setuptools', 'setuptools<80'),
        ('OSError: [Errno 28] No space left on device', 'disk is full', 'Free about 1 GB'),
        ('nms_cuda.cu(12): error: identifier "x" is undefined', 'CUDA', 'MMCV_CUDA=0'),
        ('[1/3] c++ a.cpp\na.cpp:3: error: no such type\nb.cpp:1: error: later', 'a.cpp:3: error: no such type', 'log'),
        ('nothing at all', 'no cause', 'log'),
    ],
)
def test_cause_of_a_failed_build(log, cause, remedy):
    found = build_mmcv.find_cause(log)
    assert cause in found[0] and remedy in found[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder as an interrupted build leaves it: unpacked sources, whose setup.py runs the given code."""
    monkeypatch.setenv('CXX', 'sh')  # not asked to compile anything
    folder = tmp_path / 'build'
    (folder / 'source').mkdir(parents=True)

    def write(code: str) -> Path:
        (folder / 'source' / 'setup.py').write_text(code)
        return folder

    return write


@pytest.mark.slow
def test_compile_keeps_the_log_and_returns_the_wheel(project, monkeypatch):
    monkeypatch.setenv('MAX_JOBS', '3')
    folder = project("""
import os, pathlib, sys
print(f'[1/3] c++ {os.environ["CFLAGS"]} -j{os.environ["MAX_JOBS"]}', flush=True)
target = pathlib.Path(sys.argv[sys.argv.index('--dist-dir') + 1])
target.mkdir(exist_ok=True)
(target / 'mmcv-0-py3-none-any.whl').touch()
""")
    assert build_mmcv.compile_wheel(folder, cuda=False).name == 'mmcv-0-py3-none-any.whl'
    assert (folder / 'build.log').read_text().startswith('[1/3] c++ -g0 -j3')


@pytest.mark.slow
def test_failed_compile_reports_cause_remedy_and_log(project):
    folder = project("print('c++: fatal error: Killed signal terminated program cc1plus'); raise SystemExit(1)")
    with pytest.raises(SystemExit, match='out of memory') as caught:
        build_mmcv.compile_wheel(folder, cuda=False)
    assert 'MAX_JOBS=1' in str(caught.value) and str(folder / 'build.log') in str(caught.value)


def test_missing_compiler_is_reported_before_the_build(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('CXX', 'c++')
    with pytest.raises(SystemExit, match='no C\\+\\+ compiler\napt-get install g'):
        build_mmcv.compile_wheel(tmp_path / 'build', cuda=False)
    assert not (tmp_path / 'build').exists()


@pytest.mark.slow
def test_interruption_stops_the_compilers(project):
    folder = project(
        'import pathlib, subprocess\n'
        "compiler = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path('part').write_text(str(compiler.pid))\n"
        "pathlib.Path('part').rename('noted')\n"
        'compiler.wait()'
    )
    code = (
        'import pathlib, signal, sys; signal.signal(signal.SIGTERM, signal.default_int_handler)\n'
        f'sys.path.insert(0, {str(ROOT / "scripts")!r})\n'
        f'import build_mmcv; build_mmcv.compile_wheel(pathlib.Path({str(folder)!r}), False)'
    )
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    note = folder / 'source' / 'noted'
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    grandchild = int(note.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 10
    while Path(f'/proc/{grandchild}').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)


def test_jobs_follow_max_jobs_or_the_processors(monkeypatch):
    monkeypatch.setenv('MAX_JOBS', '7')
    assert build_mmcv.parallel_jobs() == 7
    monkeypatch.setenv('MAX_JOBS', 'many')
    assert 1 <= build_mmcv.parallel_jobs() <= os.cpu_count()


@pytest.mark.slow
def test_make_reports_a_missing_python():
    python = '/nowhere/python3'
    done = subprocess.run(['make', '-C', str(ROOT), 'setup', f'PYTHON={python}'], capture_output=True, text=True)
    assert done.returncode != 0 and f"no Python at '{python}'" in done.stdout + done.stderr
