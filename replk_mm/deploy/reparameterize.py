"""Structural reparameterization: merge parallel kernels and fold BatchNorm into convolutions.

"RepVGG: Making VGG-style ConvNets Great Again", Ding et al., CVPR 2021, arXiv:2101.03697, section 3.3, applied as in
the RepLKNet paper (arXiv:2203.06717, guideline 3). In evaluation mode BatchNorm is an affine map of each channel, so

* after a convolution, it scales the kernel's output channels and shifts its bias;
* before a convolution without padding, it scales the kernel's input channels. With padding it stays, because the zeros
  around the map would need another value;
* parallel convolutions of the same input are one convolution, with the small kernels at the centre of the large one and
  dilated ones spread over it.
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
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from replk_mm.backbones.convnext import GlobalResponseNorm
from replk_mm.backbones.inceptionnext import InceptionNeXtBlock
from replk_mm.backbones.layers import Backbone
from replk_mm.backbones.moganet import ChannelAggregationFFN, MogaBlock
from replk_mm.backbones.replknet import ConvFFN, ConvNorm, ReparamLargeKernelConv, RepLKBlock
from replk_mm.backbones.slak import DecomposedLargeKernelConv
from replk_mm.backbones.sync_norm import SyncBatchNorm
from replk_mm.backbones.unireplknet import DilatedReparamBlock, UniRepLKNetBlock
from replk_mm.backbones.van import ConvMLP, VANBlock
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
# Blocks that run a norm before the first convolution of another module: norm, convolution, class of that module.
_NORM_FIRST: tuple[tuple[type[nn.Module], str, str, type[nn.Module]], ...] = (
    (RepLKBlock, 'prelkb_bn', 'pw1.conv', ConvNorm),
    (ConvFFN, 'preffn_bn', 'pw1.conv', ConvNorm),
    (InceptionNeXtBlock, 'norm', 'mlp.fc1', nn.Sequential),
    (VANBlock, 'norm2', 'mlp.fc1', ConvMLP),  # norm1 also feeds the shortcut of the attention
    (MogaBlock, 'norm2', 'mlp.fc1', ChannelAggregationFFN),
)


@dataclass
class Changes:
    """Changes made by :func:`reparameterize`, as module paths."""

    #: modules whose parallel branches became one convolution; for UniRepLKNet its blocks, for OverLoCK the sequences
    #: with them
    merged: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)  #: BatchNorm layers folded into a convolution
    left: list[str] = field(default_factory=list)  #: BatchNorm layers whose folding is not known to be exact

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
        merge: Merge the parallel kernels of RepLKNet, SLaK and OverLoCK, and the blocks of UniRepLKNet as its authors
            do, with their norms. Defaults to True.
        fold: Fold BatchNorm layers into convolutions. Defaults to True.
        inplace: Change ``model`` itself instead of a copy. Defaults to False.

    Returns:
        The network in evaluation mode, without wrappers such as DDP and ``torch.compile``, and the list of changes.

    Raises:
        UserError: If FSDP shards the model.
    """
    # By name, since the place of FSDPModule depends on the release of torch.
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if classes & {'FSDPModule', 'FullyShardedDataParallel'}:
        raise UserError(
            'reparameterize: FSDP shards the model, so that no process has whole weights\n'
            'Load the full state dict into a network that is not sharded.'
        )
    changes = Changes()
    with torch.inference_mode(False):  # its tensors could never be trained
        model = unwrap_model(model)
        model = model if inplace else copy.deepcopy(model)
        model.eval()  # mmdet's backbones return None
        for module in list(model.modules()):
            for name, child in module._modules.items():
                module._modules[name] = unwrap_model(child)
        # A convolution with several parents, as in heads shared between pyramid levels, serves several norms.
        uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        if merge:
            for name, module in model.named_modules():
                for cls, merge_into_one in _MERGES.items():
                    if _runs_as(module, cls) and merge_into_one(module, uses):
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
            children = [
                f'{path}.lk_origin' if _runs_as(layer, DilatedReparamBlock) and layer.merged else path
                for path, layer in module._modules.items()
            ]
            pairs = list(zip(children, children[1:], strict=False))
            found = [(first, second, False) for first, second in pairs] + [(conv, norm, True) for norm, conv in pairs]
        for cls, norm, conv, of in _NORM_FIRST:
            if _runs_as(module, cls):
                owner = module.get_submodule(conv.rpartition('.')[0])
                if _runs_as(owner, of) and not has_hooks(owner):
                    found = [(conv, norm, True)]
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


def _is_affine(norm: Any) -> bool:
    if not isinstance(norm, _BatchNorm) or type(norm).forward not in _PLAIN_NORMS or 'forward' in vars(norm):
        return False
    return norm.running_mean is not None and not has_hooks(norm)


def _foldable(norm: Any, conv: Any, norm_first: bool) -> bool:
    if not _is_affine(norm) or type(conv) not in _PLAIN_CONVOLUTIONS or 'forward' in vars(conv) or has_hooks(conv):
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


