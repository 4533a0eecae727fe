"""The convolution that joins a feature pyramid, at the levels' own resolutions.

UperNet brings all levels of its pyramid to the finest one's size, concatenates them and runs a 3x3 convolution over all
those
channels: most of the arithmetic of the whole segmentor, and most of that on maps that were small. Interpolation acts on
    each
channel by itself, the weights of one tap on each pixel by itself, so that the two commute: a small map's share is nine
1x1 convolutions of the small map, interpolated, shifted by one pixel or none, and summed. The result is the same up to
rounding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Multiply-accumulates of a level in the joint convolution from which its own resolution pays; below, calls cost more.
MIN_MACS = 50_000_000


class _SumOfNeighbours(torch.autograd.Function):
    """``out[i] = x[i - 1, 0] + x[i, 1] + x[i + 1, 2]``, with zeros around.

    Takes ``(N, S, ..., 3, C)`` and sums along its second axis, with the tap in the last but one.
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
    """The same for ``(N, H, W, C)``, which is channels-last memory."""
    return _resize(x.permute(0, 3, 1, 2), size, align_corners).permute(0, 2, 3, 1)


def _share(small: Tensor, weight: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """``F.conv2d(resized small, weight, padding=1)`` for a 3x3 ``weight``, with the products at the small resolution.

    In float32 at least.
    """
    n, _, h, w = small.shape
    channels = len(weight)
    taps = weight.permute(2, 3, 0, 1).reshape(9 * channels, -1, 1, 1)
    x = F.conv2d(small, taps).permute(0, 2, 3, 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # rounded once; nine of them are weighted and summed
    x = _resize_pixels(x.reshape(n * h, 1, w, -1), (1, size[1]), align_corners)
    x = _SumOfNeighbours.apply(x.reshape(n * h, size[1], 3, 3, channels))
    x = _resize_pixels(x.reshape(n, h, 1, -1), (size[0], 1), align_corners)
    x = _SumOfNeighbours.apply(x.reshape(n, size[0], size[1], 3, channels))
    return x.permute(0, 3, 1, 2)


def conv_of_resized(
    maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, align_corners: bool = False
) -> Tensor:
    """``F.conv2d(torch.cat([maps[0], *resized], 1), weight, bias, padding=1)``, ``resized`` to the size of the first.

    Fastest in channels-last memory.

    Args:
        maps: ``(N, C_i, h_i, w_i)``; the first has the size of the result.
        weight: ``(C, sum of C_i, 3, 3)``.
        bias: ``(C,)``.
        align_corners: As in ``F.interpolate``. Defaults to False.

    Returns:
        ``(N, C, h_0, w_0)``.

    Raises:
        ValueError: If the weight is not of 3x3 pixels.
    """
    if weight.shape[2:] != (3, 3):
        raise ValueError(f'weight of shape {tuple(weight.shape)}: a kernel of 3x3 pixels is needed')
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
    if maps[0].is_contiguous(memory_format=torch.channels_last):  # which maps of 1x1 cannot hand on
        joined = joined.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(joined, torch.cat([w for _, w in direct], 1) if small else weight, bias, padding=1)
    dtype = out.dtype
    for x, w in small:
        out = out + _share(x, w, (height, width), align_corners)
    return out.to(dtype)
