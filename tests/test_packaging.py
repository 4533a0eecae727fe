"""The built wheel: what it holds, what it asks for, and that mmengine finds configs in it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement as PipRequirement
from packaging.specifiers import SpecifierSet

from replk_mm.environment import REQUIREMENTS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command, **kwargs) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
    """A copy of this tree to build in: setuptools leaves files behind."""
    folder = tmp_path_factory.mktemp('packaging')
    names = ('replk_mm', 'configs', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE')
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / 'tree' / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__')
            )
        else:
            (folder / 'tree').mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / 'tree' / name)
    return folder / 'tree'


@pytest.fixture(scope='module')
def wheel(tree) -> Path:
    """A wheel of the tree."""
    dist = tree.parent / 'dist'
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', dist, tree)
    return next(dist.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the installed wheel, far from this tree."""
    folder = tmp_path_factory.mktemp('installed')
    run(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder, wheel)
    return folder


def run_installed(code: str, installed: Path, tmp_path: Path) -> dict:
    """Run code that sees the installed wheel and not this tree; the answer is the JSON on its last line."""
    environment = {**os.environ, 'PYTHONPATH': str(installed)}
    return json.loads(run(sys.executable, '-c', code, cwd=tmp_path, env=environment).splitlines()[-1])


def test_wheel_holds_every_source_and_config(wheel):
    """Everything git would ship from the package and the configs is in the wheel as a file, and no more than that."""
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if '.dist-info/' not in entry.filename]
    held = {entry.filename for entry in entries}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / 'replk_mm').rglob('*')
        if path.is_file()
        and '.mim' not in path.parts
        and path.suffix in ('.py', '.yaml', '.yml', '.typed', '.css', '.js', '.j2')
    }
    sources.add('replk_mm/py.typed')
    configs = {
        f'replk_mm/.mim/{path.relative_to(ROOT)}'
        for path in (ROOT / 'configs').rglob('*')
        if path.suffix in ('.py', '.yaml')
    }
    assert len(configs) > 10
    assert held == sources | configs | {'replk_mm/.mim/model-index.yml'}
    links = [entry.filename for entry in entries if (entry.external_attr >> 16) & 0o170000 == 0o120000]
    assert not links


def test_metadata_never_touches_torch_or_mmcv(wheel):
    """Requirements are those of the environment report, without torch and mmcv."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        message = Parser().parsestr(archive.read(name).decode())
    asked = {asked.name.lower(): asked for asked in map(PipRequirement, message.get_all('Requires-Dist'))}
    assert not {'torch', 'mmcv'} & set(asked)
    assert set(message.get_all('Provides-Extra')) == {'seg', 'det'}
    always = {name for name, requirement in asked.items() if requirement.marker is None}
    assert always == {
        'jinja2',
        'matplotlib',
        'mmengine',
        'numpy',
        'psutil',
        'pydantic',
        'pyyaml',
        'rich',
        'safetensors',
        'setuptools',
    }
    known = {requirement.name.lower(): requirement for requirement in REQUIREMENTS}
    for name, requirement in asked.items():
        assert set(requirement.specifier) <= set(SpecifierSet(known[name].range)), f'{name} differs from the report'
    assert message['Version'] == re.search(r"__version__ = '(.+)'", (ROOT / 'replk_mm' / '__init__.py').read_text())[1]


def test_installed_configs_are_inherited_by_name(installed, tmp_path):
    """`_base_ = 'replk_mm::...'` in a stranger's config takes the installed file and everything it inherits."""
    (tmp_path / 'mine.py').write_text("_base_ = 'replk_mm::upernet_replk31b_ade20k.py'\nwork_dir = 'mine'\n")
    answer = run_installed(
        'import json, replk_mm\n'
        'from mmengine.config import Config\n'
        'replk_mm.register_configs()\n'
        'cfg = Config.fromfile("mine.py")\n'
        'print(json.dumps([replk_mm.__file__, cfg.work_dir, cfg.model.backbone.type, cfg.model.type]))',
        installed,
        tmp_path,
    )
    assert Path(answer[0]).is_relative_to(installed)
    assert answer[1:3] == ['mine', 'replk_mm.RepLKNet']


def test_editable_install_finds_its_configs_from_anywhere(tree, tmp_path):
    """With `pip install -e`, mmengine would look beside the metadata, in site-packages, where no package is."""
    site = tmp_path / 'site'
    pip_install = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation']
    run(*pip_install, '--target', site, '-e', tree)
    (tmp_path / 'mine.py').write_text("_base_ = 'replk_mm::upernet_replk31b_ade20k.py'\n")
    answer = run_installed(
        f'import json, site; site.addsitedir({str(site)!r})\n'
        'import replk_mm\n'
        'from mmengine.config import Config\n'
        'replk_mm.register_configs()\n'
        'print(json.dumps(Config.fromfile("mine.py").model.backbone.type))',
        tmp_path / 'nothing',
        tmp_path,
    )
    assert answer == 'replk_mm.RepLKNet'