def _sum_branches(branches: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Return kernel and bias, in float64, of the sum of depthwise convolutions with a norm each; the first is the
    largest."""
    large = branches[0][0]
    weight = torch.zeros_like(large.weight, dtype=torch.float64)
    bias = weight.new_zeros(large.out_channels)
    for conv, norm in branches:
        conv = copy.deepcopy(conv).double()
        conv = conv if isinstance(norm, nn.Identity) else _fold(norm, conv, False)
        taps = []
        for whole, side, whole_dilation, dilation in zip(
            large.kernel_size, conv.kernel_size, large.dilation, conv.dilation, strict=True
        ):
            step = dilation // whole_dilation
            start = (whole - 1 - step * (side - 1)) // 2
            taps.append(slice(start, whole - start, step))
        weight[..., taps[0], taps[1]] += conv.weight.detach()
        bias += 0 if conv.bias is None else conv.bias.detach()
    return weight, bias


def _mergeable(block: nn.Module, parts: list[nn.Module], branches: list[tuple[Any, Any]], uses: Counter[int]) -> bool:
    """Return whether only ``block`` uses its ``parts``, no hook sees them, and the sum of the branches is affine."""
    shared = any(uses[id(part)] > uses[id(block)] for part in parts)
    foldable = all(isinstance(norm, nn.Identity) or _foldable(norm, conv, False) for conv, norm in branches)
    return foldable and not shared and not has_hooks(*parts)


def _merge_branches(block: Any, uses: Counter[int]) -> bool:
    """Add each branch to the first large kernel that holds it, if every norm is BatchNorm or the identity."""
    if block.merged:
        return False
    layers = list(block.children())
    branches = [(layer.conv, layer.bn) for layer in layers if _runs_as(layer, ConvNorm)]
    parts = [part for layer in layers for part in layer.modules()]
    if len(branches) < len(layers) or not _mergeable(block, parts, branches, uses):
        return False
    for name in list(block._modules):
        del block._modules[name]
    first, *others = branches
    if isinstance(block, DecomposedLargeKernelConv):
        strip, small = others  # no strip holds the other
        second = _with_weights(strip[0], *_sum_branches([strip]))
        merged = dict(LoRA1=_with_weights(first[0], *_sum_branches([first, small])), LoRA2=second)
        block.lkb_reparam = nn.ModuleDict(merged).eval()
    else:
        block.lkb_reparam = _with_weights(first[0], *_sum_branches(branches))
    return True


def _merge_dilated(layers: Any, uses: Counter[int]) -> bool:
    """Merge kernels in a sequence, as in OverLoCK; the norm after them stays, as in the authors' merged form."""
    block = next((layer for layer in layers if _runs_as(layer, DilatedReparamBlock) and not layer.merged), None)
    if block is None or not _mergeable(block, list(block.children()), block.branches(), uses):
        return False
    merged = _with_weights(block.lk_origin, *_sum_branches(block.branches()))
    block._modules.clear()
    block.lk_origin = merged
    return True


def _merge_unireplknet_block(block: Any, uses: Counter[int]) -> bool:
    """Merge the kernels of a block, and fold its norms, its layer scale and the shift of its response norm."""
    large, linear, norms = block.dwconv, block.pwconv2[0], [block.norm, *block.pwconv2[2:]]
    if len(norms) < 2:  # deployed
        return False
    branches = [(large, nn.Identity())]
    if dilated := _runs_as(large, DilatedReparamBlock):
        branches, large = large.branches(), large.lk_origin
    parts = [*block.dwconv.modules(), block.norm, block.act[1], *block.pwconv2.modules()]
    plain = type(large) is DepthwiseConv2d and type(linear) is nn.Linear and type(block.act[1]) is GlobalResponseNorm
    if not plain or not all(map(_is_affine, norms)) or not _mergeable(block, parts, branches, uses):
        return False
    weight, bias = _sum_branches(branches)
    scale, shift = _affine(block.norm)
    merged = _with_weights(large, weight * scale.view(-1, 1, 1, 1), bias * scale + shift)
    scale, shift = (value if block.gamma is None else block.gamma.detach() * value for value in _affine(norms[1]))
    weight = scale[:, None] * linear.weight.detach().double()
    bias = weight @ block.act[1].beta.detach().double().flatten() + shift
    block.pwconv2 = nn.Sequential(_with_weights(linear, weight, bias), block.pwconv2[1])
    block.norm, block.act[1].beta, block.gamma = nn.Identity(), None, None
    if dilated:
        block.dwconv._modules.clear()
        block.dwconv.lk_origin = merged
    else:
        block.dwconv = merged
    block.eval()
    return True


_MERGES: dict[type[nn.Module], Callable] = {
    ReparamLargeKernelConv: _merge_branches,
    DecomposedLargeKernelConv: _merge_branches,
    UniRepLKNetBlock: _merge_unireplknet_block,
    nn.Sequential: _merge_dilated,
}
