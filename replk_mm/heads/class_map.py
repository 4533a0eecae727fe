"""Class maps of upsampled logits without the large logits, for whole images, sliding windows and several views.

A segmentor interpolates the logits of its head to the size of its input, or of a window of it, and averages overlapping
windows. It then removes padding, undoes flips and interpolates to the original size of the image. All of this is
linear, in rows and columns separately: a row of the result is a weighted sum of a few rows of the head's logits with
resized columns. Here only a few rows of the result, and the windows that contain them, exist at a time. Their argmax is
taken at once; with several views, the argmax of the mean probability.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from replk_mm.errors import UserError
from replk_mm.heads.upsampling import BufferPool, Interpolation, Part, rows_at_a_time, to_pixels_first
from replk_mm.ops.cpu import threads

#: Minimum number of rows to compute together: adjacent rows share interpolated columns.
MIN_ROWS = 8
_DOUBLE = torch.empty(0, dtype=torch.float64, device='cpu')  # independent of torch's default dtype and device


@dataclass(frozen=True)
class Windows:
    """Windows along one axis of the network's input."""

    starts: tuple[int, ...]  #: start of each window, ascending
    length: int  #: length of a window
    size: int  #: length of the axis

    @classmethod
    def whole(cls, size: int) -> 'Windows':
        """Return a single window over the whole axis."""
        return cls((0,), size, size)

    @classmethod
    def sliding(cls, size: int, length: int, stride: int) -> 'Windows':
        """Return windows of ``length`` every ``stride`` samples. As in mmseg, the last one ends at the end of the axis.

        Raises:
            UserError: If there are gaps between the windows.
        """
        count = max(size - length + stride - 1, 0) // stride + 1
        if count > 1 and stride > length:
            raise UserError(
                f'test_cfg.stride: {stride} is larger than crop_size={length}, which leaves gaps\n'
                f'Set stride to at most crop_size.'
            )
        starts = (max(min(i * stride + length, size) - length, 0) for i in range(count))
        return cls(tuple(starts), min(length, size), size)

    def counts(self) -> Tensor:
        """Return the number of windows over each sample, in float64."""
        counts = torch.zeros(self.size, dtype=torch.float64)
        for start in self.starts:
            counts[start : start + self.length] += 1
        return counts

    def overlapping(self, first: int, last: int) -> list[int]:
        """Return the indices of the windows that overlap the samples from ``first`` to ``last``."""
        return [i for i, start in enumerate(self.starts) if start < last and first < start + self.length]


class Taps(NamedTuple):
    """Input rows and interpolation weights of some rows of a result."""

    rows: list[tuple[int, int, int]]  #: ``(row of windows, first, last)``: ranges of rows of the windows' logits
    matrix: Tensor  #: weight of each of these rows in each row of the result


class LogitRows:
    """Logits of one view of an image at the original size of the image, a few rows at a time.

    Args:
        compute: Function that returns the logits ``(K, h, w)`` of all windows in a row of windows, from left to right.
        rows: Windows along the height of the network's input.
        columns: Windows along the width of the network's input.
        padding: Padding of the input in pixels: left, right, top, bottom. Defaults to 0.
        flip: Flip of the input, ``'horizontal'``, ``'vertical'`` or None. Defaults to None.
        out_size: Height and width of the result. Defaults to those of the input without padding.
        align_corners: As in ``F.interpolate``. Defaults to False.

    Raises:
        ValueError: If ``flip`` is unknown.
    """

    def __init__(
        self,
        compute: Callable[[int], Sequence[Tensor]],
        rows: Windows,
        columns: Windows,
        padding: Sequence[int] = (0, 0, 0, 0),
        flip: str | None = None,
        out_size: Sequence[int] | None = None,
        align_corners: bool = False,
    ) -> None:
        if flip not in (None, 'horizontal', 'vertical'):
            raise ValueError(f"flip={flip!r} must be None, 'horizontal' or 'vertical'")
        self.compute, self.rows, self.columns, self.align_corners = compute, rows, columns, align_corners
        left, right, top, bottom = padding
        height, width = rows.size - top - bottom, columns.size - left - right
        self.unpadded, self.mirrored = slice(left, left + width), flip == 'horizontal'
        self.height, self.width = out_size or (height, width)
        self.to_output = Interpolation(height, self.height, align_corners, _DOUBLE)
        self.to_output.set_source(top, height, flip == 'vertical')
        self.row_share, self.column_share = (1 / windows.counts() for windows in (rows, columns))
        self.loaded: dict[int, Sequence[Tensor]] = {}
        self.to_windows: Interpolation | None = None

    def windows_of(self, part: Part) -> list[int]:
        """Return the indices of the rows of windows that some rows of the result depend on."""
        return self.rows.overlapping(part.first, part.last)

    def load(self, numbers: Sequence[int]) -> Tensor:
        """Compute the logits of these rows of windows, release all others, and return those of the first window."""
        self.loaded = {number: logits for number, logits in self.loaded.items() if number in numbers}
        for number in numbers:
            if number not in self.loaded:
                self.loaded[number] = self.compute(number)
        first = self.loaded[numbers[0]][0]
        if self.to_windows is None:
            self.to_windows = Interpolation(first.shape[1], self.rows.length, self.align_corners, _DOUBLE)
        return first

    def taps(self, part: Part, like: Tensor) -> Taps:
        """Return input rows and weights of some rows of the result; the matrix has the dtype and device of ``like``."""
        assert self.to_windows is not None
        to_output = part.transposed()
        rows, matrices = [], []
        for number in self.windows_of(part):
            start = self.rows.starts[number]
            first, last = max(part.first, start), min(part.last, start + self.rows.length)
            before = self.to_windows.part(first - start, last - start)
            rows.append((number, before.first, before.last))
            matrices.append(
                (before.transposed() * self.row_share[first:last]) @ to_output[first - part.first : last - part.first]
            )
        return Taps(rows, torch.cat(matrices).t().to(like))

    def write(self, taps: Taps, scratch: Tensor, out: Tensor) -> None:
        """Write rows of the result to ``out``, ``(rows, K * width)``.

        Args:
            taps: Input rows and weights.
            scratch: Buffer with a row for each input row of ``taps``.
            out: Output.
        """
        at = 0
        for number, first, last in taps.rows:
            wide = self._columns(number, first, last)
            # Classes come before columns: reductions then run along columns.
            scratch[at : at + len(wide)].view(wide.shape).copy_(wide)
            at += len(wide)
        scratch[:at].nan_to_num_(0)  # the product would spread NaN over all rows
        torch.mm(taps.matrix, scratch[:at], out=out)

    def _columns(self, number: int, first: int, last: int) -> Tensor:
        """Return rows of a row of windows with the columns of the result, ``(rows, K, width)``."""
        length = self.columns.length
        windows = [self._widen(_rows_of(logits, first, last, length), length) for logits in self.loaded[number]]
        x = windows[0]
        if len(windows) > 1:
            x = _zeros(windows[0], self.columns.size)
            for start, window in zip(self.columns.starts, windows, strict=True):
                x[..., start : start + length] += window
            x *= self.column_share.to(x)
        x = x[..., self.unpadded]
        return self._widen(x.flip(2) if self.mirrored else x, self.width)

    def _widen(self, x: Tensor, width: int) -> Tensor:
        """Interpolate ``(rows, K, w)`` to ``(rows, K, width)``, in the memory layout of ``x``."""
        if x.shape[2] == width:
            return x
        if x.stride(1) == 1:  # each row an image of one row, in channels-last memory
            x = x.unsqueeze(2)
            return F.interpolate(x, (1, width), mode='bilinear', align_corners=self.align_corners).squeeze(2)
        return F.interpolate(x, width, mode='linear', align_corners=self.align_corners)


