"""The environment report and its probes."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement as PipRequirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from replk_mm import environment
from replk_mm.environment import (
    REQUIREMENTS,
    CheckResult,
    EnvironmentReport,
    Requirement,
    check_dependency,
    format_report,
    in_range,
)
from replk_mm.probes import run_probe

ROOT = Path(__file__).resolve().parents[1]


def pins(name: str) -> list[PipRequirement]:
    """The lines of a requirements file."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [PipRequirement(line) for line in lines if line and not line.startswith('#')]


# -- versions


@pytest.mark.parametrize('version', ['2.1.0', '2.0.1', '2.0.0', '2.2', '2.2.0', '2.10.3', '1.99', '2.13.0+cpu', '2'])
@pytest.mark.parametrize('specifier', ['>=2.0.1,<2.2', '>=2.1', '<2.2', '', '>=2,<2.13'])
def test_in_range_agrees_with_packaging(version, specifier):
    assert in_range(version, specifier) == SpecifierSet(specifier).contains(Version(version).public)


@pytest.mark.parametrize('name', ['build', 'runtime', 'dev', 'extras'])
def test_direct_dependencies_are_pinned_within_the_ranges(name):
    ranges = {requirement.name.lower(): requirement.range for requirement in REQUIREMENTS}
    for pin in pins(name):
        (specifier,) = pin.specifier
        assert specifier.operator == '==', f'{pin} is not exact'
        assert specifier.version in SpecifierSet(ranges.get(pin.name.lower(), '')), f'{pin} is outside the range'


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.13'])
def test_every_python_version_has_one_pin_of_each_package(python):
    names = [
        pin.name
        for name in ('build', 'runtime', 'dev', 'extras')
        for pin in pins(name)
        if pin.marker is None or pin.marker.evaluate({'python_version': python})
    ]
    assert len(names) == len(set(names))
    assert {'numpy', 'matplotlib', 'regex', 'setuptools', 'mmengine'} <= set(names)


def test_transitive_dependencies_have_an_upper_bound():
    assert all([s.operator for s in pin.specifier] == ['<'] for pin in pins('constraints'))


# -- the report


def test_missing_and_outdated_dependencies():
    missing = check_dependency(Requirement('no-such-thing', 'no_such_thing', '>=1'))
    assert (missing.status, missing.found, missing.required) == ('missing', '-', '>=1')
    outdated = check_dependency(Requirement('pytest', 'pytest', '>=99'))
    assert outdated.status == 'outside range' and outdated.found == pytest.__version__
    present = check_dependency(Requirement('other-distribution', 'pytest', '>=1'))
    assert present.status == 'ok' and present.found == f'{pytest.__version__} (pytest)'
    assert missing.fix and outdated.fix and not present.fix


@pytest.fixture(params=['.venv', '.venv-extras', 'elsewhere'])
def environment_at(request, monkeypatch, tmp_path):
    """Environments of `make setup`, and one of the user's own, which has no make command."""
    folder = request.param
    monkeypatch.setattr(environment.sys, 'prefix', str(tmp_path / folder if folder == 'elsewhere' else ROOT / folder))
    return {'.venv': '', '.venv-extras': ' VENV=.venv-extras', 'elsewhere': None}[folder]


def test_mmcv_and_mmcv_lite_together_are_a_conflict(monkeypatch, environment_at):
    """Both install the package mmcv: the later one overwrites files of the earlier one."""
    (mmcv,) = (requirement for requirement in REQUIREMENTS if requirement.name == 'mmcv')
    monkeypatch.setattr(environment, 'find_spec', lambda name: name)
    monkeypatch.setattr(environment.metadata, 'version', lambda name: '2.1.0')

    def check(*names: str) -> CheckResult:
        monkeypatch.setattr(environment.metadata, 'packages_distributions', lambda: {'mmcv': names})
        return check_dependency(mmcv)

    both = check('mmcv', 'mmcv-lite')
    assert both.status == 'conflict' and both.found == '2.1.0, 2.1.0 (mmcv-lite)'
    if environment_at is None:
        assert both.fix.index('uninstall -y mmcv mmcv-lite &&') < both.fix.index("install 'mmcv-lite>=")
    else:
        assert both.fix == f'make -C {ROOT} setup MMCV=lite{environment_at}'
    assert check('mmcv').status == 'ok'


