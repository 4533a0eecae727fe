"""The command: exit statuses, files that it writes, mistakes in how it is called."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from many_pairs import data, write  # noqa: F401
from PIL import Image
from test_data_workers import gone
from tiny import ROOT, tool_environment

# ruff: noqa: F811 (fixtures that come from another file)

CONFIG = ROOT / 'configs/upernet_replk-nano_demo.py'


def run(monkeypatch, *args) -> int:
    spec = importlib.util.spec_from_file_location('tool_check_data', ROOT / 'tools/check_data.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, 'argv', ['tools/check_data.py', *map(str, args)])
    return module.main()


def test_clean_data(data, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, CONFIG, '--data-root', data, '--full', '--jobs', 2, '--json', tmp_path / 'deep/x.json',
               '--picture', tmp_path / 'x.png') == 0
    out = capsys.readouterr().out
    assert '0 errors, 0 warnings, 0 notes; 9 of 9 images looked into' in out
    assert json.loads((tmp_path / 'deep/x.json').read_text())['full'] is True
    assert min(Image.open(tmp_path / 'x.png').size) > 400


def test_errors_are_told_by_the_exit_status(data, tmp_path, monkeypatch, capsys):
    target = sorted((data / 'annotations/training').iterdir())[2]
    target.write_bytes(target.read_bytes()[:50])
    assert run(monkeypatch, CONFIG, '--data-root', data, '--json', tmp_path / 'x.json') == 1
    assert f'error cut-off: 1\n  {target}: the file is cut off' in capsys.readouterr().out
    assert json.loads((tmp_path / 'x.json').read_text())['kinds']['cut-off']['count'] == 1


def test_warnings_are_no_errors(data, monkeypatch, capsys):
    Image.new('RGB', (16, 16)).save(data / 'images/training/training_000002.jpg')
    Image.new('L', (16, 16), 1).save(data / 'annotations/training/training_000002.png')
    assert run(monkeypatch, CONFIG, '--data-root', data) == 0
    assert 'warning image-tiny: 1' in capsys.readouterr().out


@pytest.mark.parametrize('args', [['{tmp}/gone.py'], ['{config}', '--jobs', '0'], ['{config}', '--json', '{tmp}'],
                                  ['{config}', '--picture', '{file}/x.png'], ['{config}', '--classes', 'a,a'],
                                  ['{config}', '--wrong'],
                                  ['{config}', '--cfg-options', 'train_dataloader.dataset.type=Unknown']])
def test_mistakes_exit_with_2(data, tmp_path, args, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')
    filled = [arg.format(tmp=tmp_path, config=CONFIG, file=tmp_path / 'file') for arg in args]
    try:
        assert run(monkeypatch, *filled, '--data-root', data) == 2
    except SystemExit as error:
        assert error.code == 2
    assert 'Traceback' not in capsys.readouterr().err


def test_data_root_that_is_not_there_is_an_error_of_the_data(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, CONFIG, '--data-root', tmp_path / 'gone') == 1
    assert 'error data-root-missing' in capsys.readouterr().out
    assert run(monkeypatch, CONFIG, '--data-root', tmp_path / 'gone', '--picture', tmp_path / 'x.png') == 1
    assert f'not written: {tmp_path}/x.png' in capsys.readouterr().out and not (tmp_path / 'x.png').exists()


def test_picture_of_an_unknown_format_is_refused_before_anything_is_looked_at(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('replk_mm.data.audit.survey', lambda *args, **options: pytest.fail('the data were looked at'))
    assert run(monkeypatch, CONFIG, '--data-root', data, '--picture', tmp_path / 'deep/x.foo') == 2
    assert f'error: {tmp_path}/deep/x.foo: no picture can be written as .foo' in capsys.readouterr().err
    assert not (tmp_path / 'deep').exists()


def test_file_that_kills_its_decoder_does_not_kill_a_command_of_one_process(data, monkeypatch, capsys):
    from replk_mm.data import pairs
    victim, inspect = str(data / 'images/training/training_000002.jpg'), pairs.inspect
    monkeypatch.setattr(pairs, 'inspect', lambda task, rules: os.abort() if task.image == victim else inspect(task, rules))
    assert run(monkeypatch, CONFIG, '--data-root', data, '--jobs', 1) == 1
    out = capsys.readouterr().out
    assert f'error decoder-crash: 1\n  {victim}' in out and '9 of 9 images looked into' in out


def test_without_a_terminal_there_is_no_bar(data, monkeypatch, capsys):
    run(monkeypatch, CONFIG, '--data-root', data)
    assert '\r' not in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_the_whole_command(tmp_path):
    write(tmp_path, 'training', 1500)
    write(tmp_path, 'validation', 3)
    child = subprocess.Popen([sys.executable, str(ROOT / 'tools/check_data.py'), str(CONFIG), '--data-root', str(tmp_path),
                              '--full', '--jobs', '2'], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             start_new_session=True, env=tool_environment(OMP_NUM_THREADS='4'))
    children = Path(f'/proc/{child.pid}/task/{child.pid}/children')
    end = time.monotonic() + 100
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    _, text = child.communicate(timeout=30)
    assert child.returncode == 130 and text.strip().endswith('interrupted') and 'Traceback' not in text
    assert len(workers) == 2 and all(gone(int(worker)) for worker in workers)
