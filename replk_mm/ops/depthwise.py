"""Depthwise convolution: one function and one module for several implementations.

The output, the gradient of the input and the gradient of the weight are computed by torch's own kernels
(:mod:`replk_mm.ops.cpu.direct`) or by FFTs (:mod:`replk_mm.ops.cpu.fft`). :mod:`replk_mm.ops.cpu.cost_model` chooses
the implementation that it expects to be fastest. Compilers, exporters and counters see torch's plain convolution. Other
devices than CPUs use it too, because their libraries choose among algorithms themselves.
"""

from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from replk_mm.ops.cpu import cost_model, direct, fft
from replk_mm.ops.cpu.problem import DepthwiseProblem, Pair

_PRECISIONS = {torch.float32, torch.float64, torch.bfloat16}
_FORWARD = {'native': direct.native, 'channels_last': direct.channels_last, 'padded': direct.padded, 'fft': fft.forward}
_GRAD_WEIGHT = {'grad_kernel': direct.grad_kernel, 'grad_kernel_channels_last': direct.grad_kernel_channels_last}


class _Depthwise(torch.autograd.Function):
    """Forward and backward pass with the implementations of a plan."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem, plan: cost_model.Plan
    ) -> Tensor:
        ctx.problem, ctx.plan = problem, plan
        spectra: list[Tensor] = []
        if plan.forward == plan.grad_weight == 'fft' and ctx.needs_input_grad[1]:
            out = fft.forward(x, weight, bias, problem, keep=spectra)
        else:
            out = _FORWARD[plan.forward](x, weight, bias, problem)
        ctx.save_for_backward(x, weight, *spectra)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, *spectra = ctx.saved_tensors
        problem, plan = ctx.problem, ctx.plan
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=problem.memory_format)
        with torch.autocast('cpu', enabled=False):  # autocast does not affect torch's own gradients either
            if torch.is_grad_enabled():
                # Second derivatives are rare; torch's own operator supports them.
                grad_x, grad_weight = direct.native_gradients(grad, x, weight, problem, needs_input, needs_weight)
            else:
                grad_x, grad_weight = _gradients(grad, x, weight, problem, plan, needs_input, needs_weight, spectra)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    problem: DepthwiseProblem,
    plan: cost_model.Plan,
    needs_input: bool,
    needs_weight: bool,
    spectra: list[Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    by_fft = needs_input and plan.grad_input == 'fft', needs_weight and plan.grad_weight == 'fft'
    if any(by_fft):
        grad_x, grad_weight = fft.gradients(grad, x, weight, problem, *by_fft, spectra)
    if needs_input and not by_fft[0]:
        transposed = direct.input_gradient_problem(problem)
        if plan.grad_input == 'native' or transposed is None:
            grad_x = direct.native_gradients(grad, x, weight, problem, True, False)[0]
        else:
            grad_x = _FORWARD[plan.grad_input](grad, weight.flip(2, 3), None, transposed)
    if needs_weight and not by_fft[1]:
        if plan.grad_weight == 'native':
            grad_weight = direct.native_gradients(grad, x, weight, problem, False, True)[1]
        else:
            grad_weight = _GRAD_WEIGHT[plan.grad_weight](grad, x, problem)
    return grad_x, grad_weight


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
    implementation: str | None = None,
) -> Tensor:
    """Apply a depthwise convolution: a fast ``torch.nn.functional.conv2d(..., groups=channels)``.

    Args:
        x: Input, ``(N, C, H, W)`` or ``(C, H, W)``. The output has the same memory layout.
        weight: Kernels, ``(C, 1, kh, kw)``.
        bias: Bias of each channel, ``(C,)``. Defaults to None.
        stride: Stride in pixels. Defaults to 1.
        padding: Zeros on both sides of each axis in pixels. Defaults to ``dilation * (kernel // 2)``.
        dilation: Dilation of the kernel in pixels. Defaults to 1.
        implementation: Implementation to use, see :func:`replk_mm.ops.force_implementation`. Defaults to the
            environment variable ``REPLK_MM_DEPTHWISE`` if it is set, otherwise to the one expected to be fastest.

    Returns:
        ``(N, C, H', W')`` with ``H' = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1``.

    Raises:
        ValueError: If the shapes do not match, the output would be empty, or ``implementation`` is unknown.
    """
    stride, dilation = to_pair(stride), to_pair(dilation)
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f'depthwise_conv2d: weight must be (C, 1, kh, kw); found {tuple(weight.shape)}')
    padding = _same_padding(weight.shape[2:], dilation) if padding is None else to_pair(padding)
    if x.dim() == 3:
        return depthwise_conv2d(x[None], weight, bias, stride, padding, dilation, implementation)[0]
    plain = is_traced()  # shapes may be symbolic
    if not plain:
        _check_shapes(x.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation)
    on_cpu, autocast = x.device.type == 'cpu', torch.is_autocast_enabled('cpu')
    out_dtype, original = x.dtype, weight
    if not plain and on_cpu and autocast and x.dtype != torch.float64:
        # Autocast does not affect float64.
        out_dtype = torch.get_autocast_dtype('cpu')
        x, weight, bias = _cast(out_dtype, x, weight, bias)
    same = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    if plain or not on_cpu or x.numel() == 0 or not same or x.dtype not in _PRECISIONS:
        return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])
    problem = DepthwiseProblem.of(x, weight, stride, padding, dilation)
    if direct.needs_float32(problem):
        x, weight, bias = _cast(torch.float32, x, weight, bias)
        problem = replace(problem, dtype=torch.float32)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    kept = original in _spectra_cache and not recorded
    chosen = cost_model.choose_plan(problem, implementation, kept)
    # Otherwise a weight in channels-last memory would change the layout of the output.
    x, weight = x.contiguous(memory_format=problem.memory_format), weight.contiguous()
    if recorded and original in _spectra_cache and original.requires_grad:
        _spectra_cache[original] = None  # training changes the weight; fused optimizers do not update its version
    with torch.autocast('cpu', enabled=False) if autocast else nullcontext():
        if chosen == cost_model.NATIVE and x.dtype != torch.bfloat16:
            out = _FORWARD['native'](x, weight, bias, problem)  # with torch's own gradients
        elif recorded:
            out = _Depthwise.apply(x, weight, bias, problem, chosen)
        elif chosen.forward == 'fft' and kept:
            out = fft.forward(x, weight, bias, problem, kernels=_cached_spectra(original, weight, problem))
        else:
            out = _FORWARD[chosen.forward](x, weight, bias, problem)
    return out if out.dtype == out_dtype else out.to(out_dtype)


def is_traced() -> bool:
    """Return whether a compiler, exporter, counter, transform or forward-mode derivative observes operators."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in tensors]


#: For each weight with cached spectra: the weight and its version, the problem and the spectra.
_spectra_cache: MutableMapping[Tensor, tuple[Tensor, int, DepthwiseProblem, list[Tensor]] | None] = (
    WeakTensorKeyDictionary()
)


def cache_spectra(weight: Tensor) -> None:
    """Cache the spectra of ``weight`` for the last input size, starting with the next inference."""
    _spectra_cache[weight] = None


def caches_spectra(weight: Tensor) -> bool:
    """Return whether :func:`cache_spectra` was called for ``weight``."""
    return weight in _spectra_cache


def _cached_spectra(original: Tensor, weight: Tensor, problem: DepthwiseProblem) -> list[Tensor]:
    kept = _spectra_cache[original]
    if kept is None or kept[2] != problem or not is_unchanged(original, *kept[:2]):
        kept = original.detach(), original._version, problem, fft.kernel_spectra(weight, problem)
        _spectra_cache[original] = kept
    return kept[3]


def is_unchanged(weight: Tensor, known: Tensor, version: int) -> bool:
    """Return whether ``weight`` still has the memory of ``known`` and the given version.

    The caller holds ``known``, so that its memory cannot be reused.
    """
    return weight.data_ptr() == known.data_ptr() and weight._version == version and weight.dtype == known.dtype


def to_pair(value: Any) -> Pair:
    """Return height and width from one number or two."""
    if type(value) is tuple:
        return value
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _same_padding(kernel: Sequence[int], dilation: Pair) -> Pair:
    """Return the padding that keeps the size of the map for odd kernels."""
    return kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1]


