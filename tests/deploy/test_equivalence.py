"""The proof that two networks are equal notices when they are not."""

import copy
import math

import pytest
import torch
from reparam_cases import backbone
from torch import nn

from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import reparameterize


@pytest.mark.parametrize('corrupt', ['bias', 'weight', 'shift', 'nan', 'inf'])
def test_wrong_fold_is_noticed(corrupt):
    model = backbone().eval()
    after, _ = reparameterize(model)
    large = after.stages[2].blocks[2].large_kernel.lkb_reparam
    with torch.no_grad():
        if corrupt == 'bias':
            large.bias[3] += 0.05 * large.bias.abs().max()
        elif corrupt == 'weight':
            large.weight[5, 0, 4, 4] *= -1
        elif corrupt == 'shift':  # the small kernel one pixel off centre
            large.weight.copy_(large.weight.roll(1, -1))
        else:
            large.bias[0] = math.nan if corrupt == 'nan' else math.inf
    found = compare_networks(model, after)
    assert not any(d.ok for d in found)
    assert all('DIFFERENT' in str(d) for d in found)
    assert not any(d.ok for d in compare_networks(after, model))


def test_same_nan_is_no_equality():
    model = backbone()
    with torch.no_grad():
        model.stem[0].bn.bias[0] = math.nan
    assert not any(d.ok for d in compare_networks(model, copy.deepcopy(model)))


class Constant(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def forward(self, x):
        return [torch.tensor([value, 0.0], dtype=x.dtype) for value in self.values]


@pytest.mark.parametrize('before, after, relative', [(1000, 1000.25, 2.5e-4), (-0.5, -0.25, 0.5), (0, 0.125, 0.125)])
def test_differences_are_relative_to_the_largest_value_of_their_output(before, after, relative):
    for found in compare_networks(Constant(1e9, before), Constant(1e9, after)):
        assert (found.absolute, found.relative) == pytest.approx((abs(after - before), relative), rel=1e-6)


class Outputs(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, x):
        return [torch.ones(s, dtype=x.dtype) for s in self.shapes]


def test_other_outputs_are_different():
    assert all(d.ok for d in compare_networks(Outputs((1, 2), (3,)), Outputs((1, 2), (3,))))
    for other in (Outputs((1, 2)), Outputs((1, 2), (1,)), Outputs((1, 2), (3,), (3,)), Outputs()):
        assert not any(d.ok for d in compare_networks(Outputs((1, 2), (3,)), other))
    with pytest.raises(ValueError, match='no output'):
        compare_networks(Outputs(), Outputs())


def test_networks_are_not_changed_by_comparing():
    model = backbone().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compare_networks(model, model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
