"""Check that two networks compute the same outputs, in float64 and float32."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Relative tolerance of each precision. A wrong fold differs by 1e-2 or more. In float64 the remaining difference is
#: the rounding of the merged weights to float32; in float32 it also includes the rounding of every layer.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass
class NetworkDifference:
    """Largest difference between the outputs of two networks in one precision."""

    dtype: torch.dtype  #: precision of both networks
    absolute: float  #: largest absolute difference
    relative: float  #: largest difference relative to the largest magnitude of the same output
    tolerance: float  #: upper limit for ``relative``
    #: BatchNorm layers that did not run, so that no output depends on them
    not_compared: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the outputs are finite and equal within the tolerance."""
        return self.relative <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        skipped = ''
        if self.not_compared:
            names = ', '.join(self.not_compared[:4])
            skipped = f'; not compared, because they did not run: {len(self.not_compared)} BatchNorm layers ({names})'
        return (
            f'{str(self.dtype).removeprefix("torch.")}: max absolute difference {self.absolute:.3e}, relative '
            f'{self.relative:.3e} (tolerance {self.tolerance:.0e}) {"equal" if self.ok else "DIFFERENT"}{skipped}'
        )


def compare_networks(
    before: nn.Module,
    after: nn.Module,
    shape: tuple[int, ...] = (1, 3, 64, 64),
    seed: int = 0,
    outputs: Callable[[nn.Module, Tensor], object] | None = None,
) -> list[NetworkDifference]:
    """Run two networks in evaluation mode on the same random input and compare their outputs.

    Args:
        before: The reference network. Both networks are copied, not changed.
        after: The network to check.
        shape: Shape of the input, ``(N, C, H, W)``.
        seed: Seed of the standard normal input.
        outputs: Function of a network and an input that returns a nest of tensors to compare. Defaults to
            :func:`network_outputs`.

    Returns:
        One difference for each precision in :data:`TOLERANCES`.

    Raises:
        ValueError: If the networks have no output tensors.
    """
    outputs = outputs or network_outputs
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    differences = []
    for dtype, tolerance in TOLERANCES.items():
        results: list[list[Tensor]] = []
        ran: set[str] = set()
        for model in (before, after):
            model = copy.deepcopy(model).cpu().to(dtype)
            model.eval()  # mmdet's and mmseg's backbones return None
            if not results:
                for name, norm in named_batch_norms(model):
                    norm.register_forward_hook(lambda *_, name=name, ran=ran: ran.add(name))
            with torch.no_grad():
                leaves = tree_leaves(outputs(model, image.to(dtype)))
            results.append([leaf for leaf in leaves if isinstance(leaf, Tensor)])
            del model
        if not results[0]:
            raise ValueError(f'{type(before).__name__}: no output tensors to compare')
        same_shapes = [a.shape for a in results[0]] == [b.shape for b in results[1]]
        absolute = relative = 0.0 if same_shapes else math.inf
        for a, b in zip(*results, strict=True) if same_shapes else ():
            gap = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            scale = a.double().abs().max().item() if a.numel() else 1.0
            absolute = float(np.maximum(absolute, gap))  # NaN, if one of them is
            relative = float(np.maximum(relative, gap / scale if scale else gap))
        not_compared = [name for name, _ in named_batch_norms(before) if name not in ran]
        differences.append(NetworkDifference(dtype, absolute, relative, tolerance, not_compared))
    return differences


def named_batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of every BatchNorm layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))


def network_outputs(model: Any, image: Tensor) -> list:
    """Compute the features, the outputs of dense heads and those of RoI heads, without selecting boxes.

    The last bit of a score can change which boxes a detector proposes. RoI heads therefore get random features of the
    shape that they expect.

    Args:
        model: A segmentor, detector, classifier or backbone.
        image: ``(N, C, H, W)``.

    Returns:
        A nest of tensors.
    """
    if not hasattr(model, 'extract_feat'):
        return [model(image)]
    features = model.extract_feat(image)
    outputs = [features]
    for name in ('decode_head', 'auxiliary_head', 'rpn_head', 'bbox_head', 'mask_head', 'head'):
        head = getattr(model, name, None)
        heads = list(head) if isinstance(head, nn.ModuleList) else [head] if isinstance(head, nn.Module) else []
        for i, part in enumerate(heads):
            if name == 'decode_head' and i:  # later heads of a cascade also take the previous head's output
                outputs.append(part(features, outputs[-1]))
            elif _takes_one_argument(part):
                outputs.append(part(features))
    roi_head = getattr(model, 'roi_head', None)
    if isinstance(roi_head, nn.Module):
        parts: list[Any] = list(roi_head.modules())
        for part in parts:
            kind = type(part).__name__
            if hasattr(part, 'roi_feat_size') and ('BBoxHead' in kind or 'MaskHead' in kind):
                if not _takes_one_argument(part):
                    continue
                size = part.roi_feat_size if isinstance(part.roi_feat_size, tuple) else (part.roi_feat_size,) * 2
                generator = torch.Generator().manual_seed(1)
                outputs.append(part(torch.randn(4, part.in_channels, *size, generator=generator).to(image)))
    return outputs


def _takes_one_argument(head: nn.Module) -> bool:
    parameters = inspect.signature(head.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1
