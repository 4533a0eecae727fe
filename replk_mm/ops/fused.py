"""Inference of a convolution fused with the activation or the shortcut addition that follows it.

oneDNN, torch's CPU backend, applies both while the output is in the cache. In training, on other devices and for other
kinds of layers, the operations run one after the other. The results are equal up to rounding.
"""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as torch_module

from replk_mm.ops.cpu import cost_model, direct
from replk_mm.ops.cpu.problem import DepthwiseProblem, Pair
from replk_mm.ops.depthwise import DepthwiseConv2d, cache_spectra, caches_spectra, is_traced, is_unchanged, to_pair

_GLOBAL_HOOKS = [f'_global_{kind}_hooks' for kind in ('forward_pre', 'forward', 'backward_pre', 'backward')]
_UNARY = {nn.ReLU: 'relu', nn.GELU: 'gelu'}
#: For each prepacked convolution, by precision and arguments: the weight and its version, the weight in the backend's
#: layout, and the padding to use with it.
_prepacked: WeakKeyDictionary[nn.Module, dict[tuple, tuple[Tensor, int, Tensor, Pair]]] = WeakKeyDictionary()


def fused_conv2d(
    conv: nn.Module,
    x: Tensor,
    activation: nn.Module | None = None,
    shortcut: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Compute ``activation(conv(x))``, ``shortcut + conv(x)`` or ``factor * conv(x)``.

    Args:
        conv: A convolution.
        x: Input, ``(N, C, H, W)``.
        activation: Activation after the convolution. Defaults to None.
        shortcut: Tensor to add, of the shape of the output. Defaults to None.
        factor: Tensor to multiply by, of the shape of the output. Defaults to None.

    Raises:
        ValueError: If more than one of activation, shortcut and factor is given.
    """
    if sum(part is not None for part in (activation, shortcut, factor)) > 1:
        raise ValueError('fused_conv2d: pass one of activation, shortcut and factor')
    other = shortcut if factor is None else factor
    if not _can_fuse(conv, activation, other, x):
        if torch.is_grad_enabled() and not is_traced() and _prepacked.get(conv):
            _prepacked[conv].clear()  # training changes the weight; fused optimizers do not update its version
        y = conv(x)
        y = y if activation is None else activation(y)
        y = y if factor is None else factor * y
        return y if shortcut is None else shortcut + y
    assert isinstance(conv, nn.Conv2d)
    out_dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    slow = out_dtype == torch.bfloat16 and not direct.has_bfloat16_instructions()
    if slow:
        direct.warn_float32()
    dtype = torch.float32 if slow else out_dtype
    bias = conv.bias
    if dtype != x.dtype:
        x = x.to(dtype)
    if bias is not None and dtype != bias.dtype:
        bias = bias.to(dtype)
    weight, padding = _get_weight(conv, x)
    layout = padding, conv.stride, conv.dilation, conv.groups
    if other is not None:
        operation = 'add' if factor is None else 'mul'
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other.to(dtype), weight, bias, *layout, operation, 1.0 if factor is None else None, None, [], None
        )
    else:
        name = _UNARY[type(activation)] if activation is not None else 'none'
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, *layout, name, [], getattr(activation, 'approximate', '')
        )
    return y if y.dtype == out_dtype else y.to(out_dtype)


def prepack(model: nn.Module) -> int:
    """Cache the weights of a network's convolutions in the layout that the CPU backend uses, or as spectra for FFTs.

    Without it every call converts them, which takes a tenth of the inference of single images. The cache needs the
    memory of the weights once more, and that of the spectra. Changes by torch's own functions (an optimizer,
    ``load_state_dict``, ``to``) are detected. After other changes, such as ``weight.data.copy_``, prepack again.

    Args:
        model: A network on a CPU, in evaluation mode.

    Returns:
        The number of prepacked convolutions; each fills its cache at its first inference.
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


def _get_weight(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Pair]:
    """Return the weight in the precision of ``x``, prepacked if ``conv`` is, and the padding to use with it."""
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
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS) or any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
        if module is not None
    )


def _can_fuse(conv: nn.Module, activation: nn.Module | None, shortcut: Tensor | None, x: Tensor) -> bool:
    if (
        is_traced()
        or not isinstance(x, Tensor)  # a proxy of torch.fx
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
    if shortcut is not None:
        shape = len(x), conv.out_channels, *_problem(conv, x).out
        # One channel or pixel has no layout; torch 2.8 then fails ("could not create a memory").
        if tuple(shortcut.shape) != shape or shape[1] == 1 or shape[2:] == (1, 1):
            return False
    others += [] if autocast else parameters
    # torch itself handles mixed precisions.
    if {x.dtype, dtype} - {torch.float32, torch.bfloat16} or any(t.dtype != dtype for t in others):
        return False
    if not isinstance(conv, DepthwiseConv2d):
        return True
    problem = _problem(conv, x)
    problem = problem if dtype == x.dtype else replace(problem, dtype=dtype)
    if direct.needs_float32(problem) or direct.pads_dilated(problem) or not problem.channels_last:
        return False
    plan = cost_model.choose_plan(problem, conv.implementation, caches_spectra(conv.weight))
    return plan.forward in ('native', 'channels_last')
