"""The environment report, its probes, and the building of mmcv with small stand-ins for its sources and wheels."""
import json
import os
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement as PipRequirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from replk_mm import environment
from replk_mm.environment import Finding, Report, check_dependency, format_report
from replk_mm.errors import UserError
from replk_mm.install import mmcv_wheel
from replk_mm.install.compiling import compile_wheel, find_cause, usable_jobs
from replk_mm.install.probes import run_probe
from replk_mm.install.requirements import REQUIREMENTS, Requirement, in_range

ROOT = Path(__file__).resolve().parents[1]


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
@pytest.mark.parametrize(('at_least', 'below'), [('2.0.1', '2.2'), ('2.1', ''), ('', '2.2'), ('', ''), ('2', '2.13')])
def test_in_range_agrees_with_packaging(version, at_least, below):
    text = ','.join(sign + bound for sign, bound in (('>=', at_least), ('<', below)) if bound)
    assert in_range(version, at_least, below) == SpecifierSet(text).contains(Version(version).public)


@pytest.mark.parametrize('name', ['build', 'runtime', 'dev'])
def test_direct_dependencies_are_pinned_within_the_ranges(name):
    ranges = {requirement.name.lower(): requirement.range for requirement in REQUIREMENTS}
    for pin in pins(name):
        (specifier,) = pin.specifier
        assert specifier.operator == '==', f'{pin} is not exact'
        assert specifier.version in SpecifierSet(ranges.get(pin.name.lower(), '')), f'{pin} is outside the range'


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.13'])
def test_every_python_gets_one_pin_of_each(python):
    names = [pin.name for name in ('build', 'runtime', 'dev') for pin in pins(name)
             if pin.marker is None or pin.marker.evaluate({'python_version': python})]
    assert len(names) == len(set(names))
    assert {'numpy', 'matplotlib', 'regex', 'setuptools', 'mmengine'} <= set(names)


def test_transitive_dependencies_have_an_upper_bound():
    assert all([s.operator for s in pin.specifier] == ['<'] for pin in pins('constraints'))


def test_mmcv_to_build_is_in_range():
    (accepted,) = [requirement.range for requirement in REQUIREMENTS if requirement.name == 'mmcv']
    assert mmcv_wheel.MMCV_VERSION in SpecifierSet(accepted)


# -- the report

def test_missing_and_outdated_dependencies_are_told_apart():
    missing = check_dependency(Requirement('no-such-thing', 'no_such_thing', '1'))
    assert (missing.status, missing.found, missing.required) == ('missing', '-', '>=1')
    outdated = check_dependency(Requirement('pytest', 'pytest', '99'))
    assert outdated.status == 'outside range' and outdated.found == pytest.__version__
    present = check_dependency(Requirement('nobody-calls-it-so', 'pytest', '1', instead=('pytest',)))
    assert present.status == 'ok' and present.found == pytest.__version__
    assert missing.fix and outdated.fix and not present.fix


def test_ability_names_the_fix_of_what_it_needs():
    dependencies = [Finding('mmdet', 'missing', fix='get mmdet'), Finding('ftfy', 'missing', fix='get ftfy')]
    answer = {'ok': False, 'error': 'ModuleNotFoundError: ftfy'}
    assert environment.check_ability('segmentation', answer, dependencies, []).fix == 'get ftfy'
    assert environment.check_ability('detection', answer, dependencies, []).fix == 'get mmdet'
    assert environment.check_ability('detection', {'ok': True}, dependencies, []).status == 'ok'


def test_gpu_is_judged_by_torch_and_by_the_operators():
    device = {'name': 'cuda:0', 'model': 'Some GPU', 'memory_gib': 80.}
    torch = {'ok': True, 'cuda': '13.0', 'devices': [device]}
    works = environment.check_operators({'ok': True, 'devices': {'cpu': 'ok', 'cuda:0': 'ok'}}, torch)
    fails = environment.check_operators({'ok': True, 'devices': {'cpu': 'ok', 'cuda:0': 'RuntimeError: no'}}, torch)
    assert environment.check_gpu(torch, works) == Finding('gpu', 'ok', 'Some GPU (80 GiB)')
    assert environment.check_gpu(torch, fails).fix.endswith('build_mmcv.py')
    without = {'ok': True, 'version': '2.13.0+cpu', 'cuda': None, 'devices': []}
    assert 'CPU build' in environment.check_gpu(without, works[:1]).found


