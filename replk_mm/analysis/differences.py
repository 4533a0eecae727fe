"""Whether two networks that are timed against each other compute the same: a speed-up with another result is worth nothing."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from replk_mm.analysis.workload import CLASS_MAP

#: Largest relative difference that rounding explains, by mode and precision of the faster network, the reference in float32.
#: A wrong weight or layer is off by 0.1 and more in the results, and by 1 in its gradient. On the way back rounding decides at
#: every ReLU whose input is nearly zero, so that of a share s of them that flip a difference of sqrt(s) comes: in bfloat16
#: and with few pixels almost half of the gradient.
TOLERANCES = {('inference', 'float32'): 1e-3, ('inference', 'bfloat16'): 0.3,
              ('train', 'float32'): 1e-2, ('train', 'bfloat16'): 0.8}


@dataclass
class Gap:
    """How far a network's results are from the reference's.

    Attributes:
        relative: Worst difference relative to the reference's magnitude; None if nothing of the kind was compared.
        pixels: Share of the pixels of class maps that have another class; None without class maps.
    """

    relative: float | None = None
    pixels: float | None = None

    def within(self, tolerance: float) -> bool:
        """Whether results are equal up to ``tolerance``: finite, and class maps differ in no larger share of pixels."""
        return all(value is None or value <= tolerance for value in (self.relative, self.pixels))  # false for NaN


def gap_of_results(reference: dict[str, Tensor], found: dict[str, Tensor]) -> Gap:
    """Largest difference of each output, relative to the largest magnitude of that output, the worst of all outputs.

    Args:
        reference: Outputs by name, ``'class map'`` among them for segmentors.
        found: The same outputs of the other network.
    """
    gap = Gap()
    for name, expected in reference.items():
        actual = found[name]
        if actual.shape != expected.shape:
            value = math.inf
        elif name == CLASS_MAP:
            value = (actual != expected).double().mean().item()
        else:
            value = _relative((actual.double() - expected.double()).abs().max().item(), expected.double().abs().max().item())
        if name == CLASS_MAP:
            gap.pixels = value
        else:
            gap.relative = value if gap.relative is None else _worse(gap.relative, value)
    return gap


def gap_of_gradients(reference: dict[str, Tensor], found: dict[str, Tensor], together: bool = False) -> Gap:
    """Norm of the difference of each gradient, relative to the norm of that gradient, the worst of all parameters.

    A gradient below a thousandth of the largest is taken relative to that: some are zero but for rounding, such as that of a
    bias before BatchNorm.

    Args:
        reference: The loss and the gradients by the names of the parameters.
        found: The same of the other network.
        together: Take all gradients as one vector: with three digits, those of some parameters cancel to nothing but rounding.
    """
    if reference.keys() != found.keys():
        return Gap(math.inf)
    norms = {name: torch.linalg.vector_norm(value.double()).item() for name, value in reference.items()}
    gaps = {name: torch.linalg.vector_norm(found[name].double() - value.double()).item() for name, value in reference.items()}
    if together:
        return Gap(_relative(math.hypot(*gaps.values()), math.hypot(*norms.values())))
    floor = 1e-3 * max(norms.values())
    worst = 0.
    for name, gap in gaps.items():
        worst = _worse(worst, _relative(gap, max(norms[name], floor)))
    return Gap(worst)


def _relative(difference: float, magnitude: float) -> float:
    return difference / magnitude if magnitude else difference


def _worse(a: float, b: float) -> float:
    return a if a != a or a >= b else b  # NaN is worst
