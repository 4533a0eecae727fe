"""Convolution over the concatenated levels of a feature pyramid, at the resolution of each level.

UperNet upsamples all levels of its pyramid to the size of the finest, concatenates them and applies a 3x3 convolution.
This is most of the arithmetic of the segmentor, and most of it on maps that were small. Interpolation acts on each
channel separately, and a kernel tap on each pixel separately, so the two commute. The contribution of a small map is
therefore the sum of nine 1x1 convolutions of it, each interpolated and shifted by at most one pixel. The result is
equal up to rounding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Above this number of multiply-accumulates of a level, its own resolution is faster; below, the calls cost more.
MIN_MACS = 50_000_000


class _SumOfNeighbours(torch.autograd.Function):
    """``out[i] = x[i - 1, 0] + x[i, 1] + x[i + 1, 2]``, with zero padding.

    The input is ``(N, S, ..., 3, C)``: positions on the second axis, taps on the second to last.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        before, here, after = x.unbind(-2)
        out = here.clone(memory_format=torch.contiguous_format)
        out[:, 1:] += before[:, :-1]
        out[:, :-1] += after[:, 1:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        out = grad.new_empty(*grad.shape[:-1], 3, grad.shape[-1])
        before, here, after = out.unbind(-2)
        here.copy_(grad)
        before[:, :-1] = grad[:, 1:]
        before[:, -1] = 0
        after[:, 1:] = grad[:, :-1]
        after[:, 0] = 0
        return out


def _resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(x, tuple(size), mode='bilinear', align_corners=align_corners)


def _resize_pixels(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Resize ``(N, H, W, C)``."""
    return _resize(x.permute(0, 3, 1, 2), size, align_corners).permute(0, 2, 3, 1)


def _conv_resized(small: Tensor, weight: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Compute ``F.conv2d(resize(small), weight, padding=1)`` for a 3x3 ``weight``, in at least float32."""
    n, _, h, w = small.shape
    channels = len(weight)
    taps = weight.permute(2, 3, 0, 1).reshape(9 * channels, -1, 1, 1)
    x = F.conv2d(small, taps).permute(0, 2, 3, 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # nine terms are summed and rounded once
    x = _resize_pixels(x.reshape(n * h, 1, w, -1), (1, size[1]), align_corners)
    x = _SumOfNeighbours.apply(x.reshape(n * h, size[1], 3, 3, channels))
    x = _resize_pixels(x.reshape(n, h, 1, -1), (size[0], 1), align_corners)
    x = _SumOfNeighbours.apply(x.reshape(n, size[0], size[1], 3, channels))
    return x.permute(0, 3, 1, 2)


def pyramid_conv2d(
    maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, align_corners: bool = False
) -> Tensor:
    """Convolve the concatenation of ``maps[0]`` and all other maps resized to its size, with padding 1.

    This is fastest in channels-last memory.

    Args:
        maps: ``(N, C_i, h_i, w_i)``; the first has the size of the output.
        weight: ``(C, sum of C_i, 3, 3)``.
        bias: ``(C,)``.
        align_corners: As in ``F.interpolate``. Defaults to False.

    Returns:
        ``(N, C, h_0, w_0)``.

    Raises:
        ValueError: If the kernel is not 3x3.
    """
    if weight.shape[2:] != (3, 3):
        raise ValueError(f'pyramid_conv2d: the kernel must be 3x3; found a weight of shape {tuple(weight.shape)}')
    n, _, height, width = maps[0].shape
    parts = list(zip(maps, weight.split([x.shape[1] for x in maps], dim=1), strict=True))
    direct: list[tuple[Tensor, Tensor]] = parts[:1]
    small: list[tuple[Tensor, Tensor]] = []
    for x, w in parts[1:]:
        macs = n * height * width * w.numel()
        pays = macs >= MIN_MACS and 2 * x.shape[2] * x.shape[3] <= height * width
        (small if pays else direct).append((x, w))
    resized = [_resize(x, (height, width), align_corners) for x, _ in direct[1:]]
    joined = torch.cat([maps[0], *resized], 1) if resized else maps[0]
    if maps[0].is_contiguous(memory_format=torch.channels_last):  # maps of 1x1 do not define a layout
        joined = joined.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(joined, torch.cat([w for _, w in direct], 1) if small else weight, bias, padding=1)
    dtype = out.dtype
    for x, w in small:
        out = out + _conv_resized(x, w, (height, width), align_corners)
    return out.to(dtype)
