"""Linear interpolation along one axis, a part of its samples at a time: the half of a bilinear one."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass
class Part:
    """Some samples of an interpolation, and what they are made of.

    Attributes:
        start, stop: The samples.
        first, last: The range of input samples that they read.
        runs: ``(start, stop, low, high)``: samples between the same two inputs, counted from ``start`` and ``first``.
        weight: Share of the upper input in each sample, ``(stop - start, 1)``.
    """

    start: int
    stop: int
    first: int
    last: int
    runs: list[tuple[int, int, int, int]]
    weight: Tensor

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """Interpolate along the first axis: ``x`` holds the inputs ``first`` to ``last``, ``out`` takes the samples."""
        for start, stop, low, high in self.runs:
            torch.lerp(x[low], x[high], self.weight[start:stop], out=out[start:stop])
        return out

    def transposed(self) -> Tensor:
        """The transpose of the interpolation as a matrix, ``(last - first, stop - start)``."""
        taps = torch.tensor([run[2:] for run in self.runs for _ in range(run[0], run[1])])
        low, high = taps.unbind(1)
        sample, weight = torch.arange(len(low)), self.weight[:, 0].cpu()
        matrix = weight.new_zeros(self.last - self.first, len(low))
        matrix[low, sample] = 1 - weight
        matrix[high, sample] += weight  # which may be the same place
        return matrix.to(self.weight.device)


class Interpolation:
    """Linear interpolation along one axis with the sampling points of ``F.interpolate``.

    Args:
        size: Samples of the input.
        out_size: Samples of the output.
        align_corners: As in ``F.interpolate``.
        like: Tensor with the dtype and device of what will be interpolated.
    """

    def __init__(self, size: int, out_size: int, align_corners: bool, like: Tensor) -> None:
        at = torch.arange(out_size, dtype=like.dtype)
        if align_corners:
            at *= (size - 1) / (out_size - 1) if out_size > 1 else 0.0
        else:
            at = ((at + 0.5) * (size / out_size) - 0.5).clamp_(min=0)
        low = at.long().clamp_(max=size - 1)
        self.low, self.high = low.tolist(), (low + 1).clamp_(max=size - 1).tolist()
        self.weight = (at - low).unsqueeze(1).to(like.device)

    def read_from(self, offset: int, size: int, flipped: bool) -> None:
        """Let the input be the ``size`` samples behind ``offset`` of a longer one, back to front if ``flipped``."""
        self.low, self.high = (
            [offset + (size - 1 - i if flipped else i) for i in taps] for taps in (self.low, self.high)
        )

    def part(self, start: int, stop: int) -> Part:
        """The samples from ``start`` to ``stop``."""
        taps = list(zip(self.low[start:stop], self.high[start:stop], strict=True))
        first, last = min(map(min, taps)), max(map(max, taps)) + 1
        runs, begin = [], 0
        for (low, high), group in groupby(taps):
            end = begin + len(list(group))
            runs.append((begin, end, low - first, high - first))
            begin = end
        return Part(start, stop, first, last, runs, self.weight[start:stop])

    def parts(self, step: int) -> list[Part]:
        """All samples in parts of ``step``."""
        return [self.part(i, min(i + step, len(self.low))) for i in range(0, len(self.low), step)]
