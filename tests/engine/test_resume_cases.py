"""Resuming what is not the same run any more, and stopping what does not listen."""

import re
import signal
from collections import OrderedDict
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from resume_cases import EPOCHS, config_with_signals, differences, run
from tiny import ROOT, tiny, tool_environment  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.checkpoints.io import read_checkpoint, restore_log_buffer
from replk_mm.engine import loops, prepare, resuming, stopping
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


def test_mmengines_own_field_resumes(tiny, tmp_path):
    tiny.train(tmp_path, 2, seed=11)
    cfg, notes = tiny.prepare(tmp_path, 4, {'resume': True})
    assert any('iter_2.pth, iteration 2, seed 11' in note for note in notes)
    assert cfg.randomness.seed == 11
    assert not any('in proportion' in note for note in notes)


CONSTANT = dict(type='ConstantLR', factor=1.0, by_epoch=False, begin=0, end=2)
SCALED = {'auto_scale_lr': dict(enable=True, base_batch_size=2), 'optim_wrapper.optimizer.lr': 0.004}
ADAMW = {'type': 'AdamW', 'lr': 0.01, 'weight_decay': 0.05, '_delete_': True}
SGD = {'optim_wrapper.optimizer': dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.05, _delete_=True)}
DECAYED = {'constructor': 'replk_mm.LayerDecayOptimizerConstructor', 'paramwise_cfg': dict(decay_rate=0.5)}


@pytest.mark.parametrize(
    ('first', 'then', 'warned', 'saved', 'rates'),
    [
        # half the rate of the config, as the batch is twice as large
        (SCALED, {'train_dataloader.batch_size': 4}, 'optimizer.lr=0.004 instead of 0.008', {'lr': 0.002}, {0.004}),
        ({}, {'optim_wrapper.optimizer.lr': 0.1}, 'optimizer.lr=0.01 instead of 0.1', {'lr': 0.01}, {0.01}),
        (
            {'optim_wrapper.optimizer': ADAMW},
            {'optim_wrapper.optimizer': ADAMW | {'betas': (0.5, 0.9), 'weight_decay': 0.1}},
            'optimizer.betas=[0.9, 0.999] instead of [0.5, 0.9]',
            {'betas': [0.9, 0.999], 'weight_decay': 0.05},
            {0.01},
        ),
        (
            {f'optim_wrapper.{key}': value for key, value in DECAYED.items()},
            {'optim_wrapper.optimizer.lr': 0.04, **{f'optim_wrapper.{key}': value for key, value in DECAYED.items()}},
            'optimizer.lr=0.01 instead of 0.04',
            {'lr': 0.01},
            {0.01 / 2**i for i in range(6)},
        ),
        ({}, {'param_scheduler': [CONSTANT | {'factor': 0.5}]}, 'factor=1.0 instead of 0.5', {'lr': 0.01}, {0.01}),
        ({}, {}, None, {'lr': 0.01}, {0.01}),
    ],
    ids=['batch', 'rate', 'betas', 'rates of layers', 'schedule', 'nothing'],
)
def test_settings_of_the_checkpoint_are_announced_saved_and_used(
    tiny, tmp_path, first, then, warned, saved, rates, capsys
):
    checkpoints = {'default_hooks.checkpoint.interval': 1, 'default_hooks.checkpoint.max_keep_ckpts': -1}
    base = {'param_scheduler': [CONSTANT], 'train_cfg.max_iters': 3} | checkpoints
    tiny.train(tmp_path / 'a', None, base | first, seed=0)
    cfg, notes = tiny.prepare(tmp_path / 'b', None, base | first | then, resume=str(tmp_path / 'a/iter_1.pth'))
    last = train(cfg, notes, preflight=False)
    assert not any(note.startswith('learning rate') for note in notes)
    [line] = re.findall('warning: resume: .*', ''.join(capsys.readouterr())) or [None]
    assert (warned in line) if warned else line is None
    config = Config.fromfile(tmp_path / 'b/tiny.py')
    assert {key: config.optim_wrapper.optimizer[key] for key in saved} == saved
    assert config.param_scheduler[0].factor == 1
    groups = torch.load(last, weights_only=False)['optimizer']['param_groups']
    assert {round(group['lr'], 9) for group in groups} <= rates


@pytest.mark.parametrize(
    ('first', 'then', 'named'),
    [
        (SGD, {'optim_wrapper.optimizer': ADAMW}, "no 'step'"),
        ({}, SGD, 'SGD'),
        ({}, {'optim_wrapper.optimizer': ADAMW | {'type': 'RAdam'}}, 'RAdam'),  # has all its settings and more
        ({}, {'param_scheduler': [CONSTANT, CONSTANT]}, '2 schedules, the checkpoint 1'),
        ({}, {'param_scheduler': [dict(type='PolyLR', by_epoch=False, end=3)]}, 'or types differ'),
        (
            {},
            {'optim_wrapper.paramwise_cfg': {'custom_keys': {'backbone': {'decay_mult': 0.1}}}},
            'differs in decay_mult',
        ),
        (
            {f'optim_wrapper.{key}': value for key, value in DECAYED.items()},
            {'optim_wrapper.paramwise_cfg.decay_rate': 0.9},
            'lr_scale is 0.[0-9]+, and 0.[0-9]+ in the checkpoint',
        ),
    ],
    ids=['AdamW', 'SGD', 'RAdam', 'more schedules', 'other schedule', 'other groups', 'other decay'],
)
def test_another_optimizer_or_schedule_is_rejected(tiny, tmp_path, first, then, named):
    base = {'param_scheduler': [CONSTANT], 'train_cfg.max_iters': 1}
    tiny.train(tmp_path / 'a', None, base | first)
    base['train_cfg.max_iters'] = 2
    with pytest.raises(UserError, match=f'iter_1.pth: cannot be resumed: .*{named}'):
        tiny.train(tmp_path / 'b', None, base | first | then, resume=str(tmp_path / 'a/iter_1.pth'))