def test_text_report_is_aligned_and_ends_in_commands():
    machine = {'system': 'Linux', 'logical_cpus': 4, 'usable_cpus': 2, 'torch_threads': None, 'torch_capability': None,
               'instruction_sets': ['avx2'], 'memory_gib': 8., 'memory_available_gib': None, 'disk_free_gib': 1.25,
               'disk_path': '/here'}
    dependencies = [Finding('a', 'ok', '1.0', '>=1'), Finding('much-longer', 'missing', '-', 'any', 'make setup')]
    report = Report('3.11.7', '/bin/python', dependencies, [Finding('cpu', 'ok')], machine,
                    [Finding('segmentation', 'ok'), Finding('detection', 'no', 'broken', fix='make setup')])
    lines = format_report(report).splitlines()
    assert {line.index('ok') for line in lines if line.startswith('a ')} == \
        {line.index('missing') for line in lines if line.startswith('much-longer')}
    assert 'memory        unknown free of 8.0 GiB' in lines
    assert lines[-1].split() == ['make', 'setup', 'much-longer,', 'detection']
    assert not report.healthy and json.loads(json.dumps(report.as_dict()))['healthy'] is False


def test_doctor_needs_the_standard_library_alone(tmp_path):
    """In an empty environment it reports what is missing and how to get it, with status 1 and no traceback."""
    venv.create(tmp_path / 'empty', with_pip=False)
    done = subprocess.run([tmp_path / 'empty' / 'bin' / 'python', ROOT / 'tools' / 'doctor.py', '--json'],
                          capture_output=True, text=True, env={'PATH': os.environ['PATH']})
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
    assert 'no answer' in run_probe('torch', python=str(executable('hang', 'exec sleep 30')), timeout=.2)['error']


# -- building mmcv

@pytest.mark.parametrize(('log', 'cause', 'remedy'), [
    ('c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.', 'of memory', 'MAX_JOBS=1'),
    ('nms.cpp:1:10: fatal error: Python.h: No such file or directory\n', 'Python.h', 'python3-dev'),
    ("error: command 'g++' failed: No such file or directory", 'no C++ compiler', 'apt-get install g++'),
    ('/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed.', 'no C++ compiler', 'apt-get install g++'),
    ("FileNotFoundError: [Errno 2] No such file or directory: 'x86_64-linux-gnu-g++'", 'no C++ compiler', 'g++'),
    ("RuntimeError: Ninja is required to load C++ extensions", 'ninja', 'pip install ninja'),
    ("ModuleNotFoundError: No module named 'pkg_resources'", 'setuptools', 'setuptools<80'),
    ('OSError: [Errno 28] No space left on device', 'disk is full', 'free'),
    ('nms_cuda.cu(12): error: identifier "x" is undefined', 'CUDA', 'MMCV_CUDA=0'),
    ('[1/3] c++ a.cpp\na.cpp:3: error: no such type\nb.cpp:1: error: later', 'a.cpp:3: error: no such type', 'log'),
    ('nothing at all', 'no cause', 'log'),
])
def test_cause_of_a_failed_build(log, cause, remedy):
    found = find_cause(log)
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


GOOD_SETUP = '''
import os, pathlib, sys
for n in (1, 2, 3):
    print(f'[{n}/3] c++ {os.environ["CFLAGS"]} -j{os.environ["MAX_JOBS"]}', flush=True)
target = pathlib.Path(sys.argv[sys.argv.index('--dist-dir') + 1])
target.mkdir(exist_ok=True)
(target / 'mmcv-0-py3-none-any.whl').touch()
'''


def test_compile_shows_progress_and_keeps_the_log(project, monkeypatch, capsys):
    monkeypatch.setenv('MAX_JOBS', '3')
    folder = project(GOOD_SETUP)
    build = folder / 'source' / 'build' / 'temp.linux'
    build.mkdir(parents=True)
    # Five rules, of which ninja still has three to do: two were there before.
    (build / 'build.ninja').write_text('rule c\n\n' + '\nbuild x: c y' * 5)
    (build / 'one.o').touch()
    assert compile_wheel('mmcv==0', folder, cuda=False).name == 'mmcv-0-py3-none-any.whl'
    shown = capsys.readouterr().out
    assert all(text in shown for text in ('resuming', '3/5 objects', '5/5 objects', str(folder / 'build.log')))
    assert (folder / 'build.log').read_text().startswith('[1/3] c++ -g0 -j3')


def test_failed_compile_names_cause_remedy_and_log(project):
    folder = project("print('c++: fatal error: Killed signal terminated program cc1plus'); raise SystemExit(1)")
    with pytest.raises(UserError, match='out of memory') as caught:
        compile_wheel('mmcv==0', folder, cuda=False)
    assert 'MAX_JOBS=1' in str(caught.value) and str(folder / 'build.log') in str(caught.value)


def test_missing_compiler_is_found_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('CXX', 'c++')
    with pytest.raises(UserError, match='no C\\+\\+ compiler: apt-get install g'):
        compile_wheel('mmcv==0', tmp_path / 'build', cuda=False)
    assert not (tmp_path / 'build').exists()


