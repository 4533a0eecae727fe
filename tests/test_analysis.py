"""Complexity against closed forms; timing against a clock that is known."""
import time

import pytest
import torch
import torch.nn as nn

from replk_mm.analysis import complexity
from replk_mm.analysis.speed import interleaved
from replk_mm.models import RepLKNet
from replk_mm.reparam import reparameterize


def test_macs_of_a_convolution_and_a_linear_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 8, 5, padding=2, groups=8),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    assert complexity.macs(net, (32, 48)) == 16 * 24 * (8 * 3 * 9 + 8 * 25) + 8 * 10
    assert complexity.parameters(net) == (3 * 8 * 9 + 8) + 2 * 8 + (8 * 25 + 8) + (8 * 10 + 10)


def test_macs_leave_the_model_where_it_was() -> None:
    net = nn.Conv2d(3, 4, 1)
    before = net.weight.detach().clone()
    complexity.macs(net, (8, 8))
    assert net.training and torch.equal(net.weight, before)


def test_merging_saves_the_parallel_kernels_and_every_norm() -> None:
    arch = dict(large_kernel_sizes=[9, 7], small_kernel=3, layers=[1, 2], channels=[8, 16], dw_ratio=1)
    net = RepLKNet(arch, out_indices=(0, 1))
    merged = reparameterize(net)[0]
    # Small kernels of 3x3 on maps of 1/4 and 1/8; norms cost no multiply-accumulates that are counted.
    saved = 9 * (8 * 16 * 16 + 2 * 16 * 8 * 8)
    assert complexity.macs(net, (64, 64)) - complexity.macs(merged, (64, 64)) == saved
    norms = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    # Every convolution gets a bias; the merged one has one instead of the two that its branches would.
    biases = sum(m.out_channels for m in merged.modules() if isinstance(m, nn.Conv2d))
    small = 9 * (8 + 2 * 16)
    assert complexity.parameters(net) - complexity.parameters(merged) == norms + small - biases


def test_auxiliary_heads_do_not_infer() -> None:
    net = nn.Module()
    net.decode_head, net.auxiliary_head = nn.Linear(2, 3), nn.Linear(2, 50)
    assert complexity.inference_parameters(net) == 9


@pytest.mark.parametrize('repeats', [2, 5])
def test_interleaved_runs_in_turns_and_leaves_the_warmup_out(repeats: int) -> None:
    order = []
    found = interleaved({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, repeats=repeats, warmup=1)
    assert order == ['a', 'b'] * (repeats + 1)
    assert found.keys() == {'a', 'b'} and all(t.low <= t.median <= t.high for t in found.values())


def test_interleaved_is_in_milliseconds() -> None:
    found = interleaved({'sleep': lambda: time.sleep(0.02)}, repeats=3, warmup=0)
    assert found['sleep'].low >= 20
