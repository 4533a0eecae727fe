"""The environment report, its probes, and the compilation of mmcv with small stand-ins for its sources."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement as PipRequirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from replk_mm import environment
from replk_mm.environment import (
    REQUIREMENTS,
    Finding,
    Report,
    Requirement,
    check_dependency,
    format_report,
    in_range,
    run_probe,
)

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location('build_mmcv', ROOT / 'scripts' / 'build_mmcv.py')
build_mmcv = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_mmcv)


def pins(name: str) -> list[PipRequirement]:
    """The lines of a requirements file."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [PipRequirement(line) for line in lines if line and not line.startswith('#')]


@pytest.fixture
def executable(tmp_path, monkeypatch):
    """Write a shell script that is found first on the PATH."""

    def write(name: str, body: str) -> Path:
        path = tmp_path / 'bin' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\n{body}\n')
        path.chmod(0o755)
        monkeypatch.setenv('PATH', f'{path.parent}{os.pathsep}{os.environ["PATH"]}')
        return path

    return write


# -- versions


@pytest.mark.parametrize('version', ['2.1.0', '2.0.1', '2.0.0', '2.2', '2.2.0', '2.10.3', '1.99', '2.13.0+cpu', '2'])
@pytest.mark.parametrize('specifier', ['>=2.0.1,<2.2', '>=2.1', '<2.2', '', '>=2,<2.13'])
def test_in_range_agrees_with_packaging(version, specifier):
    assert in_range(version, specifier) == SpecifierSet(specifier).contains(Version(version).public)


@pytest.mark.parametrize('name', ['build', 'runtime', 'dev'])
def test_direct_dependencies_are_pinned_within_the_ranges(name):
    ranges = {requirement.name.lower(): requirement.range for requirement in REQUIREMENTS}
    for pin in pins(name):
        (specifier,) = pin.specifier
        assert specifier.operator == '==', f'{pin} is not exact'
        assert specifier.version in SpecifierSet(ranges.get(pin.name.lower(), '')), f'{pin} is outside the range'


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.13'])
def test_every_python_gets_one_pin_of_each(python):
    names = [
        pin.name
        for name in ('build', 'runtime', 'dev')
        for pin in pins(name)
        if pin.marker is None or pin.marker.evaluate({'python_version': python})
    ]
    assert len(names) == len(set(names))
    assert {'numpy', 'matplotlib', 'regex', 'setuptools', 'mmengine'} <= set(names)


def test_transitive_dependencies_have_an_upper_bound():
    assert all([s.operator for s in pin.specifier] == ['<'] for pin in pins('constraints'))


def test_mmcv_to_build_is_in_range():
    (accepted,) = [requirement.range for requirement in REQUIREMENTS if requirement.name == 'mmcv']
    assert build_mmcv.VERSION in SpecifierSet(accepted)


# -- the report


def test_missing_and_outdated_dependencies():
    missing = check_dependency(Requirement('no-such-thing', 'no_such_thing', '>=1'))
    assert (missing.status, missing.found, missing.required) == ('missing', '-', '>=1')
    outdated = check_dependency(Requirement('pytest', 'pytest', '>=99'))
    assert outdated.status == 'outside range' and outdated.found == pytest.__version__
    present = check_dependency(Requirement('other-distribution', 'pytest', '>=1'))
    assert present.status == 'ok' and present.found == pytest.__version__
    assert missing.fix and outdated.fix and not present.fix


def test_ability_names_the_fix_of_what_it_needs():
    dependencies = [Finding('mmdet', 'missing', fix='get mmdet'), Finding('ftfy', 'missing', fix='get ftfy')]
    answer = {'ok': False, 'error': 'ModuleNotFoundError: ftfy'}
    assert environment.check_ability('segmentation', answer, dependencies, []).fix == 'get ftfy'
    assert environment.check_ability('detection', answer, dependencies, []).fix == 'get mmdet'
    assert environment.check_ability('detection', {'ok': True}, dependencies, []).status == 'ok'


def test_gpu_is_judged_by_torch_and_by_the_operators():
    device = {'name': 'cuda:0', 'model': 'Some GPU', 'memory_gib': 80.0}
    torch = {'ok': True, 'cuda': '13.0', 'devices': [device]}
    works = environment.check_operators({'ok': True, 'devices': {'cpu': 'ok', 'cuda:0': 'ok'}}, torch)
    fails = environment.check_operators({'ok': True, 'devices': {'cpu': 'ok', 'cuda:0': 'RuntimeError: no'}}, torch)
    assert environment.check_gpu(torch, works) == Finding('gpu', 'ok', 'Some GPU (80 GiB)')
    assert environment.check_gpu(torch, fails).fix.endswith('build_mmcv.py')
    without = {'ok': True, 'version': '2.13.0+cpu', 'cuda': None, 'devices': []}
    assert 'CPU build' in environment.check_gpu(without, works[:1]).found