def test_interruption_ends_the_compilers_too(project, tmp_path):
    """After SIGTERM nothing of the build is left running, and the next build need not wait for its lock."""
    folder = project("import pathlib, subprocess\n"
                     "compiler = subprocess.Popen(['sleep', '60'])\n"
                     "pathlib.Path('part').write_text(str(compiler.pid))\n"
                     "pathlib.Path('part').rename('noted')\n"
                     "compiler.wait()")
    code = ('import pathlib, signal; signal.signal(signal.SIGTERM, signal.default_int_handler)\n'
            'from replk_mm.install.compiling import compile_wheel\n'
            f'compile_wheel("mmcv==0", pathlib.Path({str(folder)!r}), False)')
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    note = folder / 'source' / 'noted'
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(.05)
    grandchild = int(note.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)
    project(GOOD_SETUP)
    compile_wheel('mmcv==0', folder, cuda=False)


def test_jobs_follow_max_jobs_or_the_processors(monkeypatch):
    monkeypatch.setenv('MAX_JOBS', '7')
    assert usable_jobs() == 7
    monkeypatch.setenv('MAX_JOBS', 'many')
    assert 1 <= usable_jobs() <= os.cpu_count()


def test_cuda_operators_need_a_toolkit_of_the_same_release(executable, monkeypatch):
    assert mmcv_wheel.choose_cuda(None) == (False, '')
    executable('nvcc', 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    assert mmcv_wheel.choose_cuda('13.0')[0]
    wanted, remark = mmcv_wheel.choose_cuda('12.8')
    assert not wanted and 'CPU only' in remark and '13' in remark
    monkeypatch.setenv('MMCV_CUDA', '0')
    assert not mmcv_wheel.choose_cuda('13.0')[0]


def test_cache_is_separate_for_what_changes_the_binary(monkeypatch, tmp_path):
    versions = ('2.13.0+cpu', '2.13.0', '2.5.1')
    keys = {mmcv_wheel.build_key(version, cuda) for version in versions for cuda in (True, False)}
    assert len(keys) == 6 and all(f'cp{sys.version_info.major}{sys.version_info.minor}' in key for key in keys)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert mmcv_wheel.cache_dir() == tmp_path / 'replk_mm' / 'wheels'
    monkeypatch.setenv('MMCV_CACHE', '0')
    assert mmcv_wheel.cache_dir() is None


@pytest.mark.slow
def test_cached_wheel_is_used_if_it_works_and_thrown_away_if_not(tmp_path):
    """With stand-ins for mmcv in an environment that sees this one's torch and OpenCV."""
    venv.create(tmp_path / 'env', with_pip=True)
    python = tmp_path / 'env' / 'bin' / 'python'
    site = next((tmp_path / 'env' / 'lib').glob('python*')) / 'site-packages'
    import torch
    ours = tmp_path / 'ours'
    ours.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith(('mmcv', '_', 'pip', 'replk')):
            (ours / path.name).symlink_to(path)
    (site / 'ours.pth').write_text(str(ours))
    key = mmcv_wheel.build_key(torch.__version__, False)
    cached = tmp_path / 'cache' / 'replk_mm' / 'wheels' / key / f'mmcv-{mmcv_wheel.MMCV_VERSION}-py3-none-any.whl'
    cached.parent.mkdir(parents=True)

    def install(kept: str) -> subprocess.CompletedProcess:
        info = f'mmcv-{mmcv_wheel.MMCV_VERSION}.dist-info'
        metadata = f'Metadata-Version: 2.1\nName: mmcv\nVersion: {mmcv_wheel.MMCV_VERSION}\n'
        with zipfile.ZipFile(cached, 'w') as archive:
            archive.writestr('mmcv/__init__.py', '')
            archive.writestr('mmcv/ops.py', f'import torch\ndef nms(*a, **k): return None, torch.tensor({kept})\n')
            archive.writestr(f'{info}/METADATA', metadata)
            archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            archive.writestr(f'{info}/RECORD', '')
        # Where it would go on to compile, it finds no compiler.
        settings = {'PATH': '/nowhere', 'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'MMCV_CUDA': '0'}
        return subprocess.run([python, ROOT / 'tools' / 'build_mmcv.py', '--build-dir', tmp_path / 'build'],
                              capture_output=True, text=True, env=settings)

    bad = install('[0, 1, 2]')
    assert bad.returncode == 2 and 'do not run' in bad.stdout and 'no C++ compiler' in bad.stderr
    assert not cached.exists() and not (site / 'mmcv').exists()
    good = install('[0, 2]')
    assert good.returncode == 0 and f'installed from {cached}' in good.stdout, good.stdout + good.stderr
    cached.unlink()
    again = install('[0, 1, 2]')
    assert again.returncode == 0 and 'is installed' in again.stdout and cached.exists()


@pytest.mark.parametrize('python', ['/nowhere/python3', 'no-such-python'])
def test_make_says_which_python_it_did_not_find(python):
    done = subprocess.run(['make', '-C', str(ROOT), 'setup', f'PYTHON={python}'], capture_output=True, text=True)
    assert done.returncode != 0 and f"no Python at '{python}'" in done.stdout + done.stderr