@lru_cache(4096)
def _check_shapes(
    x: torch.Size, weight: torch.Size, bias: torch.Size | None, stride: Pair, padding: Pair, dilation: Pair
) -> None:
    found = f'input {tuple(x)}, weight {tuple(weight)}'
    if len(x) != 4:
        raise ValueError(f'depthwise_conv2d: input must be (N, C, H, W) or (C, H, W); found {found}')
    if weight[0] != x[1] or (bias is not None and bias != weight[:1]):
        raise ValueError(
            f'depthwise_conv2d: input, weight and bias differ in channels; found {found}, bias '
            f'{None if bias is None else tuple(bias)}'
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f'depthwise_conv2d: stride={stride} and dilation={dilation} must be at least 1, '
            f'padding={padding} at least 0'
        )
    axes = zip(x[2:], padding, dilation, weight[2:], strict=True)
    reach = [size + 2 * p - d * (k - 1) for size, p, d, k in axes]
    if min(x[2:]) < 1 or min(reach) < 1:
        raise ValueError(
            f'depthwise_conv2d: the map is empty or smaller than the kernel: {found}, padding={padding}, '
            f'dilation={dilation}'
        )


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise ``nn.Conv2d`` that uses :func:`depthwise_conv2d`; its parameters and state dict are the same.

    Args:
        channels: Channels of the input and of the output.
        kernel_size: Side of the kernel in pixels, or height and width.
        stride: Stride in pixels. Defaults to 1.
        padding: Zeros added on each side in pixels. Defaults to ``kernel_size // 2``.
        dilation: Dilation of the kernel in pixels. Defaults to 1.
        bias: Add a bias to each channel. Defaults to True.
        implementation: See :func:`depthwise_conv2d`. Defaults to None.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        dilation: int | Pair = 1,
        bias: bool = True,
        implementation: str | None = None,
    ) -> None:
        if padding is None:
            padding = _same_padding(to_pair(kernel_size), to_pair(dilation))
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, channels, bias)
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)`` to ``(N, C, H', W')``."""
        stride, padding, dilation = to_pair(self.stride), to_pair(self.padding), to_pair(self.dilation)
        return depthwise_conv2d(x, self.weight, self.bias, stride, padding, dilation, self.implementation)
