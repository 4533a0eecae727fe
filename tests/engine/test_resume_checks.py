"""Which checkpoints can be resumed, without training: small files by hand."""

import os

import pytest
import torch
from mmengine.config import Config
from torch import nn

from replk_mm.engine.process import RunOptions
from replk_mm.engine.resuming import check_schedules, last_checkpoint, resume
from replk_mm.errors import UserError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def resumed(path, max_iters: int = 9, max_epochs: int | None = None, **changes) -> tuple[Config, list[str]]:
    """Resume from a checkpoint at iteration 5 in epoch 2, with some parts exchanged."""
    meta = dict(iter=5, epoch=2, seed=7)
    content = dict(meta=meta, state_dict=network().state_dict(), optimizer={}, message_hub={}) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    cfg = Config(dict(work_dir=str(path.parent), train_cfg=dict(max_iters=max_iters, max_epochs=max_epochs)))
    notes = resume(cfg, RunOptions(resume=str(path), seed=1), network())
    return cfg, notes


@pytest.mark.parametrize('limits', [dict(max_iters=5), dict(max_iters=6), dict(max_epochs=2), dict(max_epochs=3)])
def test_up_to_the_end(limits, tmp_path):
    """At the end nothing is left to train; validation and the summary still run."""
    cfg, [note] = resumed(tmp_path / 'a.pth', **limits)
    assert cfg.resume and cfg.load_from == str(tmp_path / 'a.pth') and cfg.randomness.seed == 7
    assert 'iteration 5, seed 7 (that of the checkpoint; --seed 1 applies to new runs only)' in note


@pytest.mark.parametrize(
    'limits, named', [(dict(max_iters=4), 'iteration 5, .* ends at 4'), (dict(max_epochs=1), 'epoch 2, .* ends at 1')]
)
def test_past_the_end(limits, named, tmp_path):
    with pytest.raises(UserError, match=f'a.pth: cannot be resumed: it is at {named}\n'):
        resumed(tmp_path / 'a.pth', **limits)


def other_weights(**changes) -> dict:
    weights = network().state_dict() | changes
    return {key: value for key, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    'weights, count, key',
    [
        (other_weights(**{'0.bias': torch.ones(4)}), '1 of 7', '0.bias'),
        (other_weights(**{'1.running_var': None}), '1 of 7', '1.running_var'),
        (other_weights(**{'2.bias': torch.ones(4)}), '1 of 8', '2.bias'),
    ],
    ids=['shape', 'missing', 'more'],
)
def test_weights_of_another_network(weights, count, key, tmp_path):
    with pytest.raises(UserError, match=f'belongs to another network; {count} weights differ, such as {key}'):
        resumed(tmp_path / 'a.pth', state_dict=weights)


@pytest.mark.parametrize('part', ['optimizer', 'state_dict', 'message_hub', 'meta'])
def test_a_part_is_missing(part, tmp_path):
    with pytest.raises(UserError, match='cannot be resumed: it (has no optimizer state|lacks its weights)'):
        resumed(tmp_path / 'a.pth', **{part: None})


def test_schedules_are_paired_by_position():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    schedulers = torch.optim.lr_scheduler
    one, two = schedulers.StepLR(optimizer, 3), schedulers.ExponentialLR(optimizer, 0.9)
    states = [one.state_dict(), two.state_dict()]
    check_schedules([one, two], states)
    check_schedules(None, None)
    check_schedules(dict(a=[one]), None)  # of several optimizers
    for own, stored in (([two, one], states), ([one], states), ([one, two], states[:1]), (None, states), ([one], None)):
        with pytest.raises(ValueError, match=f'has {len(own or ())} schedules, the checkpoint {len(stored or ())}, or'):
            check_schedules(own, stored)


def test_the_latest_of_checkpoints_with_one_time(tmp_path):
    """As after copying: then iterations and epochs decide, as numbers."""
    for name in ('iter_9.pth', 'iter_10.pth', 'best_mIoU_iter_12.pth', 'iter_11.pth.part'):
        (tmp_path / name).touch()
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'iter_10.pth')
