"""Depthwise convolution whose weight gradient does not take minutes.

On a CPU torch computes a large depthwise convolution and its input gradient at a useful fraction of the machine's peak,
but the gradient of a 31x31 kernel at 2-3 GFLOP/s: two orders of magnitude below a matrix product. That gradient is the
cross-correlation of the input with the output's gradient, which the convolution theorem turns into an element-wise
product (Mathieu, Henaff and LeCun, "Fast Training of Convolutional Networks through FFTs", arXiv:1312.5851).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Kernel side from which the gradient of the weight is computed by FFT (stride 1, CPU). Below it torch's own is as fast.
FFT_MIN_KERNEL = 9
#: Bytes of spectra held at a time; channels are processed in blocks to stay below it.
FFT_BLOCK_BYTES = 256 * 1024 * 1024


def _good_size(n: int) -> int:
    """The smallest product of 2, 3 and 5 that is at least ``n``: sizes that FFT libraries transform fast."""
    while True:
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 1


def weight_grad_fft(x: Tensor, grad: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Gradient of a stride-1 depthwise convolution with respect to its weight.

    Args:
        x: Input of the convolution, ``(N, C, H, W)``.
        grad: Gradient of its output, ``(N, C, H', W')`` with ``H' = H + 2 * padding[0] - kernel[0] + 1``.
        kernel: Kernel height and width in pixels.
        padding: Zero padding in pixels, of both sides of each axis.

    Returns:
        ``(C, 1, kernel[0], kernel[1])`` in ``x``'s dtype; the transforms run in float32, or float64 for float64 input.
    """
    n, channels, height, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # dw[k] = sum_i x[i + k - padding] * grad[i]. The transform is circular: lags that differ by its size fall together, and
    # height + padding is the smallest size at which no wanted lag (-padding .. kernel - 1 - padding) meets another.
    size = (_good_size(max(height + padding[0], grad.shape[2])), _good_size(max(width + padding[1], grad.shape[3])))
    rows = torch.arange(kernel[0], device=x.device).sub_(padding[0]).remainder_(size[0])
    cols = torch.arange(kernel[1], device=x.device).sub_(padding[1]).remainder_(size[1])
    per_channel = 2 * n * size[0] * (size[1] // 2 + 1) * (16 if dtype == torch.float64 else 8)
    block = max(1, min(channels, FFT_BLOCK_BYTES // per_channel))
    out = x.new_empty(channels, 1, *kernel)
    for start in range(0, channels, block):
        part = slice(start, start + block)
        spectrum = torch.fft.rfft2(x[:, part].to(dtype), s=size)
        spectrum.mul_(torch.fft.rfft2(grad[:, part].to(dtype), s=size).conj_physical_())
        lags = torch.fft.irfft2(spectrum.sum(0), s=size)
        out[part, 0] = lags[:, rows[:, None], cols].to(out.dtype)
    return out


class _FFTWeightGrad(torch.autograd.Function):
    """Torch's convolution forwards and towards the input; :func:`weight_grad_fft` towards the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, None, 1, padding, 1, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], weight.shape[0],
                [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_grad_fft(x, grad, weight.shape[2:], ctx.padding)
        return grad_x, grad_weight, None


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, kernel_size, groups=channels)`` with the same parameters and state dict.

    Args:
        channels: Channels of the input and of the output.
        kernel_size: Side of the kernel in pixels.
        stride: Step in pixels. Defaults to 1.
        padding: Zeros added on each side in pixels. Defaults to ``kernel_size // 2``.
        bias: Whether to add a bias for each channel. Defaults to True.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, padding: int | None = None,
                 bias: bool = True) -> None:
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)`` to ``(N, C, H', W')``."""
        if not self._fft_pays(x):
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled('cpu') and x.dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype('cpu')
            x, weight = x.to(dtype), weight.to(dtype)
        out = _FFTWeightGrad.apply(x, weight, self.padding)
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)

    def _fft_pays(self, x: Tensor) -> bool:
        # Only training on a CPU has the slow gradient; everything else (and every exporter) sees a plain convolution.
        return (torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
                and self.weight.requires_grad and x.device.type == 'cpu' and x.dim() == 4 and x.numel() > 0
                and min(self.kernel_size) >= FFT_MIN_KERNEL and self.stride == (1, 1))
