"""The environment that scripts/setup_env.py creates, with stand-ins for pip and the environment."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'scripts' / 'setup_env.py')
setup_env = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup_env)
READY = {'torch': '2.13.0+cpu', 'opencv-python': '5.0', 'mmcv-lite': '2.1.0'}


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """Run the script on an environment with the given distributions; returns pip's arguments of each call.

    Arguments:
        installed: Version of each installed distribution.
        broken: Modules whose import fails.
        argv: Arguments of the script.
        ready: Whether an earlier run has finished.
    """
    folder = tmp_path / '.venv'
    folder.mkdir()
    monkeypatch.setattr(setup_env, 'LOG', tmp_path / 'log' / 'pip.log')
    monkeypatch.setattr(setup_env, 'output_of', lambda *command: '3.11.0')

    def run(installed: dict, *argv: str, broken: tuple = (), ready: dict | None = None) -> list[str]:
        calls = []
        here = {**installed}
        if ready is not None:
            (folder / 'setup.json').write_text(json.dumps({'installed': installed, **ready}))

        def pip(self, *arguments, **kwargs):
            calls.append(' '.join(map(str, arguments)))
            if arguments[0] == 'uninstall':
                for name in arguments[2:]:
                    here.pop(name, None)
            here.update({name: READY[name] for name in READY if any(str(a).startswith(name) for a in arguments)})

        monkeypatch.setattr(setup_env.Environment, 'installed', lambda self: {**here})
        monkeypatch.setattr(setup_env.Environment, 'import_error', lambda self, name: 'no' if name in broken else '')
        monkeypatch.setattr(setup_env.Environment, 'pip', pip)
        built = subprocess.CompletedProcess([], 0)
        monkeypatch.setattr(setup_env.subprocess, 'run', lambda command, **kwargs: calls.append('build') or built)
        monkeypatch.setattr(sys, 'argv', ['setup_env.py', '--venv', str(folder), *argv])
        setup_env.main()
        return calls

    return run


def test_extras_are_those_of_the_metadata():
    tomllib = pytest.importorskip('tomllib')
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    assert {*setup_env.known_extras(), 'lite'} == extras.keys()


def test_mmcv_lite_is_the_default_and_nothing_is_compiled(set_up):
    first, package = set_up({})
    assert ' torch==' in first and 'mmcv-lite==2.1.0' in first
    assert package.endswith(f'-e {ROOT}') and 'torch==2.13.0+cpu' in package


@pytest.mark.parametrize(
    ('installed', 'argv', 'removed', 'lite'),
    [
        ('mmcv', [], False, False),  # a compiled mmcv stays
        ('mmcv', ['--mmcv', 'lite'], True, True),
        ('mmcv-lite', ['--mmcv', 'compiled'], True, False),
        ('mmcv-lite', ['--mmcv', 'lite'], False, True),
    ],
)
def test_mmcv_and_mmcv_lite_are_never_installed_together(installed, argv, removed, lite, set_up):
    calls = set_up({'torch': '2.13.0', 'opencv-python': '5.0', installed: '2.1.0'}, *argv)
    assert ('uninstall -y mmcv mmcv-lite' in calls) is removed
    assert any('mmcv-lite==' in call for call in calls) is lite
    assert ('build' in calls) is not lite


def test_extras_keep_the_installed_torch_and_add_up(set_up):
    calls = set_up(READY, '--extras', 'timm,onnx', '--torch', 'torch>=2 --extra-index-url X', ready={'extras': 'hub'})
    assert 'torch>=2 --extra-index-url X torch==2.13.0+cpu ' in calls[-1] and calls[-1].endswith('[hub,onnx,timm]')
    assert '-crequirements/extras.txt' in calls[-1]


@pytest.mark.parametrize(
    ('change', 'again'),
    [
        ({}, False),
        ({'pytest-cov': '7.0'}, False),  # the user's own packages
        ({'torch': '2.14.0'}, True),
        ({'torchvision': '0.29'}, True),
        ({'mmcv': '2.1.0'}, True),
    ],
)
def test_packages_that_break_others_are_noticed(change, again, set_up, monkeypatch, capsys):
    monkeypatch.setattr(setup_env.Environment, 'fingerprint', lambda *args: 'f')
    ready = {'fingerprint': 'f', 'installed': READY}
    assert bool(set_up({**READY, **change}, '--mmcv', 'lite', ready=ready)) is again
    assert ('is ready (' in capsys.readouterr().out) is not again


def test_a_failed_run_keeps_the_earlier_choices(set_up, tmp_path):
    """It must not exchange torch the next time, nor ask for the extra that failed."""
    ready = {'torch': 'torch==2.9.1', 'extras': 'onnx'}
    with pytest.raises(SystemExit):
        set_up({**READY, 'torchvision': '0.1'}, '--extras', 'timm', broken=('torchvision',), ready=ready)
    kept = json.loads((tmp_path / '.venv' / 'setup.json').read_text())
    assert kept.items() >= {**ready, 'fingerprint': ''}.items()


def test_an_unknown_extra_is_an_error(set_up):
    with pytest.raises(SystemExit, match='no extra tim\n.*timm'):
        set_up(READY, '--extras', 'tim')
    with pytest.raises(SystemExit, match='MMCV=lite'):
        set_up(READY, '--extras', 'lite')


@pytest.mark.parametrize('extras', ['timm', 'onnx'])
def test_a_torchvision_of_another_torch_is_removed(extras, set_up, capsys):
    """Packages that try to import it would fail. Where an extra needs it, the set-up is not complete."""
    installed = {**READY, 'torchvision': '0.1'}
    if extras == 'timm':
        with pytest.raises(SystemExit, match='torchvision 0.1 does not run with torch 2.13.0'):
            set_up(installed, '--extras', extras, broken=('torchvision',))
    else:
        assert 'uninstall -y torchvision' in set_up(installed, '--extras', extras, broken=('torchvision',))
        assert 'torchvision 0.1 does not run' in capsys.readouterr().out


def test_a_folder_that_is_no_environment_is_kept(set_up, tmp_path, monkeypatch):
    (tmp_path / '.venv' / 'thesis.tex').touch()
    monkeypatch.setattr(setup_env, 'output_of', lambda *command: '')
    with pytest.raises(SystemExit, match='not a virtual environment'):
        set_up({})
    assert (tmp_path / '.venv' / 'thesis.tex').exists()


@pytest.mark.slow
def test_make_reports_a_missing_python():
    python = '/nowhere/python3'
    done = subprocess.run(['make', '-C', str(ROOT), 'setup', f'PYTHON={python}'], capture_output=True, text=True)
    assert done.returncode != 0 and f"no Python at '{python}'" in done.stdout + done.stderr


def test_an_environment_of_an_earlier_version_is_updated(set_up):
    """Its record has a list of distributions, without versions."""
    assert set_up(READY, ready={'fingerprint': 'old', 'installed': sorted(READY)})
    assert not set_up(READY)


def test_a_damaged_record_is_a_user_error(set_up, tmp_path):
    (tmp_path / '.venv' / 'setup.json').write_text('{"tor')
    with pytest.raises(SystemExit, match='setup.json is damaged\nDelete it'):
        set_up(READY)
