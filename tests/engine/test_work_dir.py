"""A training in a work directory that holds another one, or is in use."""

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from mmengine.config import Config
from tiny import tiny, trained  # noqa: F401

from replk_mm.engine import train as training
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.resuming import former_run, require_no_run
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.mark.parametrize('name', ['iter_3.pth', 'epoch_2.pth', 'epoch_1_iter_7.pth', 'best_mIoU_iter_3.pth'])
def test_a_run_is_protected(name, tiny, tmp_path):
    (tmp_path / name).touch()
    for check in (lambda: require_no_run(tmp_path), lambda: tiny.prepare(tmp_path)):
        with pytest.raises(UserError, match=rf'{tmp_path}: holds .*{name}.*\n.*--resume.*another folder.*--overwrite'):
            check()


def test_a_run_without_a_checkpoint_is_not_worth_protecting(tmp_path):
    require_no_run(tmp_path / 'new')
    for name in ('nonfinite_iter_3.pth', 'preflight.pth', 'iter_3.pth.part', 'weights.pth', 'tiny.py', 'lock'):
        (tmp_path / name).touch()
    (tmp_path / '20250101_000000').mkdir()
    require_no_run(tmp_path)


def test_checkpoints_elsewhere_are_not_of_this_run(tmp_path):
    mine, work = tmp_path / 'mine.pth', tmp_path / 'work'
    work.mkdir()
    mine.touch()
    (work / 'last_checkpoint').write_text(str(mine))
    assert former_run(work) == []
    (work / 'own.pth').touch()
    (work / 'last_checkpoint').write_text('/where/it/was/written/own.pth')
    assert former_run(work) == [work / 'own.pth']


@pytest.mark.parametrize('prefix', ['', 'file://'])
@pytest.mark.parametrize('how', ['pretrained', 'load_from'])
def test_weights_to_start_from_are_not_replaced(how, prefix, tiny, tmp_path):
    source = tmp_path / 'iter_3.pth'
    source.touch()
    name = f'{prefix}{source}'
    options, changes = ({}, {how: name}) if how == 'pretrained' else ({how: name}, {})
    with pytest.raises(UserError, match='iter_3.pth: is an input'):
        tiny.prepare(tmp_path, 2, options, overwrite=True, **changes)


def test_one_training_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(training, '_train', lambda *args: 'trained')
    cfg = Config(dict(work_dir=str(tmp_path), launcher='none'))
    with FileLock(tmp_path / 'lock'):
        with pytest.raises(UserError, match='another process is training there'):
            training.train(cfg, [])
        cfg.launcher = 'pytorch'  # other processes of a run share the lock of its first one
        monkeypatch.setenv('RANK', '1')
        assert training.train(cfg, []) == 'trained'
        monkeypatch.setenv('RANK', '0')
        with pytest.raises(UserError, match='another process is training there'):
            training.train(cfg, [])
    assert training.train(cfg, []) == 'trained'


def test_a_lock_that_is_a_link_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(training, '_train', lambda *args: 'trained')
    (tmp_path / 'mine').write_text('my work')
    (tmp_path / 'lock').symlink_to(tmp_path / 'mine')
    with pytest.raises(UserError, match='cannot be locked .*lock'):
        training.train(Config(dict(work_dir=str(tmp_path), launcher='none')), [])
    assert (tmp_path / 'mine').read_text() == 'my work'


HOLD = """
import sys
from mmengine.config import Config
from replk_mm.engine import train as training
training._train = lambda *args: (print('training', flush=True), sys.stdin.read())
training.train(Config(dict(work_dir=sys.argv[1], launcher='none')), [])
"""


@pytest.mark.slow
def test_the_lock_of_a_killed_training_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(training, '_train', lambda *args: 'trained')
    cfg = Config(dict(work_dir=str(tmp_path), launcher='none'))
    other = subprocess.Popen(
        [sys.executable, '-c', HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == 'training\n'
        with pytest.raises(UserError, match='another process is training there'):
            training.train(cfg, [])
    finally:
        other.kill()
        other.communicate()
    assert training.train(cfg, []) == 'trained'


@pytest.mark.slow
def test_links_are_replaced_by_checkpoints(tiny, tmp_path):
    mine, work = tmp_path / 'mine', tmp_path / 'work'
    mine.write_text('my work')
    work.mkdir()
    for name in ('last_checkpoint', 'iter_2.pth.part'):
        (work / name).symlink_to(mine)
    cfg, notes = tiny.prepare(work, 2)
    assert training.train(cfg, notes, preflight=False) == work / 'iter_2.pth'
    assert mine.read_text() == 'my work'
    assert (work / 'last_checkpoint').read_text() == str(work / 'iter_2.pth')


@pytest.mark.slow
def test_overwriting_a_run(tiny, tmp_path):
    """The former checkpoints go once the new training has passed its dry run."""
    former = [tmp_path / name for name in ('iter_9.pth', 'best_mIoU_iter_3.pth')]
    for path in (*former, tmp_path / 'thesis.pth'):
        path.touch()
    cfg, notes = tiny.prepare(tmp_path, 1, {'val_evaluator.iou_metrics': ['no such metric']}, seed=2, overwrite=True)
    with pytest.raises(UserError, match='dry run'):
        training.train(cfg, notes, overwrite=True)
    assert all(path.is_file() for path in former)
    cfg, notes = tiny.prepare(tmp_path, 1, seed=2, overwrite=True)
    assert training.train(cfg, notes, overwrite=True).name == 'iter_1.pth'
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['best_mIoU_iter_1.pth', 'iter_1.pth', 'thesis.pth']


@pytest.mark.slow
def test_configs_are_not_replaced(tiny, trained, tmp_path):
    """Neither the saved config of a training by that of its test, nor a config that the user runs."""
    work = trained.parent
    saved = (work / 'tiny.py').read_text()
    assert 'optim_wrapper' in saved
    evaluate(tiny.cfg(), str(trained), tiny.options(work))
    assert (work / 'tiny.py').read_text() == saved
    own = tmp_path / 'tiny.py'
    own.write_text(f'# my notes\n{tiny.config.read_text()}')
    cfg = load_config(str(own))
    notes = prepare_training(cfg, tiny.options(tmp_path, max_iters=1))
    training.train(cfg, notes, preflight=False)
    assert own.read_text().startswith('# my notes')
    assert [path.name for path in Path(tmp_path).glob('*/tiny.py')] == ['tiny.py']
