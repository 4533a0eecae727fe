"""Depthwise convolution and its gradients by torch's own convolutions, called in the form that its CPU kernels run
fast.

torch hands depthwise convolutions to oneDNN, which has a fast kernel for the default layout and two for channels-last
memory. The first gives way to a reference loop, 25 times slower, where the padding exceeds six pixels (a 15x15 kernel),
and the gradient of the weight is such a loop for every size. Both are arranged here as convolutions that have fast
kernels.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from replk_mm.ops.cpu.problem import DepthwiseProblem, Pair

#: Padding in pixels up to which oneDNN's kernel for the default layout applies, and beyond which its better one for
#: channels-last memory does.
_PADDING_LIMIT = 6
#: Kernel sides between which that better kernel on a kernel widened by zeros beats the other one.
_WIDENED = range(12, 15)
#: Channels up to which that better kernel may never return in bfloat16 (oneDNN 3.12).
_MAY_HANG = 16


@cache
def has_bfloat16_instructions() -> bool:
    """Whether torch's CPU kernels compute in bfloat16 itself."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def needs_float32(problem: DepthwiseProblem) -> bool:
    """Whether bfloat16 is computed in float32 and rounded once.

    Without bfloat16 instructions torch's convolutions round at every step, which puts their input gradients off by up
    to 8 %, and take ten times as long as in float32. With them, some shapes of few channels never return.
    """
    if problem.dtype != torch.bfloat16:
        return False
    if not has_bfloat16_instructions():
        return True
    of_gradient = (d * (k - 1) - p for d, k, p in zip(problem.dilation, problem.kernel, problem.padding, strict=True))
    return problem.channels <= _MAY_HANG and (widened(problem) or max(*problem.padding, *of_gradient) > _PADDING_LIMIT)


def native(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> Tensor:
    """torch's convolution as it is."""
    return F.conv2d(x, weight, bias, problem.stride, problem.padding, problem.dilation, problem.channels)


def native_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, problem: DepthwiseProblem, of_input: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """torch's gradients as they are; None for the one not asked."""
    dtype = x.dtype
    if dtype == torch.bfloat16 and problem.channels_last and problem.dilation != (1, 1):
        # torch 2.13 with oneDNN 3.12 leaves parts of this weight gradient unwritten.
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
        [of_input, of_weight, False],
    )
    return (grad_x.to(dtype) if of_input else None), (grad_weight.to(dtype) if of_weight else None)


def channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> Tensor:
    """torch's convolution of channels-last memory."""
    weight, padding = widen(weight, problem)
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, bias, problem.stride, padding, problem.dilation, problem.channels)
    return y.contiguous(memory_format=problem.memory_format)


def widened(problem: DepthwiseProblem) -> bool:
    """Whether :func:`channels_last` surrounds the kernel with zeros."""
    return (
        problem.stride == problem.dilation == (1, 1)
        and all(k in _WIDENED for k in problem.kernel)
        and _PADDING_LIMIT - 2 <= min(problem.padding) <= _PADDING_LIMIT
    )


def widen(weight: Tensor, problem: DepthwiseProblem) -> tuple[Tensor, Pair]:
    """Kernels and padding with which oneDNN computes the problem fastest in channels-last memory."""
    padding = problem.padding
    if not widened(problem):
        return weight, padding
    # One more ring of zeros around the kernel and the map changes no value.
    ring = _PADDING_LIMIT + 1 - min(padding)
    return F.pad(weight, (ring,) * 4), (padding[0] + ring, padding[1] + ring)


def padded(x: Tensor, weight: Tensor, bias: Tensor | None, problem: DepthwiseProblem) -> Tensor:
    """torch's convolution of the default layout, with large paddings written out as zeros in memory."""
    y = _conv_padded(x.contiguous(), weight, bias, problem.padding, problem.stride, problem.dilation)
    return y.contiguous(memory_format=problem.memory_format)


def _conv_padded(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, stride: Pair, dilation: Pair) -> Tensor:
    if max(padding) > _PADDING_LIMIT:
        x, padding = _write_out(x, padding), (0, 0)
    return F.conv2d(x, weight, bias, stride, padding, dilation, weight.shape[0])


def _write_out(x: Tensor, padding: Pair) -> Tensor:
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0]))


def input_gradient_problem(problem: DepthwiseProblem) -> DepthwiseProblem | None:
    """The forward convolution that is the gradient of the input: of the output's gradient, with turned kernels.

    None where there is none: with a stride, or with padding beyond the kernel.
    """
    padding = tuple(d * (k - 1) - p for d, k, p in zip(problem.dilation, problem.kernel, problem.padding, strict=True))
    if problem.stride != (1, 1) or min(padding) < 0:
        return None
    return DepthwiseProblem(
        problem.batch,
        problem.channels,
        problem.out,
        problem.kernel,
        (1, 1),
        (padding[0], padding[1]),
        problem.dilation,
        problem.dtype,
        problem.channels_last,
        problem.threads,
    )


def grad_kernel(grad: Tensor, x: Tensor, problem: DepthwiseProblem) -> Tensor:
    """Gradient of the weight as a convolution of the input with the output's gradient as its kernel.

    ``dw[k] = sum_i g[i] x[i * stride + k * dilation - padding]``: stride and dilation change places, and every channel
    of every image is a channel of its own.

    Returns:
        ``(C, 1, kh, kw)`` in ``x``'s dtype.
    """
    maps = problem.batch * problem.channels
    x, grad = x.contiguous().view(1, maps, *problem.size), grad.contiguous().view(maps, 1, *problem.out)
    lags = _conv_padded(x, grad, None, problem.padding, problem.dilation, problem.stride)
    # Rows that the stride never reached leave lags behind the last tap.
    lags = lags[..., : problem.kernel[0], : problem.kernel[1]]
    return lags.reshape(problem.batch, problem.channels, 1, *problem.kernel).sum(0)


def grad_kernel_channels_last(grad: Tensor, x: Tensor, problem: DepthwiseProblem) -> Tensor:
    """:func:`grad_kernel` of channels-last memory, an image at a time: only the output's gradient is rearranged.

    Returns:
        ``(C, 1, kh, kw)`` in ``x``'s dtype.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    lags: Tensor | None = None
    # Parts of one image rather than images, which torch would not recognize as channels-last memory.
    for image, gradient in zip(x.split(1), grad, strict=True):
        kernel = gradient.contiguous().unsqueeze(1)
        found = F.conv2d(image, kernel, None, problem.dilation, problem.padding, problem.stride, problem.channels)
        # Sums over images are taken in float32, as torch does within one convolution.
        found = found[0, :, : problem.kernel[0], : problem.kernel[1]].to(torch.promote_types(x.dtype, torch.float32))
        lags = found if lags is None else lags.add_(found)
    assert lags is not None  # an empty batch never comes here
    return lags.to(x.dtype).contiguous().unsqueeze(1)
