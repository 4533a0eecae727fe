"""Frozen backbones: nothing in them changes, whatever a training does."""

import copy

import pytest
import torch
import torch.nn as nn
from mmengine.optim import build_optim_wrapper
from resume_cases import RANDOM, config_with_signals, differences, run
from tiny import tiny  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.engine.config import build_model
from replk_mm.engine.freezing import freeze_backbone
from replk_mm.engine.runner import Runner
from replk_mm.errors import Stopped, UserError

FROZEN = {'freeze_backbone': True}
PARTS = ('backbone.', 'decode_head.')


class Noisy(nn.Module):
    """BatchNorm whose statistics drift, and noise, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(x)

    def train(self, mode=True):  # as mmdet's backbones, which return None
        super().train(mode)


def test_train_does_not_undo_it():
    torch.manual_seed(0)
    net, x = Noisy(), torch.randn(2, 3, 5, 5)
    net.layers[1].running_mean.normal_()
    net.eval()
    expected, state = net(x), copy.deepcopy(net.state_dict())
    model = nn.Module()
    model.backbone, model.head = net, nn.Conv2d(4, 2, 1)
    freeze_backbone(model)
    for changed in (model, copy.deepcopy(model)):  # a copy, as of averaged weights, stays frozen too
        assert changed.train() is changed and changed.head.training
        assert not any(module.training for module in changed.backbone.modules())
        found = changed.backbone(x)
        assert torch.equal(found, expected) and not found.requires_grad
        changed.head(found).sum().backward()
        assert all(p.grad is None for p in changed.backbone.parameters()) and changed.head.weight.grad is not None
        assert all(torch.equal(value, state[key]) for key, value in changed.backbone.state_dict().items())
    assert changed.backbone.layers[1].running_mean is not net.layers[1].running_mean
    assert isinstance(net, Noisy) and type(net).__name__ == 'Noisy'


def test_what_has_no_backbone_is_rejected():
    with pytest.raises(UserError, match='freeze_backbone: Linear has no backbone'):
        freeze_backbone(nn.Linear(1, 1))


@pytest.mark.parametrize('decay', [False, True])
def test_the_optimizer_has_no_parameters_of_the_backbone(tiny, decay):  # noqa: F811
    cfg = tiny.cfg()
    if decay:
        cfg.optim_wrapper.constructor = 'replk_mm.LayerDecayOptimizerConstructor'
        cfg.optim_wrapper.paramwise_cfg = dict(decay_rate=0.9)
    model = build_model(cfg)
    freeze_backbone(model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p) for group in groups for p in group['params']}
    assert found == {id(p) for name, p in model.named_parameters() if not name.startswith('backbone.')}


def test_only_trainings_freeze(tiny, tmp_path):  # noqa: F811
    cfg, notes = tiny.prepare(tmp_path, options=FROZEN)
    assert any('backbone: frozen' in note for note in notes)
    assert not any(p.requires_grad for p in Runner.from_cfg(cfg).model.backbone.parameters())
    cfg = tiny.cfg(FROZEN)
    for key in [key for key in cfg if key.startswith(('train_', 'val_', 'optim', 'param_'))]:
        cfg.pop(key)  # as for a test
    cfg.work_dir = str(tmp_path / 'test')
    assert all(p.requires_grad for p in Runner.from_cfg(cfg).model.backbone.parameters())


def weights(path, prefix: str) -> dict:
    return {k: v for k, v in read_checkpoint(path)['state_dict'].items() if k.startswith(prefix)}


@pytest.mark.slow
def test_a_training_changes_no_bit_of_the_backbone_and_resumes_exactly(tiny, tmp_path, monkeypatch):  # noqa: F811
    """With drop path, random crops and validations in between, which switch the mode."""
    config = config_with_signals(tmp_path, tiny.config, more=RANDOM + 'freeze_backbone = True\n')
    straight = run(config, tiny, tmp_path / 'straight')
    monkeypatch.setenv('TEST_SIGNAL', 'SIGTERM:train:3')
    with pytest.raises(Stopped) as stopped:
        run(config, tiny, tmp_path / 'stopped')
    (before, head), after = (weights(stopped.value.checkpoint, part) for part in PARTS), weights(straight, PARTS[0])
    resumed = run(config, tiny, tmp_path / 'stopped', resume='auto')  # removes the checkpoint
    assert differences(straight, resumed) == []
    assert before and all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(value, weights(straight, PARTS[1])[key]) for key, value in head.items())


@pytest.mark.slow
def test_a_detector_trains_its_heads_only(detector, tmp_path):  # noqa: F811
    one, other = (detector.train(tmp_path / str(n), n, FROZEN, seed=0) for n in (1, 3))
    before, after = (weights(path, 'backbone.') for path in (one, other))
    assert before and all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(v, weights(other, 'neck.')[k]) for k, v in weights(one, 'neck.').items())


@pytest.mark.extras('timm')
def test_new_layers_around_a_network_of_timm_are_trained():
    from replk_mm.backbones.adapters import TimmBackbone

    model = nn.Module()
    model.backbone = TimmBackbone('vit_tiny_patch16_224', img_size=64)
    freeze_backbone(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith('backbone.neck.') for name in trained)
    assert not model.train().backbone.net.training