def _rows_of(logits: Tensor, first: int, last: int, width: int) -> Tensor:
    """Return rows of ``(K, h, w)`` as ``(rows, K, w)``, in at least float32."""
    x = logits[:, first:last]
    if logits.shape[2] == width:  # nothing to interpolate, so no copy to channels-last memory
        return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return to_pixels_first(x).transpose(1, 2)


def _zeros(like: Tensor, width: int) -> Tensor:
    """Return zeros ``(rows, K, width)`` in the memory layout of ``like``, ``(rows, K, w)``."""
    rows, classes, _ = like.shape
    if like.stride(1) == 1:
        return like.new_zeros(rows, width, classes).transpose(1, 2)
    return like.new_zeros(rows, classes, width)


@torch.no_grad()
def class_map(views: Sequence[LogitRows]) -> Tensor:
    """Return the argmax of the logits of one view, or of the mean probabilities of several views.

    Windows are computed when their first row is needed and released after their last one. Rows are matrix products in
    the precision of ``torch.set_float32_matmul_precision``.

    Args:
        views: Logits of the views of one image, with results of equal size.

    Returns:
        Class of each pixel, ``(H, W)``; the first one if values are equal.
    """
    height, width = views[0].height, views[0].width
    logits = [view.load(view.windows_of(view.to_output.part(0, 1))) for view in views][0]
    like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    classes = len(logits)
    step = max(rows_at_a_time(width, classes, like), MIN_ROWS)
    chunks = list(zip(*(view.to_output.parts(step) for view in views), strict=True))
    result = torch.empty(height, width, dtype=torch.long, device=like.device)
    for _, group in groupby(
        chunks, lambda parts: [view.windows_of(part) for view, part in zip(views, parts, strict=True)]
    ):
        _reduce(views, list(group), like, classes, result)
    return result


def _reduce(
    views: Sequence[LogitRows], chunks: list[tuple[Part, ...]], like: Tensor, classes: int, result: Tensor
) -> None:
    """Fill the rows of ``chunks``, which all depend on the same rows of windows."""
    for view, part in zip(views, chunks[0], strict=True):
        view.load(view.windows_of(part))
    taps = [[view.taps(part, like) for view, part in zip(views, parts, strict=True)] for parts in chunks]
    num_inputs = max(x.matrix.shape[1] for of_views in taps for x in of_views)
    rows = chunks[0][0].stop - chunks[0][0].start
    width = result.shape[1]
    buffers = BufferPool(like, num_inputs + rows, classes * width)

    def work(i: int) -> None:
        part = chunks[i][0]
        mean = None
        with buffers.borrow() as buffer:
            out = buffer[num_inputs : num_inputs + part.stop - part.start]
            for view, of_view in zip(views, taps[i], strict=True):
                view.write(of_view, buffer[:num_inputs], out)
                x = out.view(-1, classes, width)
                if len(views) > 1:
                    x = x.softmax(1)
                    mean = x if mean is None else mean.add_(x)
            result[part.start : part.stop] = _argmax(x if mean is None else mean)

    # Autocast applies to the network, which runs in load(), but not to these sums.
    with torch.autocast(like.device.type, enabled=False):
        threads.parallel_for(work, len(chunks), spread=like.device.type == 'cpu')


def _argmax(x: Tensor) -> Tensor:
    """Return the first class with the largest value of ``(rows, K, width)``; overwrites ``x``."""
    order = -torch.arange(x.shape[1], device=x.device, dtype=x.dtype).view(1, -1, 1)
    x -= x.amax(1, keepdim=True)
    torch.add(order, x, alpha=1e38, out=x)  # -class at the maximum, far below elsewhere
    return x.amax(1).neg_()
