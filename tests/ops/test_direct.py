"""Direct depthwise convolution: the forms in which torch's own convolutions are fast and accurate."""

import pytest
import torch

from replk_mm.ops.cpu import direct
from replk_mm.ops.cpu.problem import DepthwiseProblem


def problem(shape, side: int, padding: int, dtype=torch.float32, height: int | None = None) -> DepthwiseProblem:
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    height = height or side
    paddings = (padding if height == side else height // 2, padding)
    return DepthwiseProblem.of(x, torch.empty(shape[1], 1, height, side), (1, 1), paddings, (1, 1))


@pytest.mark.parametrize('side', [1, 5])
def test_fast_input_gradients_of_full_convolutions(side):
    """The gradient of a convolution with the largest padding is one without padding."""
    assert direct.input_gradient_problem(problem((2, 4, 12, 12), side, side - 1)).padding == (0, 0)


@pytest.fixture
def avx512(monkeypatch) -> None:
    """The limits of oneDNN's kernels with AVX-512, on any CPU."""
    monkeypatch.setattr(direct, 'PADDING_LIMIT', 6)
    monkeypatch.setattr(direct, '_WIDENED', range(12, 15))


@pytest.mark.usefixtures('avx512')
@pytest.mark.parametrize('side, fast', [(11, 11), (12, 14), (13, 15), (15, 15)])
def test_kernels_are_widened_to_the_fast_ones(side, fast):
    """oneDNN's better kernel for channels-last memory starts at a padding of 7."""
    weight, padding = direct.widen(torch.ones(3, 1, side, side), problem((2, 3, 20, 20), side, side // 2))
    assert weight.shape[2:] == (fast, fast) and weight.sum() == 3 * side**2
    assert padding == ((side // 2 + (fast - side) // 2),) * 2 and (fast == side or min(padding) == 7)


@pytest.mark.usefixtures('avx512')
@pytest.mark.parametrize('height, width, fast', [(5, 13, 15), (51, 13, 15), (13, 5, 5), (5, 11, 11), (5, 51, 51)])
def test_strips_are_widened_by_their_width(height, width, fast):
    given = problem((2, 3, 60, 60), width, width // 2, height=height)
    weight, padding = direct.widen(torch.ones(3, 1, height, width), given)
    assert weight.shape[2:] == (height, fast) and weight.sum() == 3 * height * width
    assert padding == (height // 2, fast // 2)


def test_weight_gradients_of_many_images_are_summed_in_float32():
    """bfloat16 cannot add 16 to 4096."""
    ones = torch.ones(300, 24, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    given = problem(ones.shape, 1, 0, torch.bfloat16)
    assert (direct.grad_kernel_channels_last(ones, ones, given) == 300 * 16).all()
