"""The built wheel and sdist: their contents and metadata, the installed command, and configs inherited from them."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import replk_mm
from replk_mm.environment import REQUIREMENTS

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, '-m', 'pip')
pytestmark = pytest.mark.slow


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    """Run a command and capture its output."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)


def check_run(*command, **kwargs) -> str:
    """The output of a command that has to succeed."""
    done = run(*command, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A copy of the source tree to build in, since setuptools leaves files behind."""
    folder = tmp_path_factory.mktemp('packaging') / 'source'
    folder.mkdir()
    for name in ('replk_mm', 'configs', 'requirements'):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff'):
        shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source: Path, dist: Path) -> Path:
    check_run(*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', dist, source)
    return next(dist.glob('*.whl'))


@pytest.fixture(scope='module')
def wheel(source) -> Path:
    return build_wheel(source, source.parent / 'dist')


@pytest.fixture(scope='module')
def installed(wheel) -> Path:
    """A folder with the installed wheel, outside the source tree."""
    folder = wheel.parent.parent / 'installed'
    check_run(*PIP, 'install', '-q', '--no-deps', '--target', folder, wheel)
    return folder


def contents(wheel: Path) -> set[str]:
    """Names of the files in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if '.dist-info/' not in name}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return Parser().parsestr(archive.read(name).decode())


def run_installed(code: str, installed: Path, cwd: Path):
    """Run code that imports the installed wheel; return the JSON on the last line of its output."""
    environment = {**os.environ, 'PYTHONPATH': str(installed)}
    return json.loads(check_run(sys.executable, '-c', code, cwd=cwd, env=environment).splitlines()[-1])


def test_wheel_contains_every_tracked_source_and_config(wheel):
    tracked = check_run('git', 'ls-files', 'replk_mm', 'configs', cwd=ROOT).split()
    expected = {
        f'replk_mm/.mim/{name}' if name.startswith('configs/') else name
        for name in tracked
        if name != 'replk_mm/.mim/configs' and (ROOT / name).exists()
    }
    assert len(expected) > 150
    assert contents(wheel) == expected
    with zipfile.ZipFile(wheel) as archive:
        links = [entry.filename for entry in archive.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]
    assert not links


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    build = 'import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])'
    check_run(sys.executable, '-c', build, tmp_path, cwd=source)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        archive.extractall(tmp_path / 'unpacked', filter='data')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    assert {'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'requirements'} <= {
        p.name for p in unpacked.iterdir()
    }
    assert contents(build_wheel(unpacked, tmp_path / 'dist')) == contents(wheel)


def test_metadata(wheel):
    found = metadata(wheel)
    tree = ast.parse((ROOT / 'replk_mm' / '__init__.py').read_text())
    versions = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == '__version__'
    ]
    assert found['Version'] == ast.literal_eval(versions[0]) == replk_mm.__version__
    assert found['License-Expression'] == 'Apache-2.0' and found['License-File'] == 'LICENSE'
    assert found['Requires-Python'] == '>=3.10'
    assert found['Description-Content-Type'] == 'text/markdown'
    # A package index has no files of the repository. Everything else stands there as in the README.
    targets = re.findall(r'\]\(([^)]*)\)', found.get_payload())
    assert targets and all(target.startswith('https://') for target in targets)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert set(found.get_payload().split('\n\n')) >= {part for part in readme.split('\n\n') if '](' not in part}
    assert f'version: {found["Version"]}\n' in (ROOT / 'CITATION.cff').read_text()


def required(found: Message, *extras: str) -> dict[str, Requirement]:
    """The requirements of an installation with extras, by name."""
    requirements = map(Requirement, found.get_all('Requires-Dist'))
    environments = [{'extra': extra} for extra in ('', *extras)]
    return {r.name.lower(): r for r in requirements if not r.marker or any(map(r.marker.evaluate, environments))}


def test_dependencies_match_the_environment_report_and_exclude_torch_and_mmcv(wheel):
    found = metadata(wheel)
    dependencies = required(found, 'seg', 'det')
    known = {r.name.lower(): r for r in REQUIREMENTS}
    expected = {name for name, r in known.items() if r.needed_for != 'export'}
    assert dependencies.keys() == expected - {'torch', 'mmcv', 'opencv-python'}
    assert required(found, 'onnx').keys() - required(found).keys() == {
        name for name, r in known.items() if r.needed_for == 'export'
    }
    lite = required(found, 'lite')['mmcv-lite']
    assert set(lite.specifier) <= set(SpecifierSet(known['mmcv'].range))
    everything = required(found, 'all')
    assert set(everything.pop('replk_mm').extras) == {'seg', 'det', 'hub'} and everything.keys() < dependencies.keys()
    for name, dependency in dependencies.items():
        assert set(dependency.specifier) <= set(SpecifierSet(known[name].range)), f'{name}: ranges differ'
        assert (dependency.marker is None) == (known[name].needed_for == 'everything'), f'{name}: extras differ'


@pytest.mark.parametrize(
    'arguments, status',
    [
        ([], 2),
        (['--help'], 0),
        (['nonsense'], 2),
        (['make-demo-data', 'scenes', '--train', '1', '--val', '1'], 0),
        (['test', 'nowhere.py', 'nowhere.pth'], 2),
    ],
    ids=lambda value: (' '.join(value[:1]) or 'none') if isinstance(value, list) else str(value),
)
def test_exit_status_of_the_console_script(arguments, status, installed, tmp_path):
    script = installed / 'bin' / 'replk'
    done = run(script, *arguments, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(installed)})
    assert done.returncode == status, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr


def test_configs_of_an_installed_wheel_are_inherited_by_name(installed, tmp_path):
    (tmp_path / 'mine.py').write_text("_base_ = 'replk_mm::upernet_replk31b_ade20k.py'\nwork_dir = 'mine'\n")
    file, work_dir, backbone = run_installed(
        'import json, replk_mm\n'
        'from mmengine.config import Config\n'
        'replk_mm.register_configs()\n'
        'cfg = Config.fromfile("mine.py")\n'
        'print(json.dumps([replk_mm.__file__, cfg.work_dir, cfg.model.backbone.type]))',
        installed,
        tmp_path,
    )
    assert Path(file).is_relative_to(installed)
    assert (work_dir, backbone) == ('mine', 'replk_mm.RepLKNet')


def test_configs_of_an_editable_install_are_inherited_by_name(source, tmp_path):
    """mmengine alone would search site-packages, where an editable install has no package."""
    site = tmp_path / 'site'
    check_run(*PIP, 'install', '-q', '--no-deps', '--no-build-isolation', '--target', site, '-e', source)
    (tmp_path / 'mine.py').write_text("_base_ = 'replk_mm::upernet_replk31b_ade20k.py'\n")
    backbone = run_installed(
        f'import json, site; site.addsitedir({str(site)!r})\n'
        'import replk_mm\n'
        'from mmengine.config import Config\n'
        'replk_mm.register_configs()\n'
        'print(json.dumps(Config.fromfile("mine.py").model.backbone.type))',
        tmp_path / 'nothing',
        tmp_path,
    )
    assert backbone == 'replk_mm.RepLKNet'
