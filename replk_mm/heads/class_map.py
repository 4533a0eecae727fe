"""Class maps of logits on their way to the image, without the large logits: whole images, sliding windows, several
views.

The logits of a segmentor's head are interpolated to the network's input, or to a window of it (where windows overlap,
their mean counts), then freed of padding, flipped back and interpolated to the image's own size. All of it is linear,
in rows and
in columns separately: a row of the result is a sum over a few rows of the head's logits, whose columns have been
brought to the result's. Here some rows of the result exist at a time, and the windows behind them; the argmax, or the
mean of several views' probabilities and its argmax, leaves one label a pixel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from replk_mm.errors import UserError
from replk_mm.heads.upsampling import Buffers, Interpolation, Part, pixels_first, rows_at_a_time
from replk_mm.ops.cpu import threads

#: Rows of the result that are computed together at least: they share interpolated columns with their neighbours.
MIN_ROWS = 8
_DOUBLE = torch.empty(0, dtype=torch.float64, device='cpu')  # whatever the default is when this is imported


@dataclass(frozen=True)
class Windows:
    """Windows along one axis of the network's input.

    Attributes:
        starts: First sample of each window, ascending.
        length: Samples of a window.
        size: Samples of the input.
    """

    starts: tuple[int, ...]
    length: int
    size: int

    @classmethod
    def whole(cls, size: int) -> 'Windows':
        """One window over everything."""
        return cls((0,), size, size)

    @classmethod
    def sliding(cls, size: int, length: int, stride: int) -> 'Windows':
        """Windows of ``length`` every ``stride`` samples; the last one ends where the input does, as mmseg places them.

        Raises:
            UserError: If windows would leave gaps.
        """
        count = max(size - length + stride - 1, 0) // stride + 1
        if count > 1 and stride > length:
            raise UserError(
                f'test_cfg.stride: windows of {length} pixels every {stride} pixels leave gaps\n'
                f'Set stride to at most crop_size.'
            )
        starts = (max(min(i * stride + length, size) - length, 0) for i in range(count))
        return cls(tuple(starts), min(length, size), size)

    def counts(self) -> Tensor:
        """Number of windows over each sample, in float64."""
        counts = torch.zeros(self.size, dtype=torch.float64)
        for start in self.starts:
            counts[start : start + self.length] += 1
        return counts

    def over(self, first: int, last: int) -> list[int]:
        """Numbers of the windows over the samples from ``first`` to ``last``."""
        return [i for i, start in enumerate(self.starts) if start < last and first < start + self.length]


class Taps(NamedTuple):
    """What some rows of a result are made of.

    Attributes:
        rows: ``(row of windows, first, last)``: rows of these windows' logits.
        matrix: Share of each of them in each row of the result.
    """

    rows: list[tuple[int, int, int]]
    matrix: Tensor


class LogitRows:
    """One image's logits at its own size, a few rows at a time.

    Args:
        compute: Gives the logits ``(K, h, w)`` of the windows of one row of windows, from left to right.
        rows: Windows along the height of the network's input.
        columns: Windows along its width.
        padding: Columns and rows of the input that are padding: left, right, top, bottom. Defaults to none.
        flip: ``'horizontal'`` or ``'vertical'`` if the input was flipped so. Defaults to None.
        out_size: Height and width of the result. Defaults to the input's without its padding.
        align_corners: As in ``F.interpolate``. Defaults to False.

    Raises:
        ValueError: If ``flip`` is none of these.
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
        self.to_output.read_from(top, height, flip == 'vertical')
        self.row_share, self.column_share = (1 / windows.counts() for windows in (rows, columns))
        self.held: dict[int, Sequence[Tensor]] = {}
        self.to_windows: Interpolation | None = None

    def behind(self, part: Part) -> list[int]:
        """Numbers of the rows of windows behind some rows of the result."""
        return self.rows.over(part.first, part.last)

    def hold(self, numbers: Sequence[int]) -> Tensor:
        """Keep the logits of these rows of windows and no others; returns those of the first window."""
        self.held = {number: logits for number, logits in self.held.items() if number in numbers}
        for number in numbers:
            if number not in self.held:
                self.held[number] = self.compute(number)
        first = self.held[numbers[0]][0]
        if self.to_windows is None:
            self.to_windows = Interpolation(first.shape[1], self.rows.length, self.align_corners, _DOUBLE)
        return first

    def taps(self, part: Part, like: Tensor) -> Taps:
        """What some rows of the result are made of, of windows that are held; the matrix as ``like``."""
        assert self.to_windows is not None
        to_output = part.transposed()
        rows, matrices = [], []
        for number in self.behind(part):
            start = self.rows.starts[number]
            first, last = max(part.first, start), min(part.last, start + self.rows.length)
            before = self.to_windows.part(first - start, last - start)
            rows.append((number, before.first, before.last))
            matrices.append(
                (before.transposed() * self.row_share[first:last]) @ to_output[first - part.first : last - part.first]
            )
        return Taps(rows, torch.cat(matrices).t().to(like))

    def write(self, taps: Taps, room: Tensor, out: Tensor) -> None:
        """Write rows of the result to ``out``, ``(rows, K * width)``; ``room`` holds as many rows as ``taps`` names."""
        at = 0
        for number, first, last in taps.rows:
            wide = self._columns(number, first, last)
            # Classes come before columns: reductions then run along columns.
            room[at : at + len(wide)].view(wide.shape).copy_(wide)
            at += len(wide)
        room[:at].nan_to_num_(0)  # which a product would spread over all rows
        torch.mm(taps.matrix, room[:at], out=out)

    def _columns(self, number: int, first: int, last: int) -> Tensor:
        """Rows of a row of windows with the columns of the result, ``(rows, K, width)``."""
        length = self.columns.length
        windows = [self._widen(_rows_of(logits, first, last, length), length) for logits in self.held[number]]
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
    """Rows of ``(K, h, w)`` as ``(rows, K, w)``, in at least float32."""
    x = logits[:, first:last]
    if logits.shape[2] == width:  # nothing to interpolate: classes far apart in memory are better left so
        return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return pixels_first(x).transpose(1, 2)


