"""Structural reparameterization: merge parallel kernels and fold BatchNorm into convolutions.

"RepVGG: Making VGG-style ConvNets Great Again", Ding et al., CVPR 2021, arXiv:2101.03697, section 3.3, applied as in
the RepLKNet paper (arXiv:2203.06717, guideline 3). In evaluation mode BatchNorm is an affine map of each channel, so

* after a convolution, it scales the kernel's output channels and shifts its bias;
* before a convolution without padding, it scales the kernel's input channels. With padding it stays, because the zeros
  around the map would need another value;
* two parallel convolutions of the same input are one convolution, with the small kernel at the centre of the large one.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from replk_mm.backbones.layers import Backbone
from replk_mm.backbones.replknet import ConvFFN, ConvNorm, ReparamLargeKernelConv, RepLKBlock
from replk_mm.backbones.sync_norm import SyncBatchNorm
from replk_mm.checkpoints.key_formats import FOLDED
from replk_mm.deploy.equivalence import named_batch_norms
from replk_mm.ops import DepthwiseConv2d

# Subclasses may use their weight in another way (weight standardization, deformable sampling). torch also creates a
# subclass for a convolution with a parametrized weight.
_PLAIN_CONVOLUTIONS = {
    'torch.nn.modules.conv.Conv1d',
    'torch.nn.modules.conv.Conv2d',
    'torch.nn.modules.conv.Conv3d',
    'mmcv.cnn.bricks.wrappers.Conv2d',
    'mmcv.cnn.bricks.wrappers.Conv3d',
    'replk_mm.ops.depthwise.DepthwiseConv2d',
}
# The forward methods that are an affine map in evaluation mode; a subclass may override them.
_PLAIN_NORMS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)


@dataclass
class Changes:
    """Changes made by :func:`reparameterize`, as module paths.

    Attributes:
        merged: Parallel branches that became one convolution.
        folded: BatchNorm layers folded into a convolution.
        left: BatchNorm layers that no convolution can absorb exactly.
    """

    merged: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = ', '.join(self.left[:4])
        left = f', {len(self.left)} kept, which no convolution can absorb exactly ({names})' if self.left else ''
        return f'{len(self.merged)} parallel kernels merged, {len(self.folded)} BatchNorm layers folded{left}'


def reparameterize(
    model: nn.Module, merge: bool = True, fold: bool = True, inplace: bool = False
) -> tuple[nn.Module, Changes]:
    """Merge parallel kernels and fold BatchNorm wherever that is exact in evaluation mode.

    Works on any module tree, including whole segmentors and detectors. A second call changes nothing.

    Args:
        model: Any module.
        merge: Merge the parallel kernels of RepLKNet. Defaults to True.
        fold: Fold BatchNorm layers into convolutions. Defaults to True.
        inplace: Change ``model`` itself instead of a copy. Defaults to False.

    Returns:
        The network in evaluation mode, and the list of changes.
    """
    model = (model if inplace else copy.deepcopy(model)).eval()
    changes = Changes()
    if merge:
        for name, module in model.named_modules():
            if isinstance(module, ReparamLargeKernelConv) and _merge_branches(module):
                changes.merged.append(name)
    if fold:
        # A convolution with several parents, as in heads shared between pyramid levels, serves several norms.
        uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        for name, norm_owner, norm_name, conv_owner, conv_name, norm_first in list(_pairs(model)):
            norm, conv = norm_owner.get_submodule(norm_name), conv_owner.get_submodule(conv_name)
            if uses[id(norm)] > 1 or uses[id(conv)] > 1 or not _foldable(norm, conv, norm_first):
                continue
            conv_owner._modules[conv_name] = _fold(norm, conv, norm_first)
            norm_owner._modules[norm_name] = nn.Identity().eval()
            if isinstance(norm_owner, ConvModule):
                norm_owner.turn_on_efficient_conv_bn_eval(False)  # it needs the norm
            changes.folded.append(f'{name}.{norm_name}'.lstrip('.'))
    changes.left = [name for name, _ in named_batch_norms(model)]
    if changes.folded:
        for module in model.modules():
            if isinstance(module, Backbone):
                module.register_buffer(FOLDED, torch.tensor(True))
    return model, changes


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module, str, bool]]:
    """Yield adjacent norms and convolutions.

    Each is a tuple of the path, the norm's parent and name, the convolution's parent and name, and whether the norm
    comes first.
    """
    for name, module in model.named_modules():
        if isinstance(module, ConvModule):
            if module.with_norm and module.order[:2] == ('conv', 'norm') and not module.with_spectral_norm:
                yield name, module, module.norm_name, module, 'conv', False
        elif isinstance(module, ConvNorm):
            yield name, module, 'bn', module, 'conv', False
        elif type(module) is nn.Sequential:
            children = list(module._modules)
            for first, second in zip(children, children[1:], strict=False):
                if isinstance(module._modules[second], _BatchNorm):
                    yield name, module, second, module, first, False
        if isinstance(module, RepLKBlock):
            yield name, module, 'prelkb_bn', module.pw1, 'conv', True
        elif isinstance(module, ConvFFN):
            yield name, module, 'preffn_bn', module.pw1, 'conv', True


def _foldable(norm: Any, conv: Any, norm_first: bool) -> bool:
    if not isinstance(norm, _BatchNorm) or type(norm).forward not in _PLAIN_NORMS:
        return False
    if norm.running_mean is None or conv is None:
        return False
    kind = type(conv)
    if f'{kind.__module__}.{kind.__qualname__}' not in _PLAIN_CONVOLUTIONS:
        return False
    if conv._forward_hooks or conv._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    if norm_first:
        return all(p == 0 for p in conv.padding) and conv.in_channels == norm.num_features
    return conv.out_channels == norm.num_features


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm layer in evaluation mode, each ``(C,)`` in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift


def _fold(norm: Any, conv: Any, norm_first: bool) -> Any:
    scale, shift = _affine(norm)
    weight = conv.weight.detach().double()  # (out, in / groups, ...), in float64 to round once
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.detach().double()
    kernel = (1,) * (weight.dim() - 2)
    if norm_first:
        groups = conv.groups
        # Input channels of each output channel: (groups, 1, in / groups).
        per_output = weight.unflatten(0, (groups, -1))
        scale, shift = scale.view(groups, 1, -1, *kernel), shift.view(groups, 1, -1, *kernel)
        if conv.bias is None:
            bias = weight.new_zeros(weight.shape[0])
        bias = bias + (per_output * shift).flatten(2).sum(-1).flatten()
        weight = (per_output * scale).flatten(0, 1)
    else:
        weight, bias = weight * scale.view(-1, 1, *kernel), bias * scale + shift
    return _with_weights(conv, weight, bias)


def _with_weights(conv: Any, weight: Tensor, bias: Tensor) -> Any:
    new = copy.copy(conv)
    new._parameters = dict(conv._parameters)
    trainable = conv.weight.requires_grad
    new.weight = nn.Parameter(weight.to(conv.weight), requires_grad=trainable)
    new.bias = nn.Parameter(bias.to(conv.weight), requires_grad=trainable)
    return new


def _merge_branches(block: Any) -> bool:
    """Replace a block's branches with one convolution, if every norm is BatchNorm or the identity."""
    if block.merged:
        return False
    branches = [block.lkb_origin] + ([block.small_conv] if hasattr(block, 'small_conv') else [])
    if not all(_foldable(b.bn, b.conv, False) or isinstance(b.bn, nn.Identity) for b in branches):
        return False
    weights, biases = [], []
    for branch in branches:
        conv = branch.conv if isinstance(branch.bn, nn.Identity) else _fold_double(branch)
        weights.append(conv.weight.detach().double())
        biases.append(
            conv.bias.detach().double()
            if conv.bias is not None
            else conv.weight.new_zeros(conv.out_channels, dtype=torch.float64)
        )
    side = weights[0].shape[-1]
    weight = torch.stack([F.pad(w, [(side - w.shape[-1]) // 2] * 4) for w in weights]).sum(0)
    large = block.lkb_origin.conv
    merged: Any = DepthwiseConv2d(large.in_channels, side, dilation=large.dilation).to(large.weight)
    with torch.no_grad():
        merged.weight.copy_(weight)
        merged.bias.copy_(torch.stack(biases).sum(0))
    merged.requires_grad_(large.weight.requires_grad).train(block.training)
    block.lkb_reparam = merged
    for name in ('lkb_origin', 'small_conv'):
        if hasattr(block, name):
            delattr(block, name)
    return True


def _fold_double(branch: Any) -> Any:
    """Fold a branch's norm in float64, so that the sum of branches is rounded once."""
    return _fold(branch.bn, copy.deepcopy(branch.conv).double(), False)
