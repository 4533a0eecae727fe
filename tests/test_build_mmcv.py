"""The compilation of mmcv by scripts/build_mmcv.py, with a stand-in for pip."""

import importlib.util
import os
import sys
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


@pytest.fixture
def compile_with(tmp_path, monkeypatch):
    """Compile with a program instead of pip."""
    monkeypatch.setenv('CXX', 'sh')  # not asked to compile anything

    def compile_wheel(program: str) -> Path:
        (tmp_path / 'pip.py').write_text(program)
        monkeypatch.setattr(build_mmcv, 'PIP', (sys.executable, str(tmp_path / 'pip.py')))
        return build_mmcv.compile_wheel(tmp_path / 'wheels', 'cpu', tmp_path / 'logs' / 'build.log')

    return compile_wheel


@pytest.mark.slow
def test_compile_keeps_the_log_and_returns_the_wheel(compile_with, monkeypatch, tmp_path):
    monkeypatch.setenv('MAX_JOBS', '3')
    wheel = compile_with("""
import os, pathlib, sys
print(f'  [1/3] c++ {os.environ["CFLAGS"]} -j{os.environ["MAX_JOBS"]}', flush=True)
target = pathlib.Path(sys.argv[sys.argv.index('-w') + 1])
target.mkdir(exist_ok=True)
(target / 'mmcv-0-py3-none-any.whl').touch()
""")
    assert wheel == tmp_path / 'wheels' / 'mmcv-0-py3-none-any.whl'
    assert (tmp_path / 'logs' / 'build.log').read_text().startswith('  [1/3] c++ -g0 -j3')


@pytest.mark.slow
@pytest.mark.parametrize(
    'line',
    [
        'c++: fatal error: Killed signal terminated program cc1plus',
        "error: command 'g++' failed: No such file or directory",
        "ModuleNotFoundError: No module named 'pkg_resources'",
        'OSError: [Errno 28] No space left on device',
        'nms_cuda.cu(12): error: identifier "x" is undefined',
    ],
)
def test_failed_compile_reports_the_first_error_remedies_and_log(line, compile_with, tmp_path):
    with pytest.raises(SystemExit) as caught:
        compile_with(
            f'print("[1/3] c++ error_handler.cpp"); print({line!r}); print("b: error: later"); raise SystemExit(1)'
        )
    first, remedy, log = str(caught.value).splitlines()
    assert first.endswith(line) and 'MAX_JOBS=1' in remedy and str(tmp_path / 'logs' / 'build.log') in log


def test_missing_compiler_is_reported_before_the_build(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('CXX', 'c++')
    with pytest.raises(SystemExit, match='C\\+\\+ compiler .apt-get install g.*\n.*MMCV=lite'):
        build_mmcv.compile_wheel(tmp_path / 'wheels', 'cpu', tmp_path / 'build.log')
    assert not (tmp_path / 'build.log').exists()


def test_jobs_follow_max_jobs_or_the_processors(monkeypatch):
    monkeypatch.setenv('MAX_JOBS', '7')
    assert build_mmcv.parallel_jobs() == 7
    monkeypatch.setenv('MAX_JOBS', 'many')
    assert 1 <= build_mmcv.parallel_jobs() <= os.cpu_count()
