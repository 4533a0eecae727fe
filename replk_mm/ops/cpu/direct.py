"""Direct depthwise convolution and its gradients, with torch's own convolutions in the form that is fast on CPUs.

torch calls oneDNN, which has one fast kernel for the default layout and two for channels-last memory. The first is
replaced by a reference loop, 25 times slower, if the padding is larger than six pixels (a 15x15 kernel), or than four
without AVX-512. The gradient of the weight uses such a loop for every size. Both are computed here by convolutions that
have fast kernels.
"""

import logging
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from replk_mm.ops.cpu.problem import DepthwiseProblem, Pair

#: Whether torch uses AVX-512.
AVX512 = torch.backends.cpu.get_cpu_capability().startswith('AVX512')
#: Up to this padding in pixels oneDNN uses its fast kernel for the default layout; with more padding it uses the better
#: of its kernels for channels-last memory.
PADDING_LIMIT = 6 if AVX512 else 4
#: Kernel widths for which that better kernel is faster if zeros widen the convolution's kernel.
_WIDENED = range(12, 15) if AVX512 else range(0)
#: Up to this number of channels, that better kernel can hang in bfloat16 (oneDNN 3.12).
_MAY_HANG = 16
#: Warning of a command that was asked for bfloat16.
FLOAT32_INSTEAD = (
    'float32 instead of bfloat16: this CPU lacks bfloat16 instructions (AVX-512 or AVX-NE-CONVERT), without which '
    'networks are 10 to 25 times slower in bfloat16'
)


@cache
def has_bfloat16_instructions() -> bool:
    """Return whether this CPU has bfloat16 instructions that torch uses."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def warn_float32() -> None:
    """Log once that layers compute in float32 although their input is in bfloat16."""
    print_log(FLOAT32_INSTEAD, 'current', logging.WARNING)


def needs_float32(problem: DepthwiseProblem) -> bool:
    """Return whether a bfloat16 convolution is computed in float32 and rounded once.

    Without bfloat16 instructions torch's convolutions round at every step, with errors of up to 8 % in the input
    gradient, and take ten times as long as in float32. With the instructions, some shapes with few channels hang.
    """
    if problem.dtype != torch.bfloat16:
        return False
    if not has_bfloat16_instructions():
        warn_float32()
        return True
    of_gradient = (d * (k - 1) - p for d, k, p in zip(problem.dilation, problem.kernel, problem.padding, strict=True))
    return problem.channels <= _MAY_HANG and (
        any(rings(problem)) or max(*problem.padding, *of_gradient) > PADDING_LIMIT
    )


def native(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> Tensor:
    """torch's convolution."""
    return F.conv2d(x, weight, bias, problem.stride, problem.padding, problem.dilation, problem.channels)


def native_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, problem: DepthwiseProblem, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """torch's gradients of input and weight; None for one that is not needed."""
    dtype = x.dtype
    if dtype == torch.bfloat16 and problem.channels_last and problem.dilation != (1, 1):
        # torch 2.13 with oneDNN 3.12 does not write all of this weight gradient.
        grad, x, weight = grad.float(), x.float(), weight.float()
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        list(problem.stride),
        list(problem.padding),
        list(problem.dilation),
        False,
        [0, 0],
        problem.channels,
        [needs_input, needs_weight, False],
    )
    return (grad_x.to(dtype) if needs_input else None), (grad_weight.to(dtype) if needs_weight else None)


def channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> Tensor:
    """torch's convolution in channels-last memory, with explicit zeros for large paddings of dilated kernels."""
    weight, padding = widen(weight, problem)
    if pads_dilated(problem):
        x, padding = _pad(x, padding), (0, 0)
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, bias, problem.stride, padding, problem.dilation, problem.channels)
    return y.contiguous(memory_format=problem.memory_format)


def pads_dilated(problem: DepthwiseProblem) -> bool:
    """Return whether torch would use a reference loop in channels-last memory."""
    return problem.dilation != (1, 1) and max(problem.padding) > PADDING_LIMIT


