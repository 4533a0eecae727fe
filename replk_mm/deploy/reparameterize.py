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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from replk_mm.backbones.layers import Backbone
from replk_mm.backbones.replknet import ConvFFN, ConvNorm, ReparamLargeKernelConv, RepLKBlock
from replk_mm.backbones.sync_norm import SyncBatchNorm
from replk_mm.checkpoints.key_formats import FOLDED
from replk_mm.deploy.equivalence import named_batch_norms
from replk_mm.errors import UserError
from replk_mm.ops import DepthwiseConv2d
from replk_mm.ops.fused import has_hooks
from replk_mm.wrappers import unwrap_model

# Subclasses may use their weight in another way (weight standardization, deformable sampling). torch also creates a
# subclass for a convolution with a parametrized weight.
_PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, wrappers.Conv2d, wrappers.Conv3d, DepthwiseConv2d)
# The forward methods that are an affine map in evaluation mode; a subclass may override them.
_PLAIN_NORMS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)


@dataclass
class Changes:
    """Changes made by :func:`reparameterize`, as module paths.

    Attributes:
        merged: Parallel branches that became one convolution.
        folded: BatchNorm layers folded into a convolution.
        left: BatchNorm layers whose folding is not known to be exact.
    """

    merged: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = ', '.join(self.left[:4])
        left = f', {len(self.left)} kept, whose folding is not known to be exact ({names})' if self.left else ''
        return f'{len(self.merged)} parallel kernels merged, {len(self.folded)} BatchNorm layers folded{left}'


def reparameterize(
    model: nn.Module, merge: bool = True, fold: bool = True, inplace: bool = False
) -> tuple[nn.Module, Changes]:
    """Merge parallel kernels and fold BatchNorm wherever that is exact in evaluation mode.

    Works on any module tree, including whole segmentors and detectors. A second call changes nothing. A norm is folded
    if the class that runs it after its convolution is known (``ConvModule``, blocks of RepLKNet), or if both are in an
    ``nn.Sequential`` that its owner calls as a whole, which tracing by :mod:`torch.fx` shows.

    Args:
        model: Any module.
        merge: Merge the parallel kernels of RepLKNet. Defaults to True.
        fold: Fold BatchNorm layers into convolutions. Defaults to True.
        inplace: Change ``model`` itself instead of a copy. Defaults to False.

    Returns:
        The network in evaluation mode, without wrappers such as DDP and ``torch.compile``, and the list of changes.

    Raises:
        UserError: If FSDP shards the model.
    """
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise UserError(
            'reparameterize: FSDP shards the model, so that no process has whole weights\n'
            'Load the full state dict into a network that is not sharded.'
        )
    changes = Changes()
    with torch.inference_mode(False):  # its tensors could never be trained
        model = unwrap_model(model)
        model = (model if inplace else copy.deepcopy(model)).eval()
        for module in list(model.modules()):
            for name, child in module._modules.items():
                module._modules[name] = unwrap_model(child)
        # A convolution with several parents, as in heads shared between pyramid levels, serves several norms.
        uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        if merge:
            for name, module in model.named_modules():
                if _runs_as(module, ReparamLargeKernelConv) and _merge_branches(module, uses):
                    changes.merged.append(name)
        if fold:
            calls = cache(partial(_calls, model))
            for name, conv_path, norm_path, norm_first in list(_pairs(model)):
                norm, conv = model.get_submodule(norm_path), model.get_submodule(conv_path)
                if uses[id(conv)] > 1 or not _foldable(norm, conv, norm_first):
                    continue
                if _is_private(model, name, (conv_path, norm_path), calls):
                    model.set_submodule(conv_path, _fold(norm, conv, norm_first))
                    model.set_submodule(norm_path, nn.Identity().eval())
                    if isinstance(owner := model.get_submodule(name), ConvModule):
                        owner.turn_on_efficient_conv_bn_eval(False)  # it needs the norm
                    changes.folded.append(norm_path)
        for module in model.modules() if changes.folded else ():
            if isinstance(module, Backbone):
                module.register_buffer(FOLDED, torch.tensor(True))
    changes.left = [name for name, _ in named_batch_norms(model)]
    return model, changes


