"""The depthwise convolution: one function and one module in front of several implementations.

Each of its three computations (output, gradient of the input, gradient of the weight) goes to torch's own kernels in
the form that is fast for the shape (:mod:`replk_mm.ops.cpu.direct`), or to spectra (:mod:`replk_mm.ops.cpu.fft`),
whichever :mod:`replk_mm.ops.cpu.cost_model` expects to win. Whatever looks at the operation rather than runs it
(compilers, exporters, counters) sees torch's plain convolution, and so does every device but the CPU, whose
libraries choose among such algorithms themselves.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
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
    """The implementations of a plan, forwards and backwards."""

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
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous(memory_format=problem.memory_format)
        with torch.autocast('cpu', enabled=False):  # as torch's own gradients, which autocast leaves alone
            if torch.is_grad_enabled():
                # Gradients of gradients are rare, and torch's own operator has them.
                grad_x, grad_weight = direct.native_gradients(grad, x, weight, problem, of_input, of_weight)
            else:
                grad_x, grad_weight = _gradients(grad, x, weight, problem, plan, of_input, of_weight, spectra)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if of_bias else None, None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    problem: DepthwiseProblem,
    plan: cost_model.Plan,
    of_input: bool,
    of_weight: bool,
    spectra: list[Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    by_fft = of_input and plan.grad_input == 'fft', of_weight and plan.grad_weight == 'fft'
    if any(by_fft):
        grad_x, grad_weight = fft.gradients(grad, x, weight, problem, *by_fft, spectra)
    if of_input and not by_fft[0]:
        turned = direct.input_gradient_problem(problem)
        if plan.grad_input == 'native' or turned is None:
            grad_x = direct.native_gradients(grad, x, weight, problem, True, False)[0]
        else:
            grad_x = _FORWARD[plan.grad_input](grad, weight.flip(2, 3), None, turned)
    if of_weight and not by_fft[1]:
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
    """Convolve every channel with its own kernel: ``torch.nn.functional.conv2d(..., groups=channels)``, fast.

    Args:
        x: Input, ``(N, C, H, W)`` or ``(C, H, W)``, in any layout; the output has the layout of the input.
        weight: Kernels, ``(C, 1, kh, kw)``.
        bias: Added to each channel, ``(C,)``. Defaults to None.
        stride: Step in pixels. Defaults to 1.
        padding: Zeros on both sides of each axis in pixels. Defaults to ``dilation * (kernel // 2)``.
        dilation: Distance of the kernel's taps in pixels. Defaults to 1.
        implementation: Forces an implementation, see :func:`replk_mm.ops.force_implementation`. Defaults to None: the
            environment variable ``REPLK_MM_DEPTHWISE``, or the one expected to be fastest.

    Returns:
        ``(N, C, H', W')`` with ``H' = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1``.

    Raises:
        ValueError: If the shapes do not fit each other, the output would be empty, or ``implementation`` names nothing.
    """
    stride, dilation = to_pair(stride), to_pair(dilation)
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f'depthwise_conv2d: weight must be (C, 1, kh, kw); found {tuple(weight.shape)}')
    padding = _same(weight.shape[2:], dilation) if padding is None else to_pair(padding)
    if x.dim() == 3:
        return depthwise_conv2d(x[None], weight, bias, stride, padding, dilation, implementation)[0]
    plain = is_traced()  # whose shapes may be symbols
    if not plain:
        _check(x, weight, bias, stride, padding, dilation)
    on_cpu = x.device.type == 'cpu'
    out_dtype, original = x.dtype, weight
    if not plain and on_cpu and torch.is_autocast_enabled('cpu') and x.dtype != torch.float64:
        # float64 is left alone by autocast
        out_dtype = torch.get_autocast_dtype('cpu')
        x, weight, bias = _cast(out_dtype, x, weight, bias)
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if plain or not on_cpu or x.numel() == 0 or len(dtypes) > 1 or not dtypes <= _PRECISIONS:
        return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])
    problem = DepthwiseProblem.of(x, weight, stride, padding, dilation)
    if direct.needs_float32(problem):
        x, weight, bias = _cast(torch.float32, x, weight, bias)
        problem = replace(problem, dtype=torch.float32)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    kept = original in _spectra_cache and not recorded
    chosen = cost_model.choose_plan(problem, implementation, kept)
    # A weight in channels-last memory would impose its layout on the output.
    x, weight = x.contiguous(memory_format=problem.memory_format), weight.contiguous()
    if recorded and original in _spectra_cache and original.requires_grad:
        _spectra_cache[original] = None  # what trains will change, and fused optimizers do not say so
    with torch.autocast('cpu', enabled=False):
        if recorded:
            out = _Depthwise.apply(x, weight, bias, problem, chosen)
        elif chosen.forward == 'fft' and kept:
            out = fft.forward(x, weight, bias, problem, kernels=_cached_spectra(original, weight, problem))
        else:
            out = _FORWARD[chosen.forward](x, weight, bias, problem)
    return out.to(out_dtype)


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


#: Weights whose spectra are kept: the weight and its version, the problem, and the spectra.
_spectra_cache: MutableMapping[Tensor, tuple[Tensor, int, DepthwiseProblem, list[Tensor]] | None] = (
    WeakTensorKeyDictionary()
)


def cache_spectra(weight: Tensor) -> None:
    """Keep the spectra of ``weight`` for the size of map that was last convolved, from its next inference on."""
    _spectra_cache[weight] = None


def caches_spectra(weight: Tensor) -> bool:
    """Whether :func:`cache_spectra` has been called for ``weight``."""
    return weight in _spectra_cache


def _cached_spectra(original: Tensor, weight: Tensor, problem: DepthwiseProblem) -> list[Tensor]:
    kept = _spectra_cache[original]
    if kept is None or kept[2] != problem or not is_unchanged(original, *kept[:2]):
        kept = original.detach(), original._version, problem, fft.kernel_spectra(weight, problem)
        _spectra_cache[original] = kept
    return kept[3]


def is_unchanged(weight: Tensor, known: Tensor, version: int) -> bool:
    """Whether ``weight`` still is the memory of ``known``, whose holder keeps it from being used again, unchanged."""
    return weight.data_ptr() == known.data_ptr() and weight._version == version and weight.dtype == known.dtype


def to_pair(value: Any) -> Pair:
    """Height and width from one number or two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _same(kernel: Sequence[int], dilation: Pair) -> Pair:
    """Padding with which odd kernels keep the size of the map."""
    return kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> None:
    found = f'input {tuple(x.shape)}, weight {tuple(weight.shape)}'
    if x.dim() != 4:
        raise ValueError(f'depthwise_conv2d: the input must be (N, C, H, W) or (C, H, W); found {found}')
    if weight.shape[0] != x.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f'depthwise_conv2d: input, weight and bias differ in channels; found {found}, bias '
            f'{None if bias is None else tuple(bias.shape)}'
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f'depthwise_conv2d: stride={stride} and dilation={dilation} must be at least 1, '
            f'padding={padding} at least 0'
        )
    axes = zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=True)
    reach = [size + 2 * p - d * (k - 1) for size, p, d, k in axes]
    if min(x.shape[2:]) < 1 or min(reach) < 1:
        raise ValueError(
            f'depthwise_conv2d: the map is empty or smaller than the kernel: {found}, padding={padding}, '
            f'dilation={dilation}'
        )


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, kernel_size, groups=channels)`` by :func:`depthwise_conv2d`: same parameters,
    same state dict.

    Args:
        channels: Channels of the input and of the output.
        kernel_size: Side of the kernel in pixels, or height and width.
        stride: Step in pixels. Defaults to 1.
        padding: Zeros added on each side in pixels. Defaults to ``kernel_size // 2``.
        dilation: Distance of the kernel's taps in pixels. Defaults to 1.
        bias: Whether to add a bias for each channel. Defaults to True.
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
            padding = _same(to_pair(kernel_size), to_pair(dilation))
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, channels, bias)
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)`` to ``(N, C, H', W')``."""
        stride, padding, dilation = (to_pair(value) for value in (self.stride, self.padding, self.dilation))
        return depthwise_conv2d(x, self.weight, self.bias, stride, padding, dilation, self.implementation)
