"""DCNv3, the deformable convolution of InternImage (arXiv:2211.05778, section 3.1), in torch's operators."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dcnv3(value: Tensor, offset: Tensor, mask: Tensor, offset_scale: float = 1.0) -> Tensor:
    """Sum nine bilinear samples of each group of channels, around each pixel. The map has zeros around it.

    The sum is over the points of a 3x3 kernel, of ``mask * value`` at ``pixel + offset_scale * (point + offset)``.

    Args:
        value: Map, ``(N, H, W, C)``.
        offset: Offsets in pixels, ``(N, H, W, 18 G)`` for ``G`` groups of ``C / G`` channels: for each group and point
            x and y. The points are in columns, from the left and from the top.
        mask: Weights of the samples, ``(N, H, W, 9 G)``, in the same order.
        offset_scale: Distance of the points in pixels. Defaults to 1.

    Returns:
        ``(N, H, W, C)`` of the dtype of ``value``. Half precision is computed in float32.
    """
    (n, h, w, c), groups = value.shape, mask.shape[-1] // 9
    dtype = torch.promote_types(value.dtype, torch.float32)
    options: Any = dict(dtype=dtype, device=value.device)
    # Coordinates as in grid_sample: x first, -1 to 1 from edge to edge.
    pixels = torch.stack(torch.meshgrid(torch.arange(w, **options), torch.arange(h, **options), indexing='xy'), -1)
    kernel = torch.arange(-1, 2, **options)
    points = torch.cartesian_prod(kernel, kernel).view(9, 1, 1, 1, 2)
    size = pixels[-1, -1] + 1  # width and height, in a form that traces follow
    centres = (2 * (pixels + offset_scale * points) + 1) / size - 1
    offset = offset.to(dtype).view(n, h, w, groups, 9, 2).permute(4, 0, 3, 1, 2, 5).reshape(9, n * groups, h, w, 2)
    grids = torch.addcmul(centres, offset, 2 * offset_scale / size)
    masks = mask.to(dtype).view(n, h, w, groups, 9).permute(4, 0, 3, 1, 2).reshape(9, n * groups, 1, h, w)
    maps = value.to(dtype).permute(0, 3, 1, 2).reshape(n * groups, c // groups, h, w)
    # Point by point: nine samples at once would not fit into the cache.
    out = maps.new_zeros(())
    for grid, weight in zip(grids.unbind(), masks.unbind(), strict=True):
        sampled = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        out = torch.addcmul(out, sampled, weight)
    return out.view(n, c, h, w).permute(0, 2, 3, 1).to(value.dtype)
