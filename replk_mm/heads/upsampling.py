"""Cross-entropy of logits brought to a larger size, without the large logits.

A segmentor's logits are a quarter of the image's height and width, or less, and are interpolated before the loss. With
many classes the interpolated logits, their log-softmax and its gradient are most of a small model's training step and
most of its memory. Here they exist for some rows of one image at a time, while the processor's caches hold them:
interpolated, reduced, and taken back through the transpose of the interpolation.

Bilinear interpolation is separable. The columns of the few small rows behind a chunk come first, by torch's own
interpolation in channels-last memory; then the rows, two taps each, into a buffer that all chunks use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from replk_mm.errors import UserError
from replk_mm.ops.cpu import threads


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


#: Bytes of interpolated logits at a time: on CPUs what their caches hold, elsewhere what keeps the device busy.
CPU_CHUNK_BYTES = 4 * 1024 * 1024
DEVICE_CHUNK_BYTES = 128 * 1024 * 1024
#: Columns whose gradient is taken back at a time: each depends on a few small columns, and all others are zeros.
_BAND = 128
#: Probability below which its logarithm is computed from the logits: float32 has few digits left there, or none.
_TINY = 1e-30


def rows_at_a_time(width: int, classes: int, like: Tensor) -> int:
    """Rows of interpolated logits that make a chunk, at least one."""
    room = CPU_CHUNK_BYTES if like.device.type == 'cpu' else DEVICE_CHUNK_BYTES
    return max(1, room // (width * classes * like.element_size()))


def pixels_first(logits: Tensor) -> Tensor:
    """``(K, h, w)`` to ``(h, w, K)`` in at least float32; no copy of channels-last memory in that precision."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.permute(1, 2, 0).to(dtype).contiguous()


def _resize_columns(x: Tensor, width: int, align_corners: bool) -> Tensor:
    """``(rows, w, K)`` to ``(rows, width, K)``."""
    if x.shape[1] == width:
        return x
    images = x.transpose(1, 2).unsqueeze(2)  # each row an image of one row, in channels-last memory
    return F.interpolate(images, (1, width), mode='bilinear', align_corners=align_corners).squeeze(2).transpose(1, 2)


class Buffers:
    """Tensors for the intermediate results of one chunk, as many sets as chunks are computed at a time."""

    def __init__(self, like: Tensor, *shape: int) -> None:
        self.like, self.shape = like, shape
        self.free: list[Tensor] = []

    @contextmanager
    def lent(self) -> Iterator[Tensor]:
        try:
            buffer = self.free.pop()
        except IndexError:
            buffer = self.like.new_empty(self.shape)
        yield buffer
        self.free.append(buffer)