def test_a_longer_training_needs_a_new_run(tiny, tmp_path):
    """Its last iterations would have a learning rate of 0, since the schedule of the checkpoint ends before them."""
    tiny.train(tmp_path, 2, {'default_hooks.checkpoint.interval': 1}, seed=0)
    for name in ('iter_1.pth', 'iter_2.pth'):
        with pytest.raises(UserError, match=rf'{name}: cannot be resumed .* param_scheduler\.0\.end is 2 .* 4'):
            tiny.train(tmp_path, 4, resume=str(tmp_path / name))
    tiny.train(tmp_path, 2, resume='auto')  # nothing is left to train


def test_the_last_iteration_at_a_rate_of_0_is_resumed(tiny, tmp_path):
    options = {'default_hooks.checkpoint.interval': 1, 'train_cfg.max_iters': 3, 'param_scheduler.0.end': 3}
    tiny.train(tmp_path, None, options, seed=0)
    assert tiny.train(tmp_path, None, options, resume=str(tmp_path / 'iter_2.pth')).name == 'iter_3.pth'


def test_epochs_that_end_before_the_checkpoint_are_rejected(tiny, tmp_path):
    (tmp_path / 'epochs.py').write_text(f'_base_ = {str(tiny.config)!r}\n{EPOCHS}')
    run(tmp_path / 'epochs.py', tiny, tmp_path / 'a', None, 1)
    cfg = load_config(str(tmp_path / 'epochs.py'), {'train_cfg.max_epochs': 2})
    with pytest.raises(UserError, match='it is at epoch 3, and the training ends at 2'):
        prepare_training(cfg, tiny.options(tmp_path / 'b', resume=str(tmp_path / 'a/epoch_3.pth')))


def test_averages_cannot_be_resumed_without_their_hook(tiny, tmp_path):
    tiny.train(tmp_path, 2, {'custom_hooks': [dict(type='EMAHook')]})
    with pytest.raises(UserError, match='custom_hooks has no EMAHook') as caught:
        tiny.prepare(tmp_path, 4, resume='auto')
    assert str(caught.value).startswith(f'{tmp_path}/iter_2.pth')
    tiny.prepare(tmp_path, 4, {'custom_hooks': [dict(type='EMAHook')]}, resume='auto')


def test_a_best_checkpoint_counts_as_none_of_those_to_keep(tiny, tmp_path):
    """mmengine writes the last checkpoint again after a better one."""
    keep = {'save_best': 'aAcc', 'rule': 'greater', 'max_keep_ckpts': 2}
    run(tiny.config, tiny, tmp_path, 4, 2, {f'default_hooks.checkpoint.{key}': value for key, value in keep.items()})
    assert sorted(p.name for p in tmp_path.glob('iter_*.pth')) == ['iter_2.pth', 'iter_4.pth']
    assert len(list(tmp_path.glob('best_*.pth'))) == 1


class OwnEMAHook(EMAHook):
    pass


@pytest.mark.parametrize(
    ('hooks', 'fits'),
    [
        ([], False),
        ([dict(type='NumClassCheckHook'), dict(type='CheckpointHook')], False),
        ([dict(type='CheckpointHook'), dict(type='EMAHook', momentum=0.1)], True),
        ([dict(type='mmengine.EMAHook')], True),
        ([dict(type=OwnEMAHook)], True),
    ],
)
def test_hooks_that_average(hooks, fits):
    with nullcontext() if fits else pytest.raises(UserError, match='EMAHook'):
        resuming._check_averages(Config(dict(custom_hooks=hooks)), {'ema_state_dict': {}}, 'x.pth')
    resuming._check_averages(Config(dict(custom_hooks=hooks)), {}, 'x.pth')


def test_the_best_checkpoint_of_another_folder_stays(tiny, tmp_path):
    best = {'default_hooks.checkpoint.save_best': 'aAcc', 'default_hooks.checkpoint.rule': 'less'}
    best['param_scheduler'] = None
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
    constant: dict = {'param_scheduler': None}
    last = tiny.train(tmp_path / 'w', 2, constant, seed=3)
    straight = tiny.train(tmp_path / 'w', 4, constant, resume='auto')
    content = read_checkpoint(last)
    hub = content['message_hub']
    hub['log_scalars'] = OrderedDict((key, restore_log_buffer(value)) for key, value in hub['log_scalars'].items())
    hub['runtime_info']['best_score'] = np.float64(0.5)
    hub['resumed_keys']['best_score'] = True
    torch.save(content, tmp_path / 'old.pth')
    resumed = tiny.train(tmp_path / 'x', 4, constant, resume=str(tmp_path / 'old.pth'))
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
