"""check_data: exit status, report, JSON and picture."""

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
from replk_mm.data.checks.audit import audit
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)

CONFIG = ROOT / 'configs/upernet_replk-nano_demo.py'


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run the command in this process; return its exit status and output."""

    def run_command(*args) -> tuple[int, str]:
        monkeypatch.setattr(sys, 'argv', ['tools/check_data.py', *map(str, args)])
        try:
            status = check_data.main()
        except SystemExit as error:
            status = int(error.code or 0)
        shown = capsys.readouterr()
        assert 'Traceback' not in shown.err
        return status, shown.out

    return run_command


def test_clean_data(data, tmp_path, run_command):
    outputs = '--json', tmp_path / 'deep/x.json', '--picture', tmp_path / 'x.png'
    status, out = run_command(CONFIG, '--data-root', data, '--full', '--jobs', 2, *outputs)
    assert status == 0 and '9 of 9 images' in out and 'found: 0 errors, 0 warnings, 0 notes' in out
    assert out.splitlines()[-1] == f'next: python tools/train.py {CONFIG} --data-root {data}'
    assert '--full' not in out
    assert json.loads((tmp_path / 'deep/x.json').read_text())['full'] is True
    assert min(Image.open(tmp_path / 'x.png').size) > 400


@pytest.mark.parametrize(
    ('pixels', 'status', 'code'), [(None, 1, 'unreadable'), (0, 0, 'label-all-ignored'), (9, 1, 'label-out-of-range')]
)
def test_exit_status_and_report(data, tmp_path, run_command, pixels, status, code):
    path = label(data, 2)
    if pixels is None:
        path.write_bytes(path.read_bytes()[:50])
    else:
        Image.new('L', (64, 64), pixels).save(path)
    found, out = run_command(CONFIG, '--data-root', data, '--json', tmp_path / 'x.json')
    assert found == status and f'{["warning", "error"][status]} {code}: 1\n  {path}: ' in out
    assert list(json.loads((tmp_path / 'x.json').read_text())['counts'].values()) == [status, 1 - status, 0]


def test_training_images_in_validation_data_are_an_error(data, run_command):
    image(data, 0, 'val').write_bytes(image(data, 0).read_bytes())
    status, out = run_command(CONFIG, '--data-root', data, '--full')
    assert status == 1 and 'error leak: 1' in out
    status, out = run_command(CONFIG, '--data-root', data)
    assert status == 0 and 'not checked without --full' in out and 'copies of an image' in out


@pytest.mark.parametrize(
    'args',
    [
        ['{tmp}/gone.py'],
        ['{config}', '--jobs', '0'],
        ['{config}', '--json', '{tmp}'],
        ['{config}', '--picture', '{file}/x.png'],
        ['{config}', '--picture', '{tmp}/x.foo'],
        ['{config}', '--picture', '{tmp}/x'],
        ['{config}', '--classes', 'a,a'],
        ['{config}', '--wrong'],
        ['{config}', '--cfg-options', 'train_dataloader.dataset.type=Unknown'],
    ],
)
def test_mistakes_exit_with_2(data, tmp_path, args, run_command):
    (tmp_path / 'file').write_text('')
    filled = [arg.format(tmp=tmp_path, config=CONFIG, file=tmp_path / 'file') for arg in args]
    assert run_command(*filled, '--data-root', data)[0] == 2


def test_missing_data_root(tmp_path, run_command):
    status, out = run_command(CONFIG, '--data-root', tmp_path / 'gone', '--picture', tmp_path / 'x.png')
    assert status == 1 and 'error data-root-missing' in out and f'not written: {tmp_path}/x.png' in out
    assert not (tmp_path / 'x.png').exists()


def test_report_shows_five_and_json_lists_all(data):
    for i in range(6):
        image(data, i).write_bytes(b'')
    result = full(seg_config(data))
    shown = check_data.format_audit(result)
    assert 'error unreadable: 6' in shown and [str(image(data, i)) in shown for i in range(6)] == 5 * [True] + [False]
    content = json.loads(check_data.to_json(result))
    assert content['counts'] == dict(error=6, warning=0, note=0)
    assert [finding['path'] for finding in content['findings']] == [str(image(data, i)) for i in range(6)]
    keys = {'code', 'severity', 'split', 'path', 'entry', 'message', 'expected', 'fix'}
    assert set(content['findings'][0]) == keys
    assert content['datasets'][1]['sizes'] == [dict(width=64, height=64, images=3)]


def test_line_of_a_data_set_counts_the_labels_that_exist(data):
    label(data, 0).unlink()
    assert '6 images, 5 with labels, 6 inspected' in str(audit(seg_config(data), jobs=1).datasets[0])


@pytest.mark.parametrize('classes', [3, 60])
def test_picture_names_every_class_that_occurs(data, tmp_path, classes, monkeypatch):
    figures = []
    monkeypatch.setattr(check_data.Figure, 'savefig', lambda figure, path, **options: figures.append(figure))
    result = full(seg_config(data))
    result.datasets[0].object_counts = {f'name ${i}': 10 ** (i % 7) for i in range(classes)} | {'never': 0}
    check_data.plot(result, tmp_path / 'x.png', crop=(32, 48))
    frequencies, sizes = figures[0].axes
    names = [tick.get_text() for tick in frequencies.get_yticklabels()]
    assert len(names) == classes + 8 and r'name \$0' in names and 'never' not in names
    assert frequencies.get_xscale() == 'log'
    assert sizes.patches[0].get_bbox().bounds == (0, 0, 48, 32)


@pytest.mark.slow
def test_dead_process_is_an_error(tmp_path, monkeypatch):
    write_pairs(tmp_path, 'train', 40)
    read = images.read_size
    monkeypatch.setattr(images, 'read_size', lambda path: os._exit(1) if '000002' in path else read(path))
    with pytest.raises(UserError, match='process died'):
        full(seg_config(tmp_path, splits=('train',)), jobs=2)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path):
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
    time.sleep(0.1)  # a signal between the start of the workers and that of the pool's thread leaves Python waiting
    workers = _children(child.pid)
    os.killpg(child.pid, signal.SIGINT)
    _, text = child.communicate(timeout=30)
    assert child.returncode == 130 and 'Traceback' not in text
    assert len(workers) == 2 and not any(Path(f'/proc/{worker}').exists() for worker in workers)


def _children(pid: int) -> list[str]:
    return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