class _CrossEntropy(torch.autograd.Function):
    """Sum of the losses and number of correct pixels; the gradient is computed on the way."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, ignored: Tensor, align_corners: bool, with_grad: bool):
        n, classes, h, w = logits.shape
        height, width = ids.shape[1:]
        like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        parts = [
            (part, part.transposed())
            for part in Interpolation(h, height, align_corners, like).parts(
                min(rows_at_a_time(width, classes, like), height)
            )
        ]
        bands = [
            (slice(part.start, part.stop), slice(part.first, part.last), part.transposed())
            for part in Interpolation(w, width, align_corners, like).parts(_BAND)
        ]
        chunks = [(image, part, transposed) for image in range(n) for part, transposed in parts]
        buffers = Buffers(like, 2, parts[0][0].stop * width, classes)
        losses, corrects, grads = ([like.new_empty(0)] * len(chunks) for _ in range(3))

        def work(i: int) -> None:
            image, part, transposed = chunks[i]
            rows = part.stop - part.start
            with buffers.lent() as (x, p):
                x, p = x[: rows * width], p[: rows * width]
                wide = _resize_columns(pixels_first(logits[image, :, part.first : part.last]), width, align_corners)
                part.apply(wide.reshape(len(wide), -1), x.view(rows, -1))
                torch.softmax(x, 1, out=p)
                label = ids[image, part.start : part.stop].reshape(-1, 1)
                skip = ignored[image, part.start : part.stop].reshape(-1, 1)
                score, probability = x.gather(1, label), p.gather(1, label)
                corrects[i] = ((score >= x.amax(1, keepdim=True)) & ~skip).sum()
                loss = -probability.log()
                rare = (probability.view(-1) < _TINY).nonzero().view(-1)
                if len(rare):
                    loss[rare] = x[rare].logsumexp(1, keepdim=True) - score[rare]
                losses[i] = loss.masked_fill_(skip, 0).sum()
                if with_grad:
                    p.scatter_(1, label, probability - 1)
                    p.index_fill_(0, skip.view(-1).nonzero().view(-1), 0)
                    back = (transposed @ p.view(rows, -1)).view(-1, width, classes)
                    grads[i] = like.new_zeros(len(back), w, classes)
                    for columns, behind, matrix in bands:
                        grads[i][:, behind] += matrix @ back[:, columns]

        threads.parallel_for(work, len(chunks), spread=logits.device.type == 'cpu')
        grad = like.new_zeros(n, h, w, classes) if with_grad else None
        if grad is not None:
            for (image, part, _), share in zip(chunks, grads, strict=True):
                grad[image, part.first : part.last] += share
        total = torch.stack(losses).sum() if chunks else like.new_zeros(())
        correct = torch.stack(corrects).sum() if chunks else ids.new_zeros(())
        ctx.save_for_backward(grad)  # freed by the backward pass
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, _):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype).permute(0, 3, 1, 2), None, None, None, None


def upsampled_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = 255, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of logits that are interpolated to the size of the labels.

    What ``F.cross_entropy(F.interpolate(logits, size, mode='bilinear'), labels, reduction='sum')`` computes, with one
    image's rows of a few megabytes at a time in place of ``(N, K, H, W)``, and with the gradient ready when it is asked
    for. Sums run in float32 whatever the logits' precision (float64 for float64).

    Args:
        logits: ``(N, K, h, w)``, fastest in channels-last memory.
        labels: Class of each pixel, ``(N, H, W)`` integers.
        ignore_index: Label of pixels that do not count. Defaults to 255.
        align_corners: As in ``F.interpolate``. Defaults to False.

    Returns:
        Sum of the losses, differentiable; number of pixels whose label has the largest logit; number of pixels that
        count. Scalars.

    Raises:
        ValueError: If shapes do not fit or the labels are no integers.
        UserError: If a label is no class.
    """
    if (
        logits.dim() != 4
        or labels.dim() != 3
        or len(logits) != len(labels)
        or labels.is_floating_point()
        or not all((*logits.shape[1:], *labels.shape[1:]))
    ):
        raise ValueError(
            f'logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, '
            f'{labels.dtype}; (N, K, h, w) and integers (N, H, W) are needed'
        )
    ignored = labels == ignore_index
    ids = labels.masked_fill(ignored, 0).long()
    if ids.numel():
        lowest, highest = (int(value) for value in torch.stack(ids.aminmax()))
        if lowest < 0 or highest >= logits.shape[1]:
            wrong = highest if highest >= logits.shape[1] else lowest
            raise UserError(
                f'labels: class {wrong} among the labels of a batch; the head has {logits.shape[1]} '
                f'classes (0..{logits.shape[1] - 1}; {ignore_index} is ignored)\n'
                f'Set num_classes of every head to the labels, or fix the label maps (reduce_zero_label?).'
            )
    with torch.autocast(logits.device.type, enabled=False):
        total, correct = _CrossEntropy.apply(
            logits, ids, ignored, align_corners, logits.requires_grad and torch.is_grad_enabled()
        )
    return total, correct, ids.numel() - ignored.sum()
