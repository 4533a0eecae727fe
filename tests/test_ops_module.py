"""The module of the depthwise convolution is torch's with other arithmetic: weights, copies, training."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
from ops_cases import SPECS, assert_close

from replk_mm.ops import DepthwiseConv2d
from replk_mm.ops import implementation as forced

# Maps as small as these are not worth two threads.
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('arguments', [dict(), dict(bias=False), dict(stride=2), dict(dilation=(2, 1)), dict(padding=0)])
@pytest.mark.parametrize('kernel', [13, (5, 8)])
def test_module_is_torchs_with_other_arithmetic(kernel, arguments):
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dilation = arguments.get('dilation', (1, 1))
    torch.manual_seed(3)
    mine = DepthwiseConv2d(6, kernel, **arguments)
    torch.manual_seed(3)
    plain = nn.Conv2d(6, 6, kernel, groups=6, **{
        'padding': tuple(k // 2 * d for k, d in zip(sides, dilation, strict=True)), **arguments})
    assert isinstance(mine, nn.Conv2d) and mine.padding == plain.padding
    state, expected = mine.state_dict(), plain.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in state)
    torch.nn.init.normal_(plain.weight)
    mine.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 17, 16)
    with torch.no_grad():
        assert_close([mine(x)], [plain.double()(x.double())], 1e-5)
    plain.load_state_dict(mine.state_dict())


def test_copies_of_a_module(tmp_path):
    conv, x = DepthwiseConv2d(4, 9, stride=2, implementation='fft'), torch.randn(2, 4, 20, 20)
    torch.save(conv, tmp_path / 'conv.pth')
    conv(x).sum().backward()
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(tmp_path / 'conv.pth', weights_only=False)):
        assert torch.equal(twin(x), conv(x)) and twin.implementation == 'fft' and twin.stride == (2, 2)


def test_training_takes_the_same_way_whatever_is_forced():
    """Ten steps of an optimizer, in float64, where rounding stays small."""
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    target = torch.randn_like(x)

    def losses(conv, spec):
        torch.manual_seed(1)
        conv.reset_parameters()
        conv.double()
        optimizer, found = torch.optim.SGD(conv.parameters(), lr=.3, momentum=.9), []
        with forced(spec):
            for _ in range(10):
                loss = (conv(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    expected = losses(nn.Conv2d(3, 3, 7, padding=3, groups=3), None)
    assert expected[-1] < expected[0] and not math.isnan(expected[-1])
    for spec in SPECS:
        assert losses(DepthwiseConv2d(3, 7), spec) == pytest.approx(expected, rel=1e-10), spec
