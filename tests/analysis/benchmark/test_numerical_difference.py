"""Differences between results and between gradients: known ones."""

import math

import pytest
import torch

from replk_mm.analysis.benchmark.numerical_difference import (
    CLASS_MAP,
    NumericalDifference,
    compare_gradients,
    compare_outputs,
)


def test_gap_of_results() -> None:
    reference = {'a': torch.tensor([1.0, -4.0]), 'b': torch.tensor([0.1]), CLASS_MAP: torch.tensor([[1, 2], [3, 3]])}
    found = {'a': torch.tensor([1.4, -4.0]), 'b': torch.tensor([0.12]), CLASS_MAP: torch.tensor([[1, 2], [3, 4]])}
    gap = compare_outputs(reference, found)
    assert (gap.relative, gap.pixels) == pytest.approx((0.2, 0.25))
    assert gap.within(0.25) and not gap.within(0.24)


@pytest.mark.parametrize('wrong', [torch.tensor([math.nan, 1.0]), torch.ones(3), torch.ones(1)])
def test_non_finite_values_and_other_shapes_differ(wrong) -> None:
    for found in ({'a': wrong, 'b': torch.ones(2)}, {'a': torch.ones(2), 'b': wrong}):
        assert not compare_outputs({'a': torch.ones(2), 'b': torch.ones(2)}, found).within(1e3)


def test_gap_of_gradients_ignores_the_noise_of_a_zero_gradient() -> None:
    reference = {'loss': torch.tensor(1.0), 'w': torch.tensor([3.0, 4.0]), 'zero': torch.tensor([1e-9])}
    assert compare_gradients(reference, {**reference, 'zero': torch.tensor([-1e-9])}).relative < 1e-5
    assert compare_gradients(reference, {**reference, 'w': torch.tensor([3.0, 4.5])}).relative == pytest.approx(0.1)
    other = {**reference, 'w': torch.tensor([3.0, 4.5]), 'zero': torch.tensor([1.0])}
    assert compare_gradients(reference, other).relative == pytest.approx(200)
    assert compare_gradients(reference, other, True).relative == pytest.approx(math.sqrt(1.25 / 26))
    assert not compare_gradients(reference, {'loss': torch.tensor(1.0)}).within(1)


def test_gap_without_anything_compared_is_no_verdict() -> None:
    assert NumericalDifference().within(0.0)
