"""RoIAlign, "Mask R-CNN" (arXiv:1703.06870): pooling of regions by bilinear samples.

An average of samples is a weighted sum of cells, the product of weights along y and along x. The forward pass is
therefore a sparse matrix times the features, the backward pass its transpose times the gradient. ``embedding_bag``
computes both, on vectors of channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from replk_mm.mmcv_ops import torchvision_ops

MAX_SAMPLES = 2**24  # values of the samples that max pooling holds at a time


class Pooling(NamedTuple):
    """Arguments of both passes, named as mmcv passes them."""

    aligned_height: int  #: bins along y
    aligned_width: int  #: bins along x
    spatial_scale: float  #: size of the maps relative to the image
    sampling_ratio: int  #: samples per bin along each axis; 0 for the size of a bin in cells, rounded up
    pool_mode: int  #: 0 for the maximum of the samples, 1 for their average
    #: Whether the center of cell 0 has coordinate 0.5, instead of 0. Otherwise regions have at least a cell's size.
    aligned: bool


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **arguments
) -> None:
    """Pool regions of feature maps.

    Args:
        input: Feature maps, shape (B, C, H, W), in any memory layout.
        rois: Index of the map and corners (x1, y1, x2, y2) in pixels of the image, shape (N, 5).
        output: Receives the result, shape (N, C, ``aligned_height``, ``aligned_width``).
        argmax_y: Receives the positions of the maxima if ``pool_mode`` is 0; shape of ``output``.
        argmax_x: Likewise.
        **arguments: Those of :class:`Pooling`.
    """
    p = Pooling(**arguments)
    bins = (p.aligned_height, p.aligned_width)
    if not len(rois):
        return
    if p.pool_mode == 1 and torchvision_ops.works_on(input.device.type):
        pooled = torch.ops.torchvision.roi_align(input, rois, p.spatial_scale, *bins, p.sampling_ratio, p.aligned)
        output.copy_(pooled)
        return
    features = _as_table(input)
    y, x = _samples(rois, p, input.shape, features.dtype)
    if p.pool_mode == 1:
        matrix = _averages(rois[:, 0].long(), y, x, input.shape)
        output.copy_(_multiply(matrix, features).unflatten(0, (len(rois), *bins)).permute(0, 3, 1, 2))
        return
    step = max(1, MAX_SAMPLES // (y.inside[0].numel() * x.inside[0].numel() * input.size(1)))
    for start in range(0, len(rois), step):
        part = slice(start, start + step)
        results = _maxima(rois[part, 0].long(), y.part(part), x.part(part), features, input.shape)
        for target, result in zip((output, argmax_y, argmax_x), results, strict=True):
            target[part] = result.permute(0, 3, 1, 2)


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **arguments
) -> None:
    """Gradient of :func:`roi_align_forward`, written to ``grad_input``, shape (B, C, H, W)."""
    p = Pooling(**arguments)
    shape = grad_input.shape
    batch, channels, height, width = shape
    if not len(rois):
        return
    if p.pool_mode == 1 and torchvision_ops.works_on(grad_output.device.type):
        bins = (p.aligned_height, p.aligned_width)
        gradient = torch.ops.torchvision._roi_align_backward(
            grad_output, rois, p.spatial_scale, *bins, *shape, p.sampling_ratio, p.aligned
        )
        grad_input.copy_(gradient)
    elif p.pool_mode == 1:
        table = _as_table(grad_output)
        y, x = _samples(rois, p, shape, table.dtype)
        matrix = _averages(rois[:, 0].long(), y, x, shape).transpose(batch * height * width)
        grad_input.copy_(_multiply(matrix, table).unflatten(0, (batch, height, width)).permute(0, 3, 1, 2))
    else:
        y0, y1, fy, inside_y = _interpolate(argmax_y, height)
        x0, x1, fx, inside_x = _interpolate(argmax_x, width)
        maps = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
        gradient = grad_output * (inside_y & inside_x)
        flat = grad_input.new_zeros(grad_input.numel())
        for rows, wy in ((y0, 1 - fy), (y1, fy)):
            for columns, wx in ((x0, 1 - fx), (x1, fx)):
                cells = (maps[:, :, None, None] * height + rows) * width + columns
                flat.scatter_add_(0, cells.flatten(), (gradient * wy * wx).flatten())
        grad_input.copy_(flat.view(shape))


class _Samples(NamedTuple):
    """Samples along one axis; shape (N, bins, samples), samples beyond those of a region are not ``valid``."""

    position: Tensor
    low: Tensor  #: cell at or below the position
    high: Tensor  #: cell above it
    fraction: Tensor  #: weight of the latter
    inside: Tensor  #: whether it is ``valid`` and on the map; others count as 0
    valid: Tensor

    def part(self, index: slice) -> '_Samples':
        return _Samples(*(field[index] for field in self))


class _Matrix(NamedTuple):
    """A sparse matrix in rows: row ``i`` has the entries ``offsets[i]`` to ``offsets[i + 1]``."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def transpose(self, columns: int) -> '_Matrix':
        """The transpose; ``columns`` is the number of columns of this matrix."""
        ordered, order = self.columns.int().sort(stable=True)
        ends = torch.bincount(ordered, minlength=columns).cumsum(0)
        rows = torch.repeat_interleave(self.offsets.diff())
        return _Matrix(torch.cat([ends.new_zeros(1), ends]), rows[order], self.values[order])


