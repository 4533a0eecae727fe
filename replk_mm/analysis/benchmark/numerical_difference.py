"""Numerical difference between the outputs or gradients of a measured network and those of the baseline."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Name of a segmentor's class maps among its outputs.
CLASS_MAP = 'class map'
#: Largest relative difference that rounding explains, by mode and precision; the baseline is in float32. A wrong
#: weight or layer changes outputs by 0.1 and more, and its own gradient by 1. In the backward pass rounding decides at
#: each ReLU whose input is near zero. If a share s of them flips, gradients differ by sqrt(s): in bfloat16 and with few
#: pixels by almost half of the gradient. TF32 and float16 round to 11 bits, bfloat16 to 8: their differences are an
#: eighth, and in the backward pass the square root of an eighth of that.
TOLERANCES = {
    ('inference', 'float32'): 1e-3,
    ('inference', 'bfloat16'): 0.3,
    ('inference', 'tf32'): 0.04,
    ('inference', 'float16'): 0.04,
    ('inference', 'fp16'): 1e-2,  # of the weights
    ('inference', 'int8'): 0.3,
    ('train', 'float32'): 1e-2,
    ('train', 'bfloat16'): 0.8,
    ('train', 'tf32'): 0.3,
    ('train', 'float16'): 0.3,
}


@dataclass
class NumericalDifference:
    """Difference between two networks."""

    #: largest difference relative to the magnitude in the baseline; None if no tensors were compared
    relative: float | None = None
    pixels: float | None = None  #: share of the pixels whose class differs; None without class maps

    def within(self, tolerance: float) -> bool:
        """Whether all values are finite and at most ``tolerance``, which also limits the share of pixels."""
        return all(value is None or value <= tolerance for value in (self.relative, self.pixels))  # false for NaN


def compare_outputs(reference: dict[str, Tensor], outputs: dict[str, Tensor]) -> NumericalDifference:
    """Largest difference of each output relative to its largest magnitude; the maximum over all outputs.

    Args:
        reference: Outputs of the baseline by name, with or without :data:`CLASS_MAP`.
        outputs: The same outputs of the other network.
    """
    relative, result = [], NumericalDifference()
    for name, expected in reference.items():
        actual = outputs[name]
        same_shape = actual.shape == expected.shape
        if name == CLASS_MAP:
            result.pixels = (actual != expected).double().mean().item() if same_shape else math.inf
        else:
            largest = (actual.double() - expected.double()).abs().max().item() if same_shape else math.inf
            relative.append(_ratio(largest, expected.double().abs().max().item()))
    result.relative = float(np.max(relative)) if relative else None  # NaN, if there is one
    return result


def compare_gradients(
    reference: dict[str, Tensor], gradients: dict[str, Tensor], as_one_vector: bool = False
) -> NumericalDifference:
    """Norm of the difference of each gradient relative to its norm; the maximum over all parameters.

    Differences of gradients below a thousandth of the largest are relative to that thousandth: some are zero except
    for rounding, such as that of a bias before BatchNorm.

    Args:
        reference: Loss and gradients of the baseline, by name of the parameter.
        gradients: The same of the other network.
        as_one_vector: Whether to compare all gradients as one vector. In bfloat16 the gradients of some parameters
            cancel to rounding errors.
    """
    if reference.keys() != gradients.keys():
        return NumericalDifference(math.inf)
    norms = {name: torch.linalg.vector_norm(value.double()).item() for name, value in reference.items()}
    differences = {
        name: torch.linalg.vector_norm(gradients[name].double() - value.double()).item()
        for name, value in reference.items()
    }
    if as_one_vector:
        return NumericalDifference(_ratio(math.hypot(*differences.values()), math.hypot(*norms.values())))
    floor = 1e-3 * max(norms.values())
    ratios = [_ratio(value, max(norms[name], floor)) for name, value in differences.items()]
    return NumericalDifference(float(np.max(ratios)))


def _ratio(difference: float, magnitude: float) -> float:
    return difference / magnitude if magnitude else difference
