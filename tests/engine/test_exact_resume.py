"""A training that was stopped, however and wherever, ends with the very bits of one that was not."""

import random
import signal
from pathlib import Path

import pytest
from resume_cases import EMA, EPOCHS, RANDOM, config_with_signals, differences, forked, run
from tiny import run_tool, tiny  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.data.sampler import SeededDataset
from replk_mm.engine.config import load_config
from replk_mm.engine.loops import ValLoop
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import STOPPED_STATUS, Stopped

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def segmentor(tiny, tmp_path_factory):
    """A config with all kinds of randomness, and the checkpoint of 8 iterations without interruption."""
    folder = tmp_path_factory.mktemp('segmentor')
    config = config_with_signals(folder, tiny.config, EMA, RANDOM)
    return config, run(config, tiny, folder / 'straight')


@pytest.mark.parametrize(('name', 'place'), [('SIGINT', 'train:4'), ('SIGUSR1', 'val:4')])
def test_resume_after_a_signal_is_bit_identical(name, place, segmentor, tiny, tmp_path, monkeypatch):
    config, straight = segmentor
    monkeypatch.setenv('TEST_SIGNAL', f'{name}:{place}')
    with pytest.raises(Stopped) as info:
        run(config, tiny, tmp_path / 'stopped')
    where, at = place.split(':')
    done = int(at) + (where == 'train')
    assert info.value.signal == signal.Signals[name]
    assert Path(info.value.checkpoint) == tmp_path / 'stopped' / f'iter_{done}.pth'
    assert (tmp_path / 'stopped' / 'last_checkpoint').read_text() == info.value.checkpoint
    last = run(config, tiny, tmp_path / 'stopped', resume='auto')
    assert last.name == 'iter_8.pth'
    assert differences(straight, last) == []
    # Of what a signal made nothing is left once there is a regular one.
    assert sorted(p.name for p in last.parent.glob('iter_*.pth')) == ['iter_6.pth', 'iter_8.pth']


def test_comparison_detects_another_seed(segmentor, tiny, tmp_path):
    config, straight = segmentor
    found = differences(straight, run(config, tiny, tmp_path / 'other', seed=6))
    assert any(path.startswith('state_dict') for path in found)
    assert any(path.startswith('ema_state_dict') for path in found)


def test_workers_change_nothing(segmentor, tiny, tmp_path):
    config, straight = segmentor
    helped = run(config, tiny, tmp_path / 'helped', options={'train_dataloader.num_workers': 2})
    assert differences(straight, helped) == []


def test_the_past_is_not_loaded_again(segmentor, tiny, tmp_path, monkeypatch):
    config, _ = segmentor
    monkeypatch.setenv('TEST_SIGNAL', 'SIGTERM:train:6')
    with pytest.raises(Stopped):
        run(config, tiny, tmp_path / 'stopped')
    read = []
    get = SeededDataset.__getitem__
    monkeypatch.setattr(SeededDataset, '__getitem__', lambda data, draw: read.append(draw.position) or get(data, draw))
    run(config, tiny, tmp_path / 'stopped', resume='auto')
    assert read == [14, 15]  # of 8 iterations of 2, the seventh was the last


def test_validations_are_neither_lost_nor_repeated(segmentor, tiny, tmp_path, monkeypatch):
    config, _ = segmentor

    validated = []
    validate = ValLoop.run
    monkeypatch.setattr(ValLoop, 'run', lambda loop: validate(loop) and validated.append(loop.runner.iter))
    monkeypatch.setenv('TEST_SIGNAL', 'SIGTERM:val:4')
    with pytest.raises(Stopped):
        run(config, tiny, tmp_path / 'run')
    assert validated == []
    monkeypatch.setenv('TEST_SIGNAL', 'SIGTERM:train:5')
    with pytest.raises(Stopped):
        run(config, tiny, tmp_path / 'run', resume='auto')
    assert validated == [4]
    run(config, tiny, tmp_path / 'run', resume='auto')
    assert validated == [4, 8]