def _zeros(like: Tensor, width: int) -> Tensor:
    """Zeros of ``width`` columns in the memory layout of ``like``, ``(rows, K, w)``."""
    rows, classes, _ = like.shape
    if like.stride(1) == 1:
        return like.new_zeros(rows, width, classes).transpose(1, 2)
    return like.new_zeros(rows, classes, width)


@torch.no_grad()
def class_map(views: Sequence[LogitRows]) -> Tensor:
    """Class of every pixel: the argmax of one view's logits, or of the mean of several views' probabilities.

    Windows are computed when the rows they lie over are reached, and forgotten when these are done. Rows come from a
    matrix product, in the precision of ``torch.set_float32_matmul_precision``.

    Args:
        views: Logits of one image, seen in different ways; the result's size is the same for all.

    Returns:
        ``(H, W)``, the first class with the largest value.
    """
    height, width = views[0].height, views[0].width
    logits = [view.hold(view.behind(view.to_output.part(0, 1))) for view in views][0]
    like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    classes = len(logits)
    step = max(rows_at_a_time(width, classes, like), MIN_ROWS)
    chunks = list(zip(*(view.to_output.parts(step) for view in views), strict=True))
    result = torch.empty(height, width, dtype=torch.long, device=like.device)
    for _, group in groupby(chunks, lambda parts: [view.behind(part) for view, part in zip(views, parts, strict=True)]):
        _reduce(views, list(group), like, classes, result)
    return result


def _reduce(
    views: Sequence[LogitRows], chunks: list[tuple[Part, ...]], like: Tensor, classes: int, result: Tensor
) -> None:
    """Fill the rows of ``chunks`` that all lie behind the same rows of windows."""
    for view, part in zip(views, chunks[0], strict=True):
        view.hold(view.behind(part))
    taps = [[view.taps(part, like) for view, part in zip(views, parts, strict=True)] for parts in chunks]
    room = max(x.matrix.shape[1] for of_views in taps for x in of_views)
    rows = chunks[0][0].stop - chunks[0][0].start
    width = result.shape[1]
    buffers = Buffers(like, room + rows, classes * width)

    def work(i: int) -> None:
        part = chunks[i][0]
        mean = None
        with buffers.lent() as buffer:
            out = buffer[room : room + part.stop - part.start]
            for view, of_view in zip(views, taps[i], strict=True):
                view.write(of_view, buffer[:room], out)
                x = out.view(-1, classes, width)
                if len(views) > 1:
                    x = x.softmax(1)
                    mean = x if mean is None else mean.add_(x)
            result[part.start : part.stop] = _argmax(x if mean is None else mean)

    # In float32 under autocast too. Windows are computed outside: the network keeps the precision that it was given.
    with torch.autocast(like.device.type, enabled=False):
        threads.parallel_for(work, len(chunks), spread=like.device.type == 'cpu')


def _argmax(x: Tensor) -> Tensor:
    """First class with the largest value of ``(rows, K, width)``, at the speed of memory; overwrites ``x``."""
    order = -torch.arange(x.shape[1], device=x.device, dtype=x.dtype).view(1, -1, 1)
    x -= x.amax(1, keepdim=True)
    torch.add(order, x, alpha=1e38, out=x)  # minus the class where the value is the largest, far below that elsewhere
    return x.amax(1).neg_()
