"""Resuming what is not the same run any more, and stopping what does not listen."""

import signal
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from resume_cases import EPOCHS, config_with_signals, differences, run
from tiny import ROOT, tiny, tool_environment  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.checkpoints.io import read_checkpoint, restore_log_buffer
from replk_mm.engine import loops, prepare, stopping
from replk_mm.engine.config import load_config
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import Stopped, UserError, command

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow


def test_signals_between_two_checkpoints_leave_one_of_theirs(tiny, tmp_path, monkeypatch):
    config = config_with_signals(tmp_path, tiny.config)
    for i, at in enumerate((0, 1, 2)):
        monkeypatch.setenv('TEST_SIGNAL', f'SIGTERM:train:{at}')
        with pytest.raises(Stopped):
            run(config, tiny, tmp_path / 'w', 8, 8, **({'resume': 'auto'} if i else {}))
    assert [p.name for p in (tmp_path / 'w').glob('iter_*.pth')] == ['iter_3.pth']


def test_a_loop_of_mmengine_stays_and_its_limits_are_logged(tiny, tmp_path):
    cfg = tiny.cfg()
    cfg.train_cfg.pop('type')
    notes = prepare_training(cfg, tiny.options(tmp_path))
    assert 'type' not in cfg.train_cfg
    assert any(note.startswith('resume: train_cfg.type is') and 'replk_mm.IterBasedTrainLoop' in note for note in notes)


def test_a_loop_of_the_users_own_is_ended_by_a_signal_as_ever(tiny, tmp_path, monkeypatch):
    from mmengine.registry import LOOPS

    @LOOPS.register_module(force=True)
    class OwnLoop(IterBasedTrainLoop):
        def run_iter(self, data_batch):
            heard.append(signal.getsignal(signal.SIGTERM))
            super().run_iter(data_batch)

    heard: list = []
    cfg, notes = tiny.prepare(tmp_path, 1)
    cfg.train_cfg.type = 'mmengine.OwnLoop'
    train(cfg, notes, preflight=False)
    assert heard == [signal.SIG_DFL]


def test_mmengines_own_field_resumes_and_a_schedule_that_ends_too_early_is_logged(tiny, tmp_path):
    tiny.train(tmp_path, 2, seed=11)
    cfg, notes = tiny.prepare(tmp_path, 4, {'resume': True})
    assert any('iter_2.pth, iteration 2, seed 11' in note for note in notes)
    assert cfg.randomness.seed == 11
    assert any(
        note.startswith('warning: the learning rate') and 'ends at iteration 2; this run has 4' in note
        for note in notes
    )
    assert not any('in proportion' in note for note in notes)


def test_the_best_checkpoint_of_another_folder_stays(tiny, tmp_path):
    best = {'default_hooks.checkpoint.save_best': 'aAcc', 'default_hooks.checkpoint.rule': 'less'}
    tiny.train(tmp_path / 'a', 2, best)
    [kept] = (tmp_path / 'a').glob('best_*.pth')
    best['default_hooks.checkpoint.rule'] = 'greater'
    tiny.train(tmp_path / 'b', 6, best, resume=str(tmp_path / 'a/iter_2.pth'))
    assert kept.is_file()


@pytest.mark.parametrize(
    ('interval', 'wrapper', 'said'),
    [
        (4, dict(accumulative_counts=2), []),
        (-1, dict(accumulative_counts=2), []),
        (5, dict(accumulative_counts=2), ['every 5 iterations, and a step takes 2']),
    ],
)
def test_intervals_that_cut_a_step_are_logged(interval, wrapper, said):
    cfg = Config(
        dict(
            train_cfg=dict(type='replk_mm.IterBasedTrainLoop'),
            optim_wrapper=wrapper,
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=interval)),
        )
    )
    notes = prepare._limits_of_resuming(cfg)
    assert len(notes) == len(said) and all(words in note for words, note in zip(said, notes, strict=True))


def test_gradients_of_any_of_several_optimizers_are_waited_for():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    one, other = (
        OptimWrapper(torch.optim.SGD([weight], lr=0.1), accumulative_counts=steps)
        for weight, steps in zip(weights, (1, 2), strict=True)
    )
    runner = SimpleNamespace(optim_wrapper=OptimWrapperDict(one=one, other=other))
    done = []
    for _ in range(4):
        other.update_params((weights[1] * 2).sum())
        done.append(loops._between_steps(runner))
    assert done == [False, True, False, True]


def test_checkpoints_of_the_first_version_resume(tiny, tmp_path):
    """They held mmengine's log buffers and whatever numpy types hooks had left."""
    last = tiny.train(tmp_path / 'w', 2, seed=3)
    straight = tiny.train(tmp_path / 'w', 4, resume='auto')
    content = read_checkpoint(last)
    hub = content['message_hub']
    hub['log_scalars'] = OrderedDict((key, restore_log_buffer(value)) for key, value in hub['log_scalars'].items())
    hub['runtime_info']['best_score'] = np.float64(0.5)
    hub['resumed_keys']['best_score'] = True
    torch.save(content, tmp_path / 'old.pth')
    resumed = tiny.train(tmp_path / 'x', 4, resume=str(tmp_path / 'old.pth'))
    assert differences(straight, resumed) == []
    logs = [read_checkpoint(path)['message_hub']['log_scalars']['train/loss']['values'] for path in (straight, resumed)]
    assert len(logs[0]) == 4 and torch.equal(*logs)


def test_a_loader_without_a_batch_is_named(tiny, tmp_path):
    options = {
        'train_dataloader.batch_size': 64,
        'train_dataloader.drop_last': True,
        'train_dataloader.sampler': dict(_delete_=True, type='DefaultSampler', shuffle=True),
    }
    cfg = load_config(str(config_with_signals(tmp_path, tiny.config, '', EPOCHS)), options)
    notes = prepare_training(cfg, tiny.options(tmp_path / 'w'))
    cfg.train_dataloader.update(batch_size=64, drop_last=True)
    with pytest.raises(UserError, match='train_dataloader: '):
        train(cfg, notes, preflight=False)


# -- signals ----------------------------------------------------------------------------------------------------------
def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.catch_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_command_prints_what_stopped_it(capsys):
    @command
    def main():
        raise Stopped(signal.SIGTERM, 'w/iter_3.pth')

    assert main() == 75
    assert capsys.readouterr().err == 'stopped by SIGTERM; --resume continues from w/iter_3.pth\n'
