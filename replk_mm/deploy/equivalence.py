"""Prove that two networks compute the same: every output on random input, in float64 and float32."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor


@dataclass
class Difference:
    """Largest difference between two networks' outputs.

    Attributes:
        dtype: Precision both ran in.
        absolute: Largest absolute difference.
        relative: Largest over all outputs of (largest difference / largest magnitude of that output).
        tolerance: What ``relative`` may be.
        unproven: BatchNorm layers that no output depended on, because the comparison cannot run their part of the
            network.
    """

    dtype: torch.dtype
    absolute: float
    relative: float
    tolerance: float
    unproven: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the outputs are finite and equal within the tolerance."""
        return self.relative <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        unproven = (
            f'; not compared, because these layers did not run: {len(self.unproven)} BatchNorm '
            f'({", ".join(self.unproven[:4])})'
            if self.unproven
            else ''
        )
        return (
            f'{str(self.dtype).removeprefix("torch.")}: max absolute difference {self.absolute:.3e}, relative '
            f'{self.relative:.3e} (tolerance {self.tolerance:.0e}) {"equal" if self.ok else "DIFFERENT"}{unproven}'
        )


#: Relative tolerance of each precision. A wrong fold is off by 1e-2 and more. In float64 what is left is the rounding
#: of the merged weights to float32, in which they are stored; in float32 also that of every layer.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}


def compare(
    before: nn.Module,
    after: nn.Module,
    shape: tuple[int, ...] = (1, 3, 64, 64),
    seed: int = 0,
    outputs: Callable[[nn.Module, Tensor], object] | None = None,
) -> list[Difference]:
    """Run two networks on one random input in float64 and float32, in evaluation mode.

    Args:
        before: The reference. Both networks are copied, not changed.
        after: What is held against it.
        shape: Of the input, ``(N, C, H, W)``.
        seed: Of the standard normal input.
        outputs: What to compare; a network and an input to any nest of tensors. Defaults to
            :func:`network_outputs`.

    Returns:
        A difference for each precision.

    Raises:
        ValueError: If the networks have no outputs that could be compared.
    """
    outputs = outputs or network_outputs
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for dtype, tolerance in TOLERANCES.items():
        results: list[list[Tensor]] = []
        ran: set[str] = set()
        for model in (before, after):
            model = copy.deepcopy(model).cpu().eval().to(dtype)
            if not results:
                for name, norm in batch_norms(model):
                    norm.register_forward_hook(lambda *_, name=name, ran=ran: ran.add(name))
            with torch.no_grad():
                results.append(list(_tensors(outputs(model, image.to(dtype)))))
            del model
        if not results[0]:
            raise ValueError(f'{type(before).__name__}: no output tensors that could be compared')
        absolute = relative = 0.0 if [a.shape for a in results[0]] == [b.shape for b in results[1]] else math.inf
        for a, b in zip(*results, strict=False) if not absolute else ():
            gap = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            scale = a.double().abs().max().item() if a.numel() else 1.0
            absolute = _worse(absolute, gap)
            relative = _worse(relative, gap / scale if scale else gap)
        unproven = [name for name, _ in batch_norms(before) if name not in ran]
        found.append(Difference(dtype, absolute, relative, tolerance, unproven))
    return found


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))


def _worse(a: float, b: float) -> float:
    return a if a != a or a >= b else b  # NaN is worst


def network_outputs(model: Any, image: Tensor, boxes: int = 4, masks: int = 4) -> list:
    """Everything a network computes from an image without choosing boxes: features, dense head outputs, RoI heads.

    Which boxes a detector proposes flips with the last bit, so RoI heads get random features of their own shape.

    Args:
        model: A segmentor, detector or backbone.
        image: ``(N, 3, H, W)``.
        boxes: Regions that each box head sees.
        masks: Regions that each mask head sees.
    """
    if not hasattr(model, 'extract_feat'):
        return [model(image)]
    features = model.extract_feat(image)
    found = [features]
    for name in ('decode_head', 'auxiliary_head', 'rpn_head', 'bbox_head', 'mask_head'):
        head = getattr(model, name, None)
        heads = list(head) if isinstance(head, nn.ModuleList) else [head] if isinstance(head, nn.Module) else []
        for i, part in enumerate(heads):
            if name == 'decode_head' and i:  # the later heads of a cascade take the former one's output too
                found.append(part(features, found[-1]))
            elif _takes_one(part):
                found.append(part(features))
    roi_head = getattr(model, 'roi_head', None)
    if isinstance(roi_head, nn.Module):
        parts: list[Any] = list(roi_head.modules())
        for part in parts:
            kind = type(part).__name__
            if hasattr(part, 'roi_feat_size') and ('BBoxHead' in kind or 'MaskHead' in kind) and _takes_one(part):
                size = part.roi_feat_size if isinstance(part.roi_feat_size, tuple) else (part.roi_feat_size,) * 2
                generator = torch.Generator().manual_seed(1)
                number = masks if 'MaskHead' in kind else boxes
                found.append(part(torch.randn(number, part.in_channels, *size, generator=generator).to(image)))
    return found


def _takes_one(head: nn.Module) -> bool:
    """Whether features are all that a head's forward pass needs."""
    parameters = inspect.signature(head.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1


def _tensors(nest: object) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, dict):
        for value in nest.values():
            yield from _tensors(value)
    elif isinstance(nest, (list, tuple)):
        for value in nest:
            yield from _tensors(value)
