"""Hooks that need no whole training."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from replk_mm.backbones import SLaK
from replk_mm.engine import hooks
from replk_mm.engine.hooks import SparsityHook
from replk_mm.errors import UserError


def test_zeros_stay_zero():
    """Where the loaded weights were zero, and nowhere else, although the optimizer changes them."""
    torch.manual_seed(0)
    model, hook = nn.Module(), SparsityHook()
    arch = dict(depths=[1, 1], channels=[4, 8])
    model.backbone = SLaK(arch, 5, 3, layer_scale_init_value=1.0, out_indices=(0, 1)).train()
    weights = {n: p for n, p in model.backbone.named_parameters() if p.dim() in (2, 4)}
    assert 'stages.0.0.large_kernel.LoRA1.conv.weight' in weights and 'stages.1.0.pwconv2.weight' in weights
    runner = SimpleNamespace(model=model)
    with pytest.raises(UserError, match='no weight of the backbone is zero'):
        hook.before_train(runner)
    masks = {n: (torch.rand_like(p) > 0.4).float() for n, p in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    model.backbone.norm1.bias.data.zero_()  # not a weight of a layer
    hook.before_train(runner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for i in range(3):
        optimizer.zero_grad()
        sum(out.square().mean() for out in model.backbone(torch.randn(2, 3, 16, 16))).backward()
        optimizer.step()
        assert any((weight[masks[name] == 0] != 0).any() for name, weight in weights.items()), 'it changes them'
        hook.after_train_iter(runner, i)
        for name, weight in weights.items():
            assert torch.equal(weight != 0, masks[name] != 0), name
    assert (model.backbone.norm1.bias != 0).all()


@pytest.mark.parametrize('mode', ['val', 'test'])
def test_progress_counts_the_time_after_the_first_batch(mode, monkeypatch, capsys):
    times = iter([0.0, 100.0, 120.0, 121.0, 140.0])  # the first batch takes 100 s, the others 20
    monkeypatch.setattr(hooks, 'time', SimpleNamespace(monotonic=lambda: next(times)))
    hook, runner = hooks.ProgressHook(), SimpleNamespace(val_dataloader=range(4), test_dataloader=range(31))
    getattr(hook, f'before_{mode}_epoch')(runner)
    for batch in range(4):
        getattr(hook, f'after_{mode}_iter')(runner, batch, None, None)
    name, total, left = ('validation', 4, '40 s') if mode == 'val' else ('test', 31, '9 min 40 s')
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f'{name}: 2 of {total} batches, about {left} left'
    assert len(others) == 1 and others[0].startswith(f'{name}: 4 of {total}')  # not the third: a second later