def _pairs(model: nn.Module) -> Iterator[tuple[str, str, str, bool]]:
    """Yield convolutions and norms that one module runs one after the other.

    Each is a tuple of the paths of that module, of the convolution and of the norm, and whether the norm comes first.
    """
    for name, module in model.named_modules():
        found: list[tuple[str, str, bool]] = []
        if _runs_as(module, ConvModule):
            if module.with_norm and module.order[:2] == ('conv', 'norm'):
                found = [('conv', module.norm_name, False)]
        elif _runs_as(module, ConvNorm):
            found = [('conv', 'bn', False)]
        elif _runs_as(module, nn.Sequential):
            children = list(module._modules)
            found = [(first, second, False) for first, second in zip(children, children[1:], strict=False)]
        for cls, norm in ((RepLKBlock, 'prelkb_bn'), (ConvFFN, 'preffn_bn')):
            if _runs_as(module, cls) and _runs_as(module.pw1, ConvNorm) and not has_hooks(module.pw1):
                found = [('pw1.conv', norm, True)]
        prefix = f'{name}.' if name else ''
        yield from ((name, prefix + conv, prefix + norm, first) for conv, norm, first in found)


def _runs_as(module: Any, cls: type[nn.Module]) -> bool:
    """Return whether ``module`` runs the forward method of ``cls``, which a subclass or an instance may replace."""
    return type(module).forward is cls.forward and 'forward' not in vars(module)


class _Features(torch.fx.Proxy):
    """Stands for a tensor or a list of tensors, whose items forward may replace."""

    def __setitem__(self, key: Any, value: Any) -> None: ...


def _calls(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the modules and tensors that a module's forward uses; none if it cannot be traced."""
    module = model.get_submodule(path)
    tracer: Any = torch.fx.Tracer()
    tracer.is_leaf_module = lambda *_: True
    tracer.proxy = lambda node: _Features(node, tracer)
    try:  # with a copy, in which forward may store something
        nodes: Any = [] if 'forward' in vars(module) else tracer.trace(copy.copy(module)).nodes
    except Exception:  # control flow that depends on values, or whatever else proxies cannot do
        return []
    used = [node for node in nodes if node.op in ('call_module', 'get_attr')]
    # ConvModule can be called without its norm.
    names = [f'{node.target}.conv' if node.kwargs.get('norm') is False else node.target for node in used]
    return [f'{path}.{name}' if path else name for name in names]


def _is_private(model: nn.Module, name: str, members: tuple[str, ...], calls: Callable) -> bool:
    """Return whether only the module at ``name`` uses its ``members``, as far as the forward methods can be traced."""
    parts = name.split('.') if name else []
    # The members of an nn.Sequential are public: the trace of its owner must show that it is called as a whole.
    public = _runs_as(model.get_submodule(name), nn.Sequential)
    for path in ('.'.join(parts[:i]) for i in reversed(range(len(parts)))):
        module, used = model.get_submodule(path), calls(path)
        if any(f'{call}.'.startswith(f'{member}.') for call in used for member in members):
            return False
        if public and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            if not any(f'{name}.'.startswith(f'{call}.') for call in used):
                return False
            public = _runs_as(module, nn.Sequential)
    return True


def _foldable(norm: Any, conv: Any, norm_first: bool) -> bool:
    if not isinstance(norm, _BatchNorm) or type(norm).forward not in _PLAIN_NORMS or 'forward' in vars(norm):
        return False
    if type(conv) not in _PLAIN_CONVOLUTIONS or 'forward' in vars(conv):
        return False
    if norm.running_mean is None or has_hooks(conv, norm):
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


def _merge_branches(block: Any, uses: Counter[int]) -> bool:
    """Replace a block's branches with one convolution, if every norm is BatchNorm or the identity."""
    if block.merged:
        return False
    branches = [block.lkb_origin] + ([block.small_conv] if hasattr(block, 'small_conv') else [])
    parts = [part for branch in branches for part in branch.modules()]
    shared = any(uses[id(part)] > uses[id(block)] for part in parts)
    foldable = all(isinstance(b.bn, nn.Identity) or _foldable(b.bn, b.conv, False) for b in branches)
    if shared or has_hooks(*parts) or not foldable or not all(_runs_as(branch, ConvNorm) for branch in branches):
        return False
    # In float64, so that the sum of the branches is rounded once.
    convs = [copy.deepcopy(branch.conv).double() for branch in branches]
    convs = [
        c if isinstance(b.bn, nn.Identity) else _fold(b.bn, c, False) for b, c in zip(branches, convs, strict=True)
    ]
    large, side = block.lkb_origin.conv, block.lkb_origin.conv.kernel_size[0]
    weight = torch.stack([F.pad(c.weight.detach(), [(side - c.kernel_size[0]) // 2] * 4) for c in convs]).sum(0)
    merged: Any = DepthwiseConv2d(large.in_channels, side, dilation=large.dilation).to(large.weight)
    with torch.no_grad():
        merged.weight.copy_(weight)
        merged.bias.copy_(sum(conv.bias for conv in convs if conv.bias is not None) + weight.new_zeros(len(weight)))
    merged.requires_grad_(large.weight.requires_grad).train(block.training)
    block.lkb_reparam = merged
    for name in ('lkb_origin', 'small_conv'):
        block._modules.pop(name, None)
    return True