@pytest.mark.parametrize(
    ('built_for', 'repair'),
    [('2.9.0', "pip install 'torch==2.13.0+cpu' torchvision"), ('2.13.0', 'pip uninstall -y torchvision')],
)
def test_torchvision_of_another_torch(built_for, repair, monkeypatch, environment_at):
    versions = {'torch': '2.13.0+cpu', 'torchvision': '0.28.0'}
    monkeypatch.setattr(environment.metadata, 'version', versions.__getitem__)
    monkeypatch.setattr(environment.metadata, 'requires', lambda name: ['numpy', f'torch=={built_for}'])
    broken = environment.check_torchvision(False)
    assert (broken.status, broken.found, broken.required) == ('no', '0.28.0', 'built for torch 2.13.0+cpu')
    assert broken.fix.endswith(repair if environment_at is None else f'make -C {ROOT} setup{environment_at}')
    assert environment.check_torchvision(True).status == 'ok' and not environment.check_torchvision(True).fix
    answer = {'ok': False, 'error': 'RuntimeError: operator torchvision::nms does not exist'}
    assert environment.check_ability('segmentation', answer, [broken], []).fix == broken.fix


def test_fix_of_a_task_is_that_of_its_first_broken_requirement():
    dependencies = [CheckResult('mmdet', 'missing', fix='get mmdet'), CheckResult('ftfy', 'missing', fix='get ftfy')]
    answer = {'ok': False, 'error': 'ModuleNotFoundError: ftfy'}
    assert environment.check_ability('segmentation', answer, dependencies, []).fix == 'get ftfy'
    assert environment.check_ability('detection', answer, dependencies, []).fix == 'get mmdet'
    assert environment.check_ability('detection', {'ok': True}, dependencies, []).status == 'ok'


def test_gpu_needs_torch_and_the_operators():
    device = {'name': 'cuda:0', 'model': 'Some GPU', 'memory_gib': 80.0}
    torch = {'ok': True, 'cuda': '13.0', 'devices': [device]}
    ops = {'ok': True, 'compiled': True, 'devices': {'cpu': 'ok', 'cuda:0': 'ok'}}
    works = environment.check_operators(ops, torch)
    fails = environment.check_operators({**ops, 'devices': {'cpu': 'ok', 'cuda:0': 'RuntimeError: no'}}, torch)
    assert [result.found for result in works] == ['compiled', 'compiled, Some GPU']
    assert environment.check_operators({**ops, 'compiled': False}, torch)[0].found == 'torch code'
    assert environment.check_gpu(torch, works) == CheckResult('gpu', 'ok', 'Some GPU (80 GiB)')
    assert environment.check_gpu(torch, fails).fix
    without = {'ok': True, 'version': '2.13.0+cpu', 'cuda': None, 'devices': []}
    assert 'CPU build' in environment.check_gpu(without, works[:1]).found


def test_text_report_is_aligned_and_ends_with_commands():
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
    dependencies = [
        CheckResult('a', 'ok', '1.0', '>=1'),
        CheckResult('much-longer', 'missing', '-', 'any', 'make setup'),
    ]
    report = EnvironmentReport(
        '3.11.7',
        '/bin/python',
        dependencies,
        [CheckResult('cpu', 'ok')],
        machine,
        [CheckResult('segmentation', 'ok'), CheckResult('detection', 'no', 'broken', fix='make setup')],
    )
    lines = format_report(report).splitlines()
    assert {line.index('ok') for line in lines if line.startswith('a ')} == {
        line.index('missing') for line in lines if line.startswith('much-longer')
    }
    assert 'memory        unknown free of 8.0 GiB' in lines
    assert lines[-1].split() == ['make', 'setup', 'much-longer,', 'detection']
    assert not report.healthy and json.loads(json.dumps(report.to_dict()))['healthy'] is False


@pytest.mark.slow
def test_doctor_needs_only_the_standard_library(tmp_path):
    """In an empty environment it reports missing dependencies with commands, status 1 and no traceback."""
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
    assert "pip install 'mmdet>=3.3,<4'" in fixes['mmdet'] and "pip install 'mmcv-lite>=2" in fixes['mmcv']
    assert fixes['segmentation'] and fixes['detection']


@pytest.mark.slow
def test_doctor_finds_this_environment_healthy():
    done = subprocess.run([sys.executable, ROOT / 'tools' / 'doctor.py', '--json'], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report['healthy'], report['abilities']
    assert report['operators'][0]['name'] == 'cpu' and report['operators'][0]['status'] == 'ok'
    assert report['machine']['usable_cpus'] >= 1 and report['machine']['torch_threads'] >= 1


@pytest.mark.slow
def test_failing_probes_are_results(tmp_path):
    """An unknown probe, a crash, an error and a process that hangs raise no exception."""

    def script(name: str, body: str) -> str:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\n{body}\n')
        path.chmod(0o755)
        return str(path)

    assert run_probe('nothing') == {'ok': False, 'error': "KeyError: 'nothing'"}
    assert 'killed by signal 11' in run_probe('torch', python=script('crash', 'kill -SEGV $$'))['error']
    assert 'status 3: gone' in run_probe('torch', python=script('fail', 'echo gone >&2; exit 3'))['error']
    assert 'no answer' in run_probe('torch', python=script('hang', 'exec sleep 30'), timeout=0.2)['error']
