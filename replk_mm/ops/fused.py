"""Inference of a convolution together with what follows it: an activation, or the sum with a shortcut.

torch's CPU backend (oneDNN) applies both while a tile of the output is still in the cache. It is used where a network
does not train, on CPUs; everywhere else, and for every other kind of layer, the parts run one after the other. The
results are the same up to rounding.
"""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from replk_mm.ops.cpu import cost_model, direct
from replk_mm.ops.cpu.problem import DepthwiseProblem, Pair
from replk_mm.ops.depthwise import DepthwiseConv2d, cache_spectra, caches_spectra, is_traced, is_unchanged, to_pair

_UNARY = {nn.ReLU: 'relu', nn.GELU: 'gelu'}
#: For each convolution that keeps its weight, by precision and arguments: the weight and its version, how the backend
#: wants it, and with which padding.
_prepacked: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Tensor, int, Tensor, Pair]]] = WeakKeyDictionary()


def fused_conv2d(
    conv: nn.Module, x: Tensor, activation: nn.Module | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """``activation(conv(x))`` or ``shortcut + conv(x)``.

    Args:
        conv: A convolution.
        x: Its input, ``(N, C, H, W)``.
        activation: What follows, None for nothing.
        shortcut: What is added, in the shape of the output; None for nothing.

    Raises:
        ValueError: If both an activation and a shortcut are given.
    """
    if activation is not None and shortcut is not None:
        raise ValueError('fused_conv2d: give an activation or a shortcut, not both')
    if not _can_fuse(conv, activation, shortcut, x):
        if torch.is_grad_enabled() and _prepacked.get(conv):
            _prepacked[conv].clear()  # what trains will change, and fused optimizers do not say so
        y = conv(x)
        y = y if activation is None else activation(y)
        return y if shortcut is None else shortcut + y
    assert isinstance(conv, nn.Conv2d)
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    x, bias = x.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    weight, padding = _weight(conv, x)
    layout = padding, conv.stride, conv.dilation, conv.groups
    if shortcut is not None:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, shortcut, weight, bias, *layout, 'add', 1.0, None, [], None
        )
    name = _UNARY[type(activation)] if activation is not None else 'none'
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, *layout, name, [], getattr(activation, 'approximate', '')
    )


def prepack(model: nn.Module) -> int:
    """Let a network's convolutions keep their weights in the form that is computed with: plain ones as the CPU backend
    arranges them, depthwise ones as spectra where those are used.

    Otherwise both are made at every call, a tenth of an inference of single images. Costs the memory of the weights
    once more, and that of the spectra. A weight that changes through torch's own functions (an optimizer,
    ``load_state_dict``, ``to``) is seen to have changed; changes behind torch's back (``weight.data.copy_``) are not:
    pack again after them.

    Args:
        model: A network on a CPU, in evaluation mode.

    Returns:
        The number of convolutions that will keep theirs, from their first inference on.
    """
    convolutions = [
        conv
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d) and type(conv) in (nn.Conv2d, DepthwiseConv2d) and _runs_on_onednn(conv)
    ]
    for conv in convolutions:
        _prepacked[conv] = {}
        if isinstance(conv, DepthwiseConv2d) and not conv.weight.is_inference():
            cache_spectra(conv.weight)
    return len(convolutions)


def _weight(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Pair]:
    """The weight in ``x``'s precision, arranged and kept if ``conv`` is packed, and the padding that belongs to it."""
    kept = _prepacked.get(conv)
    if kept is None:
        return _plain_weight(conv, x)
    key = x.dtype, conv.padding, conv.stride, conv.dilation
    if key not in kept or not is_unchanged(conv.weight, *kept[key][:2]):
        with torch.no_grad():
            weight, padding = _plain_weight(conv, x)
            arranged = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                weight.to_mkldnn(), padding, conv.stride, conv.dilation, conv.groups, x.shape
            )
        kept[key] = conv.weight.detach(), conv.weight._version, arranged, padding
    return kept[key][2:]


def _plain_weight(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Pair]:
    weight = conv.weight.to(x.dtype)
    if isinstance(conv, DepthwiseConv2d):
        return direct.widen(weight, _problem(conv, x))
    return weight, to_pair(conv.padding)


def _problem(conv: nn.Conv2d, x: Tensor) -> DepthwiseProblem:
    return DepthwiseProblem.of(x, conv.weight, to_pair(conv.stride), to_pair(conv.padding), to_pair(conv.dilation))


def _runs_on_onednn(conv: nn.Conv2d) -> bool:
    backend = torch.backends.mkldnn
    return bool(
        conv.weight.device.type == 'cpu'
        and backend.is_available()
        and backend.enabled
        and not isinstance(conv.padding, str)
        and conv.padding_mode == 'zeros'
    )


def has_hooks(*modules: nn.Module | None) -> bool:
    """Return whether calling any of ``modules`` runs hooks, its own or global ones."""
    return _has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
        if module is not None
    )


def _can_fuse(conv: nn.Module, activation: nn.Module | None, shortcut: Tensor | None, x: Tensor) -> bool:
    if (
        is_traced()
        or not isinstance(conv, nn.Conv2d)
        or type(conv) not in (nn.Conv2d, DepthwiseConv2d)
        or 'forward' in vars(conv)
        or not _runs_on_onednn(conv)
        or not (activation is None or type(activation) in _UNARY)
    ):
        return False
    parameters: list[Tensor] = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, shortcut) if t is not None):
        return False
    if has_hooks(conv, activation):
        return False
    if (
        x.dim() != 4
        or x.numel() == 0
        or not x.is_contiguous(memory_format=torch.channels_last)
        or x.shape[1] != conv.in_channels
        or conv.weight.is_inference()
    ):
        return False
    autocast = torch.is_autocast_enabled('cpu')
    dtype = torch.get_autocast_dtype('cpu') if autocast else x.dtype
    others = [] if shortcut is None else [shortcut]
    if shortcut is not None and tuple(shortcut.shape) != (len(x), conv.out_channels, *_problem(conv, x).out):
        return False
    others += [] if autocast else parameters
    # What torch adds in a wider precision, or refuses, is left to it.
    if dtype == torch.bfloat16 and not direct.has_bfloat16_instructions():
        return False
    if {x.dtype, dtype} - {torch.float32, torch.bfloat16} or any(t.dtype != dtype for t in others):
        return False
    if not isinstance(conv, DepthwiseConv2d):
        return True
    problem = replace(_problem(conv, x), dtype=dtype)
    if direct.needs_float32(problem) or not problem.channels_last:
        return False
    plan = cost_model.choose_plan(problem, conv.implementation, caches_spectra(conv.weight))
    return plan.forward in ('native', 'channels_last')