def test_text_report_is_aligned_and_ends_in_commands():
    machine = {
        'system': 'Linux',
        'logical_cpus': 4,
        'usable_cpus': 2,
        'torch_threads': None,
        'torch_capability': None,
        'instruction_sets': ['avx2'],
        'memory_gib': 8.0,
        'memory_available_gib': None,
        'disk_free_gib': 1.25,
        'disk_path': '/here',
    }
    dependencies = [Finding('a', 'ok', '1.0', '>=1'), Finding('much-longer', 'missing', '-', 'any', 'make setup')]
    report = Report(
        '3.11.7',
        '/bin/python',
        dependencies,
        [Finding('cpu', 'ok')],
        machine,
        [Finding('segmentation', 'ok'), Finding('detection', 'no', 'broken', fix='make setup')],
    )
    lines = format_report(report).splitlines()
    assert {line.index('ok') for line in lines if line.startswith('a ')} == {
        line.index('missing') for line in lines if line.startswith('much-longer')
    }
    assert 'memory        unknown free of 8.0 GiB' in lines
    assert lines[-1].split() == ['make', 'setup', 'much-longer,', 'detection']
    assert not report.healthy and json.loads(json.dumps(report.as_dict()))['healthy'] is False


def test_doctor_needs_the_standard_library_alone(tmp_path):
    """In an empty environment it reports what is missing and how to get it, with status 1 and no traceback."""
    venv.create(tmp_path / 'empty', with_pip=False)
    done = subprocess.run(
        [tmp_path / 'empty' / 'bin' / 'python', ROOT / 'tools' / 'doctor.py', '--json'],
        capture_output=True,
        text=True,
        env={'PATH': os.environ['PATH']},
    )
    assert done.returncode == 1 and done.stderr == ''
    report = json.loads(done.stdout)
    status = {finding['name']: finding['status'] for finding in report['dependencies']}
    assert {status[name] for name in ('torch', 'mmengine', 'mmcv', 'mmsegmentation', 'mmdet')} == {'missing'}
    fixes = {finding['name']: finding['fix'] for finding in report['dependencies'] + report['abilities']}
    assert "pip install 'mmdet>=3.3,<4'" in fixes['mmdet'] and fixes['mmcv'].endswith('build_mmcv.py')
    assert fixes['segmentation'] and fixes['detection']


@pytest.mark.slow
def test_doctor_finds_this_environment_healthy():
    done = subprocess.run([sys.executable, ROOT / 'tools' / 'doctor.py', '--json'], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report['healthy'], report['abilities']
    assert report['operators'][0]['name'] == 'cpu' and report['operators'][0]['status'] == 'ok'
    assert report['machine']['usable_cpus'] >= 1 and report['machine']['torch_threads'] >= 1


def test_probes_survive_what_they_probe(executable):
    """An unknown probe, a crash and a process that hangs are answers, not exceptions."""
    assert run_probe('nothing') == {'ok': False, 'error': "KeyError: 'nothing'"}
    assert 'killed by signal 11' in run_probe('torch', python=str(executable('crash', 'kill -SEGV $$')))['error']
    assert 'status 3: gone' in run_probe('torch', python=str(executable('fail', 'echo gone >&2; exit 3')))['error']
    assert 'no answer' in run_probe('torch', python=str(executable('hang', 'exec sleep 30')), timeout=0.2)['error']


# -- compiling mmcv


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


def test_failed_compile_names_cause_remedy_and_log(project):
    folder = project("print('c++: fatal error: Killed signal terminated program cc1plus'); raise SystemExit(1)")
    with pytest.raises(SystemExit, match='out of memory') as caught:
        build_mmcv.compile_wheel(folder, cuda=False)
    assert 'MAX_JOBS=1' in str(caught.value) and str(folder / 'build.log') in str(caught.value)


def test_missing_compiler_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('CXX', 'c++')
    with pytest.raises(SystemExit, match='no C\\+\\+ compiler\napt-get install g'):
        build_mmcv.compile_wheel(tmp_path / 'build', cuda=False)
    assert not (tmp_path / 'build').exists()


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


def test_make_says_which_python_it_did_not_find():
    python = '/nowhere/python3'
    done = subprocess.run(['make', '-C', str(ROOT), 'setup', f'PYTHON={python}'], capture_output=True, text=True)
    assert done.returncode != 0 and f"no Python at '{python}'" in done.stdout + done.stderr