def rings(problem: DepthwiseProblem) -> Pair:
    """Return how many rows and columns of zeros :func:`channels_last` adds on each side of the kernel."""
    (height, width), padding = problem.kernel, problem.padding[1]
    plain = problem.stride == problem.dilation == (1, 1)
    if not plain or width not in _WIDENED or not PADDING_LIMIT - 2 <= padding <= PADDING_LIMIT:
        return 0, 0
    ring = PADDING_LIMIT + 1 - padding
    return ring if height in _WIDENED else 0, ring


def widen(weight: Tensor, problem: DepthwiseProblem) -> tuple[Tensor, Pair]:
    """Return the kernels and the padding that are fastest in channels-last memory."""
    rows, cols = rings(problem)
    # Rings of zeros around both the kernel and the map change no value.
    return _pad(weight, (rows, cols)) if cols else weight, (problem.padding[0] + rows, problem.padding[1] + cols)


def padded(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> Tensor:
    """torch's convolution in the default layout, with explicit zeros for large paddings."""
    y = _conv_padded(x.contiguous(), weight, bias, problem.padding, problem.stride, problem.dilation)
    return y.contiguous(memory_format=problem.memory_format)


def _pad(x: Tensor, padding: Pair) -> Tensor:
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0]))


def writes_padding(padding: Pair, stride: Pair) -> bool:
    """Return whether :func:`padded` writes the zeros to memory. oneDNN's fast kernel takes any padding of rows."""
    return padding[1] > PADDING_LIMIT or max(stride) > 3


def _conv_padded(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, stride: Pair, dilation: Pair) -> Tensor:
    if writes_padding(padding, stride):
        x, padding = _pad(x, padding), (0, 0)
    return F.conv2d(x, weight, bias, stride, padding, dilation, weight.shape[0])


def input_gradient_problem(problem: DepthwiseProblem) -> DepthwiseProblem | None:
    """Return the convolution of the output's gradient with flipped kernels that is the gradient of the input.

    None with a stride or with padding larger than the kernel, where there is no such convolution.
    """
    padding = tuple(d * (k - 1) - p for d, k, p in zip(problem.dilation, problem.kernel, problem.padding, strict=True))
    if problem.stride != (1, 1) or min(padding) < 0:
        return None
    return replace(problem, size=problem.out, padding=(padding[0], padding[1]))


def grad_kernel(grad: Tensor, x: Tensor, problem: DepthwiseProblem) -> Tensor:
    """Gradient of the weight, as a convolution of the input with the output's gradient as kernel.

    ``dw[k] = sum_i g[i] x[i * stride + k * dilation - padding]``: stride and dilation are exchanged, and each channel
    of each image is a channel of this convolution.

    Returns:
        ``(C, 1, kh, kw)`` in ``x``'s dtype.
    """
    maps = problem.batch * problem.channels
    x, grad = x.contiguous().view(1, maps, *problem.size), grad.contiguous().view(maps, 1, *problem.out)
    lags = _conv_padded(x, grad, None, problem.padding, problem.dilation, problem.stride)
    # The stride may skip the last rows, which adds lags after the last tap.
    lags = lags[..., : problem.kernel[0], : problem.kernel[1]]
    return lags.reshape(problem.batch, problem.channels, 1, *problem.kernel).sum(0)


def grad_kernel_channels_last(grad: Tensor, x: Tensor, problem: DepthwiseProblem) -> Tensor:
    """:func:`grad_kernel` for channels-last memory, one image at a time; only the output's gradient is rearranged.

    Returns:
        ``(C, 1, kh, kw)`` in ``x``'s dtype.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    lags: Tensor | None = None
    # torch recognizes the results of split() as channels-last memory, unlike those of iteration.
    for image, gradient in zip(x.split(1), grad, strict=True):
        kernel = gradient.contiguous().unsqueeze(1)
        found = F.conv2d(image, kernel, None, problem.dilation, problem.padding, problem.stride, problem.channels)
        # Sum over images in float32, as torch does within one convolution.
        found = found[0, :, : problem.kernel[0], : problem.kernel[1]].to(torch.promote_types(x.dtype, torch.float32))
        lags = found if lags is None else lags.add_(found)
    assert lags is not None  # depthwise_conv2d handles empty batches
    return lags.to(x.dtype).contiguous().unsqueeze(1)
