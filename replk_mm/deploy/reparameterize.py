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
import inspect
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from replk_mm.backbones.convnext import GlobalResponseNorm
from replk_mm.backbones.layers import Backbone
from replk_mm.backbones.replknet import ConvNorm, ReparamLargeKernelConv
from replk_mm.backbones.slak import DecomposedLargeKernelConv
from replk_mm.backbones.sync_norm import SyncBatchNorm
from replk_mm.backbones.unireplknet import DilatedReparamBlock, UniRepLKNetBlock
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
    model: nn.Module, merge: bool = True, fold: bool = True, inplace: bool = False, keep: Collection[str] = ()
) -> tuple[nn.Module, Changes]:
    """Merge parallel kernels and fold BatchNorm wherever that is exact in evaluation mode.

    Works on any module tree, including whole segmentors and detectors. A second call changes nothing. Tracing the
    forward methods by :mod:`torch.fx` shows what each convolution and each norm takes and feeds. A norm is folded if
    it takes the output of one convolution only, or feeds one only, and no other operation reads what is between them.
    Where the forward method of a module cannot be traced, that of each of its children is assumed to be the only one
    that calls the child's own children; those of an ``nn.Sequential`` are left alone.

    Args:
        model: Any module.
        merge: Merge the parallel kernels of RepLKNet, SLaK and OverLoCK, and the blocks of UniRepLKNet as its authors
            do, with their norms. Defaults to True.
        fold: Fold BatchNorm layers into convolutions. Defaults to True.
        inplace: Change ``model`` itself instead of a copy. Defaults to False.
        keep: Paths of BatchNorm layers that are not folded. Defaults to none.

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
            inputs, users = _data_flow(model)
            for name, norm in list(named_batch_norms(model)):
                for norm_first, ahead, behind in ((False, inputs, users), (True, users, inputs)):
                    path = next(iter(ahead[name]), None)
                    if name in keep or len(ahead[name]) > 1 or not isinstance(path, str) or behind[path] != {name}:
                        continue
                    conv = model.get_submodule(path)
                    if uses[id(conv)] > 1 or uses[id(norm)] > 1 or not _foldable(norm, conv, norm_first):
                        continue
                    model.set_submodule(path, _fold(norm, conv, norm_first))
                    # timm's norms run dropout and an activation after the affine map.
                    rest = nn.Sequential(OrderedDict(norm.named_children())) if norm._modules else nn.Identity()
                    model.set_submodule(name, rest.eval())
                    if isinstance(owner := model.get_submodule(path.rpartition('.')[0]), ConvModule):
                        owner.turn_on_efficient_conv_bn_eval(False)  # it needs the norm
                    changes.folded.append(name)
                    break
        for module in model.modules() if changes.folded else ():
            if isinstance(module, Backbone):
                module.register_buffer(FOLDED, torch.tensor(True))
    changes.left = [name for name, _ in named_batch_norms(model)]
    return model, changes


def _runs_as(module: Any, cls: type[nn.Module]) -> bool:
    """Return whether ``module`` runs the forward method of ``cls``, which a subclass or an instance may replace."""
    return type(module).forward is cls.forward and 'forward' not in vars(module)


class _Tracer(torch.fx.Tracer):
    """Traces through submodules. Norms, modules without children, with hooks, or that cannot be traced are calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inlined: list[str] = []  # paths of the submodules that the graph shows from inside

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path, nodes, inlined = self.path_of_module(m), len(self.graph.nodes), len(self.inlined)
        if m._modules and not isinstance(m, _BatchNorm) and not has_hooks(m):
            try:
                out = forward(*args, **kwargs)
                self.inlined.append(path)
                return out
            except Exception:  # control flow that depends on values, or whatever else proxies cannot do
                del self.inlined[inlined:]
                for node in list(self.graph.nodes)[: nodes - 1 : -1]:
                    if node.op != 'get_attr':  # these are reused
                        self.graph.erase_node(node)
        return self.create_proxy('call_module', path, args, kwargs)


def _data_flow(model: nn.Module) -> tuple[dict[str, set], dict[str, set]]:
    """Trace the forward methods of a network's modules.

    Returns:
        For the path of each called module, the sources of its input and the users of its output. Each is a path, or a
        node of another operation; reading a parameter counts as both.
    """
    inputs, users = defaultdict[str, set](set), defaultdict[str, set](set)
    # forward may store proxies in the modules. The tensors are shared.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    shown, called = set[str](), {''}
    for module in model.modules():
        if isinstance(module, ConvModule):
            module.turn_on_efficient_conv_bn_eval(False)  # it would hide the norm
    for root, module in model.named_modules():  # parents first
        prefix = f'{root}.' if root else ''
        # Anything may call the members of an nn.Sequential, unless the trace of its owner shows a call of the whole.
        if root in shown or 'forward' in vars(module) or (_runs_as(module, nn.Sequential) and root not in called):
            continue
        if not any(child is not module for _, child in named_batch_norms(module)):
            continue
        parameters = inspect.signature(type(module).forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        tracer = _Tracer()
        try:
            nodes = tracer.trace(module, defaults).nodes
        except Exception:
            continue
        shown |= {prefix + path for path in tracer.inlined}
        paths: dict[Any, str] = {node: prefix + node.target for node in nodes if node.op == 'call_module'}
        called |= set(paths.values())
        for node, path in paths.items():
            inputs[path] |= {paths.get(source, source) for source in node.all_input_nodes}
            users[path] |= {paths.get(user, user) for user in node.users}
        for node in nodes:
            if node.op == 'get_attr' and node.users:
                owner = prefix + node.target.rpartition('.')[0]
                inputs[owner].add(node)
                users[owner].add(node)
    return inputs, users


def _timm(name: str) -> Any:
    return getattr(sys.modules.get('timm.layers'), name, None)


def _is_affine(norm: Any) -> bool:
    """Return whether a norm is an affine map in evaluation mode."""
    return type(norm).forward in _PLAIN_NORMS and _has_statistics(norm)


def _has_statistics(norm: Any) -> bool:
    if not isinstance(norm, _BatchNorm) or 'forward' in vars(norm):
        return False
    return norm.running_mean is not None and not has_hooks(norm)


def _foldable(norm: Any, conv: Any, norm_first: bool) -> bool:
    if 'forward' in vars(conv) or has_hooks(conv):
        return False
    if norm_first:
        plain = _is_affine(norm) and type(conv) in _PLAIN_CONVOLUTIONS and all(p == 0 for p in conv.padding)
        return plain and conv.in_channels == norm.num_features
    affine = _is_affine(norm) or (type(norm) is _timm('BatchNormAct2d') and _has_statistics(norm))
    plain = type(conv) in (*_PLAIN_CONVOLUTIONS, Conv2dAdaptivePadding, _timm('Conv2dSame'))
    return affine and plain and conv.out_channels == norm.num_features


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
    foldable = all(
        isinstance(norm, nn.Identity) or (_is_affine(norm) and _foldable(norm, conv, False)) for conv, norm in branches
    )
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
        strip, *square = others  # no strip holds the other
        second = _with_weights(strip[0], *_sum_branches([strip]))
        merged = dict(LoRA1=_with_weights(first[0], *_sum_branches([first, *square])), LoRA2=second)
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