def _as_table(x: Tensor) -> Tensor:
    """Maps of shape (B, C, H, W) as vectors of channels, shape (B * H * W, C), in at least float32."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))


def _multiply(matrix: _Matrix, table: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(
        matrix.columns,
        table,
        matrix.offsets,
        mode='sum',
        per_sample_weights=matrix.values.to(table.dtype),
        include_last_offset=True,
    )


def _samples(rois: Tensor, p: Pooling, shape: torch.Size, dtype: torch.dtype) -> tuple[_Samples, _Samples]:
    """Samples of each region along y and x."""
    corners = rois[:, 1:].to(dtype) * p.spatial_scale - (0.5 if p.aligned else 0.0)
    found = []
    for axis, (count, length) in enumerate(zip((p.aligned_height, p.aligned_width), shape[2:], strict=True)):
        start = corners[:, 1 - axis, None, None]
        extent = corners[:, 3 - axis, None, None] - start
        step = (extent if p.aligned else extent.clamp(min=1)) / count
        ratio = torch.full_like(step, p.sampling_ratio) if p.sampling_ratio > 0 else step.ceil()
        index = torch.arange(max(int(ratio.nan_to_num(0, 0, 0).max()), 1), device=rois.device)
        place = torch.arange(count, device=rois.device)[:, None]
        position = start + place * step + (index + 0.5) * step / ratio
        low, high, fraction, inside = _interpolate(position, length)
        valid = (index < ratio).expand_as(inside)
        found.append(_Samples(position, low, high, fraction, inside & valid, valid))
    return found[0], found[1]


def _interpolate(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells below and above positions, weight of the upper one, and which positions are at most a cell off the map."""
    inside = (position >= -1) & (position <= length)
    position = position.where(inside, 0).clamp(0, length - 1)
    low = position.floor()
    cell = low.long()
    return cell, (cell + 1).clamp(max=length - 1), position - low, inside


def _averages(maps: Tensor, y: _Samples, x: _Samples, shape: torch.Size) -> _Matrix:
    """Weights of all cells in all bins: one row for each region and bin, one column for each map and cell."""
    (first_y, count_y, weight_y), (first_x, count_x, weight_x) = _axis_weights(y), _axis_weights(x)
    bins_y, bins_x = first_y.size(1), first_x.size(1)
    ends = (count_y[:, :, None] * count_x[:, None]).flatten().cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    row = torch.repeat_interleave(offsets.diff())
    roi = row // (bins_y * bins_x)
    bin_y, bin_x = row // bins_x, roi * bins_x + row % bins_x
    entry = torch.arange(len(row), device=row.device) - offsets[row]
    columns = count_x.flatten()[bin_x]
    entry_y = entry // columns
    entry_x = entry - entry_y * columns
    cell_y, cell_x = first_y.flatten()[bin_y] + entry_y, first_x.flatten()[bin_x] + entry_x
    values = weight_y[bin_y, entry_y] * weight_x[bin_x, entry_x]
    return _Matrix(offsets, (maps[roi] * shape[2] + cell_y) * shape[3] + cell_x, values)


def _axis_weights(samples: _Samples) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of cells along one axis.

    Returns:
        For each region and bin, shape (N, bins): its first cell and its number of cells. Then the weights of these
        cells, shape (N * bins, cells).
    """
    inside = samples.inside
    last = samples.high.masked_fill(~inside, -1).amax(2)
    first = torch.minimum(samples.low.masked_fill(~inside, 2**31).amin(2), last + 1)
    count = last + 1 - first
    share = inside.to(samples.fraction) / samples.valid.sum(2, keepdim=True).clamp(min=1)
    weights = samples.fraction.new_zeros(*first.shape, max(int(count.max()), 1))
    for cell, weight in ((samples.low, 1 - samples.fraction), (samples.high, samples.fraction)):
        weights.scatter_add_(2, (cell - first[:, :, None]).where(inside, 0), weight * share)
    return first, count, weights.flatten(0, 1)


def _maxima(
    maps: Tensor, y: _Samples, x: _Samples, features: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima over the samples of each bin and their positions along y and x, each of shape (N, bins, bins, C)."""
    y, x = (_Samples(*(f[:, :, None, :, None] for f in y)), _Samples(*(f[:, None, :, None] for f in x)))
    base = maps.view(-1, 1, 1, 1, 1) * shape[2]
    cells = torch.stack([(base + r) * shape[3] + c for r in (y.low, y.high) for c in (x.low, x.high)], -1)
    inside = y.inside & x.inside
    weights = [wy * wx * inside for wy in (1 - y.fraction, y.fraction) for wx in (1 - x.fraction, x.fraction)]
    offsets = torch.arange(0, cells.numel() + 1, 4, device=cells.device)
    values = _multiply(_Matrix(offsets, cells.flatten(), torch.stack(weights, -1).flatten()), features)
    values = values.view(*inside.shape, -1).masked_fill(~(y.valid & x.valid)[..., None], -torch.inf).flatten(3, 4)
    best, index = values.max(3)
    empty = best == -torch.inf  # a region without extent has no samples: its value is 0, without a gradient
    position_y, position_x = (p.expand(inside.shape).flatten(3) for p in (y.position, x.position))
    return (
        best.masked_fill(empty, 0),
        position_y.gather(3, index).masked_fill(empty, -2),
        position_x.gather(3, index).masked_fill(empty, -2),
    )
