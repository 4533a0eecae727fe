"""The command: exit statuses, its report, and the files it writes."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from check_data_cases import data, full, image, label, seg_config, write_pairs  # noqa: F401 (a fixture)
from PIL import Image
from tiny import ROOT, tool_environment

from replk_mm.commands import check_data
from replk_mm.data.checks import images
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)

CONFIG = ROOT / 'configs/upernet_replk-nano_demo.py'


def run(monkeypatch, *args) -> int:
    module = importlib.import_module('replk_mm.commands.check_data')
    monkeypatch.setattr(sys, 'argv', ['tools/check_data.py', *map(str, args)])
    return module.main()


def test_clean_data(data, tmp_path, monkeypatch, capsys):
    assert (
        run(
            monkeypatch,
            CONFIG,
            '--data-root',
            data,
            '--full',
            '--jobs',
            2,
            '--json',
            tmp_path / 'deep/x.json',
            '--picture',
            tmp_path / 'x.png',
        )
        == 0
    )
    shown = capsys.readouterr()
    assert '0 errors, 0 warnings, 0 notes; 9 of 9 images inspected' in shown.out and 'images' not in shown.err
    assert json.loads((tmp_path / 'deep/x.json').read_text())['full'] is True
    assert min(Image.open(tmp_path / 'x.png').size) > 400


@pytest.mark.parametrize(
    ('pixels', 'status', 'text'),
    [
        (None, 1, 'error unreadable: 1\n  {label}: the file is cut off'),
        (0, 0, 'warning label-all-ignored: 1'),
        (9, 1, 'error label-out-of-range: 1\n  {label}: label ids 9 are out of range of the 8 classes'),
    ],
)
def test_exit_status_and_report(data, tmp_path, monkeypatch, capsys, pixels, status, text):
    path = label(data, 2)
    if pixels is None:
        path.write_bytes(path.read_bytes()[:50])
    else:
        Image.new('L', (64, 64), pixels).save(path)
    assert run(monkeypatch, CONFIG, '--data-root', data, '--json', tmp_path / 'x.json') == status
    assert text.format(label=path) in capsys.readouterr().out
    assert list(json.loads((tmp_path / 'x.json').read_text())['counts'].values()) == [status, 1 - status, 0]


@pytest.mark.parametrize(
    'args',
    [
        ['{tmp}/gone.py'],
        ['{config}', '--jobs', '0'],
        ['{config}', '--json', '{tmp}'],
        ['{config}', '--picture', '{file}/x.png'],
        ['{config}', '--picture', '{tmp}/x.foo'],
        ['{config}', '--classes', 'a,a'],
        ['{config}', '--wrong'],
        ['{config}', '--cfg-options', 'train_dataloader.dataset.type=Unknown'],
    ],
)
def test_mistakes_exit_with_2(data, tmp_path, args, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')
    filled = [arg.format(tmp=tmp_path, config=CONFIG, file=tmp_path / 'file') for arg in args]
    try:
        assert run(monkeypatch, *filled, '--data-root', data) == 2
    except SystemExit as error:
        assert error.code == 2
    assert 'Traceback' not in capsys.readouterr().err


def test_data_root_that_does_not_exist(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, CONFIG, '--data-root', tmp_path / 'gone', '--picture', tmp_path / 'x.png') == 1
    out = capsys.readouterr().out
    assert 'error data-root-missing' in out and f'not written: {tmp_path}/x.png' in out
    assert not (tmp_path / 'x.png').exists()


def test_report_shows_five_and_the_file_has_all(data):
    for i in range(6):
        image(data, i).write_bytes(b'')
    result = full(seg_config(data))
    shown = check_data.text(result)
    assert shown.count('the file is empty') == 5 and 'error unreadable: 6' in shown and '... and 1 more' in shown
    assert shown.splitlines()[-1].startswith('6 errors, 0 warnings, 0 notes; 9 of 9 images inspected')
    found = json.loads(check_data.as_json(result))
    assert found['counts'] == dict(error=6, warning=0, note=0)
    assert [problem['path'] for problem in found['problems']] == [str(image(data, i)) for i in range(6)]
    assert set(found['problems'][0]) == {'kind', 'severity', 'split', 'path', 'entry', 'found', 'allowed', 'remedy'}
    assert found['data_sets'][1]['sizes'] == [dict(width=64, height=64, images=3)]


@pytest.mark.parametrize('suffix', ['', '.foo'])
def test_suffixes_of_no_picture(suffix):
    with pytest.raises(UserError, match=r'ends with \.png'):
        check_data.check_suffix(Path(f'x{suffix}'))


@pytest.mark.parametrize('classes', [3, 60])
def test_picture_names_every_class_that_occurs(data, tmp_path, classes, monkeypatch):
    drawn = []
    original = check_data.Figure.savefig
    monkeypatch.setattr(
        check_data.Figure,
        'savefig',
        lambda self, path, **options: (drawn.append(self), original(self, path, **options)),
    )
    result = full(seg_config(data))
    result.crop = (32, 48)
    result.sets[0].objects = {f'name ${i}': 10 ** (i % 7) for i in range(classes)} | {'never': 0}
    check_data.draw(result, tmp_path / 'x.png')
    names = [tick.get_text() for panel in drawn[0].axes[:-1] for tick in panel.get_yticklabels()]
    assert len(names) == classes + 8 and r'name \$0' in names and 'never' not in names
    assert drawn[0].axes[0].get_xscale() == 'log'
    assert drawn[0].axes[-1].patches[0].get_bbox().bounds == (0, 0, 48, 32)


def test_a_process_that_dies_is_an_error(tmp_path, monkeypatch):
    write_pairs(tmp_path, 'train', 40)
    read = images._read_image
    monkeypatch.setattr(images, '_read_image', lambda path: os._exit(1) if '000002' in path else read(path))
    with pytest.raises(UserError, match='a process ended while it decoded images'):
        full(seg_config(tmp_path, splits=('train',)), jobs=2)


@pytest.mark.slow
def test_ctrl_c_ends_the_whole_command(tmp_path):
    write_pairs(tmp_path, 'train', 3000)
    write_pairs(tmp_path, 'val', 3)
    command = [sys.executable, str(ROOT / 'tools/check_data.py'), str(CONFIG), '--data-root', str(tmp_path), '--full']
    child = subprocess.Popen(
        [*command, '--jobs', '2'],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=tool_environment(),
    )
    end = time.monotonic() + 100
    while len(_children(child.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    workers = _children(child.pid)
    os.killpg(child.pid, signal.SIGINT)
    _, text = child.communicate(timeout=30)
    assert child.returncode == 130 and text.strip().endswith('interrupted') and 'Traceback' not in text
    assert len(workers) == 2 and not any(Path(f'/proc/{worker}').exists() for worker in workers)


def _children(pid: int) -> list[str]:
    return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