def test_epochs_go_on_in_their_middle_and_at_their_end(tiny, tmp_path, monkeypatch):
    config = config_with_signals(tmp_path, tiny.config, EMA, RANDOM + EPOCHS)

    def epochs(work: Path, **changes) -> Path:
        cfg = load_config(str(config))
        cfg.experiment_name = work.name
        return train(cfg, prepare_training(cfg, tiny.options(work, **{'seed': 5, **changes})), preflight=False)

    straight = epochs(tmp_path / 'straight')
    assert straight.name == 'epoch_3.pth'
    # Two batches are an epoch of these four images.
    for at, name in ((1, 'epoch_1.pth'), (2, 'epoch_1_iter_3.pth')):
        work = tmp_path / f'stopped_{at}'
        monkeypatch.setenv('TEST_SIGNAL', f'SIGTERM:train:{at}')
        with pytest.raises(Stopped) as info:
            epochs(work)
        assert Path(info.value.checkpoint).name == name
        last = epochs(work, resume='auto')
        assert differences(straight, last) == []
        assert sorted(p.name for p in work.glob('epoch_*.pth')) == ['epoch_2.pth', 'epoch_3.pth']


def test_gradients_that_add_up_are_stopped_between_steps(segmentor, tiny, tmp_path, monkeypatch):
    config, _ = segmentor
    settings = dict(interval=4, options={'optim_wrapper.accumulative_counts': 2})
    straight = run(config, tiny, tmp_path / 'straight', **settings)
    monkeypatch.setenv('TEST_SIGNAL', 'SIGTERM:train:4')
    with pytest.raises(Stopped) as info:
        run(config, tiny, tmp_path / 'stopped', **settings)
    assert Path(info.value.checkpoint).name == 'iter_6.pth'
    assert differences(straight, run(config, tiny, tmp_path / 'stopped', resume='auto', **settings)) == []


@pytest.mark.parametrize(
    ('kind', 'name', 'status'),
    [('UperNet', 'SIGTERM', STOPPED_STATUS), ('Cascade Mask R-CNN', 'SIGKILL', -signal.SIGKILL)],
)
def test_stopped_at_five_random_iterations_it_ends_with_the_same_bits(
    kind, name, status, request, tmp_path, monkeypatch
):
    data, more = (
        (request.getfixturevalue('tiny'), RANDOM) if kind == 'UperNet' else (request.getfixturevalue('detector'), '')
    )
    config = config_with_signals(tmp_path / 'config', data.config, EMA, more)
    straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
    assert forked(lambda: run(config, data, straight, 10, 2)) == 0
    for at in sorted(random.Random(len(name + kind)).sample(range(10), 5)):
        monkeypatch.setenv('TEST_SIGNAL', f'{name}:train:{at}')
        assert forked(lambda: run(config, data, stopped, 10, 2, resume='auto')) == status
    monkeypatch.delenv('TEST_SIGNAL')
    assert forked(lambda: run(config, data, stopped, 10, 2, resume='auto')) == 0
    assert differences(straight / 'iter_10.pth', stopped / 'iter_10.pth') == []


def test_a_signal_to_one_of_two_processes_stops_both(tiny, tmp_path):
    config = config_with_signals(tmp_path / 'config', tiny.config, EMA, RANDOM)
    common = [config, '--data-root', tiny.data, '--seed', 7, '--max-iters', 6, '--no-preflight']
    common += ['--cfg-options', 'default_hooks.checkpoint.interval=5']
    straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
    assert run_tool('train', *common, '--work-dir', straight, processes=2).returncode == 0
    found = run_tool('train', *common, '--work-dir', stopped, processes=2, TEST_SIGNAL='SIGTERM:train:2')
    assert found.returncode == 1, 'torchrun has a status of its own'
    assert found.stderr.count(f'--resume continues from {stopped / "iter_3.pth"}') == 1
    assert found.stderr.count(f'exitcode  : {STOPPED_STATUS}') >= 1
    assert run_tool('train', *common, '--work-dir', stopped, '--resume', processes=2).returncode == 0
    assert differences(straight / 'iter_6.pth', stopped / 'iter_6.pth') == []
