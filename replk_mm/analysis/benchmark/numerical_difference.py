"""Whether two networks that are timed compute the same: a speed-up with other results is an error."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Name of a segmentor's class maps among its results.
CLASS_MAP = 'class map'
#: Largest relative difference that rounding explains, by mode and precision of the faster network; the reference is in
#: float32. A wrong weight or layer is off by 0.1 and more in the results, by 1 in its gradient. In the backward pass
#: rounding decides at every ReLU whose input is nearly zero: a share s of them that flip gives a difference of sqrt(s),
#: in bfloat16 and with few pixels almost half of the gradient.
TOLERANCES = {
    ('inference', 'float32'): 1e-3,
    ('inference', 'bfloat16'): 0.3,
    ('train', 'float32'): 1e-2,
    ('train', 'bfloat16'): 0.8,
}


@dataclass
class NumericalDifference:
    """How far a network's results are from the reference's."""

    #: worst difference relative to the reference's magnitude; None if nothing of the kind was compared
    relative: float | None = None
    pixels: float | None = None  #: share of the pixels of class maps that have another class; None without class maps

    def within(self, tolerance: float) -> bool:
        """Whether results are finite and equal up to ``tolerance``, which also limits the share of pixels."""
        return all(value is None or value <= tolerance for value in (self.relative, self.pixels))  # false for NaN


def compare_outputs(reference: dict[str, Tensor], found: dict[str, Tensor]) -> NumericalDifference:
    """Largest difference of each output relative to its largest magnitude, the worst of all outputs.

    Args:
        reference: Outputs by name, possibly with :data:`CLASS_MAP`.
        found: The same outputs of the other network.
    """
    gaps, gap = [], NumericalDifference()
    for name, expected in reference.items():
        actual = found[name]
        same_shape = actual.shape == expected.shape
        if name == CLASS_MAP:
            gap.pixels = (actual != expected).double().mean().item() if same_shape else math.inf
        else:
            difference = (actual.double() - expected.double()).abs().max().item() if same_shape else math.inf
            gaps.append(_relative(difference, expected.double().abs().max().item()))
    gap.relative = _worst(gaps) if gaps else None
    return gap


def compare_gradients(
    reference: dict[str, Tensor], found: dict[str, Tensor], together: bool = False
) -> NumericalDifference:
    """Norm of the difference of each gradient relative to the norm of that gradient, the worst of all parameters.

    A gradient below a thousandth of the largest is taken relative to that: some are zero except for rounding, such as
    that of a bias before BatchNorm.

    Args:
        reference: The loss and the gradients by the names of the parameters.
        found: The same of the other network.
        together: Take all gradients as one vector: in bfloat16 those of some parameters cancel to rounding errors.
    """
    if reference.keys() != found.keys():
        return NumericalDifference(math.inf)
    norms = {name: torch.linalg.vector_norm(value.double()).item() for name, value in reference.items()}
    gaps = {
        name: torch.linalg.vector_norm(found[name].double() - value.double()).item()
        for name, value in reference.items()
    }
    if together:
        return NumericalDifference(_relative(math.hypot(*gaps.values()), math.hypot(*norms.values())))
    floor = 1e-3 * max(norms.values())
    return NumericalDifference(_worst([_relative(gap, max(norms[name], floor)) for name, gap in gaps.items()]))


def _relative(difference: float, magnitude: float) -> float:
    return difference / magnitude if magnitude else difference


def _worst(gaps: list[float]) -> float:
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)
