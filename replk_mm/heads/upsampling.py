"""Cross-entropy of upsampled logits, without the large logits.

A segmentor interpolates its logits from a quarter of the image's height and width, or less, before the loss. With many
classes the large logits, their log-softmax and its gradient take most of the time and memory of a small model's
training step. Here they exist for a few rows of one image at a time, which fit the caches of the CPU: rows are
interpolated, reduced, and propagated back through the transposed interpolation.

Bilinear interpolation is separable. Each chunk first interpolates the columns of its small rows, with torch's own
function in channels-last memory, and then the rows, with two taps each, into a reused buffer.
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
    """A range of interpolated samples and the inputs that they depend on.

    Attributes:
        start, stop: Range of the samples.
        first, last: Range of the input samples.
        runs: ``(start, stop, low, high)``: samples between the same two inputs, relative to ``start`` and ``first``.
        weight: Weight of the upper input in each sample, ``(stop - start, 1)``.
    """

    start: int
    stop: int
    first: int
    last: int
    runs: list[tuple[int, int, int, int]]
    weight: Tensor

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        """Interpolate the inputs ``first`` to ``last`` along the first axis into ``out``."""
        for start, stop, low, high in self.runs:
            torch.lerp(x[low], x[high], self.weight[start:stop], out=out[start:stop])
        return out

    def transposed(self) -> Tensor:
        """Return the transposed interpolation matrix, ``(last - first, stop - start)``."""
        taps = torch.tensor([run[2:] for run in self.runs for _ in range(run[0], run[1])])
        low, high = taps.unbind(1)
        sample, weight = torch.arange(len(low)), self.weight[:, 0].cpu()
        matrix = weight.new_zeros(self.last - self.first, len(low))
        matrix[low, sample] = 1 - weight
        matrix[high, sample] += weight  # low and high may be equal
        return matrix.to(self.weight.device)


class Interpolation:
    """Linear interpolation along one axis, with the sampling points of ``F.interpolate``.

    Args:
        size: Size of the input.
        out_size: Size of the output.
        align_corners: As in ``F.interpolate``.
        like: Tensor with the dtype and device of the input.
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

    def set_source(self, offset: int, size: int, flipped: bool) -> None:
        """Read the input from ``size`` samples of a longer one, starting at ``offset`` and reversed if ``flipped``."""
        self.low, self.high = (
            [offset + (size - 1 - i if flipped else i) for i in taps] for taps in (self.low, self.high)
        )

    def part(self, start: int, stop: int) -> Part:
        """Return the samples from ``start`` to ``stop``."""
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
#: Number of columns to propagate back at a time: they depend on a few small columns.
_BAND = 128
#: Below this probability, its logarithm is computed from the logits, because float32 has few digits left.
_TINY = 1e-30


def rows_at_a_time(width: int, classes: int, like: Tensor) -> int:
    """Return the number of rows of interpolated logits in a chunk, at least one."""
    room = CPU_CHUNK_BYTES if like.device.type == 'cpu' else DEVICE_CHUNK_BYTES
    return max(1, room // (width * classes * like.element_size()))


def to_pixels_first(logits: Tensor) -> Tensor:
    """Convert ``(K, h, w)`` to ``(h, w, K)`` in at least float32; channels-last float32 is not copied."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.permute(1, 2, 0).to(dtype).contiguous()


def _resize_columns(x: Tensor, width: int, align_corners: bool) -> Tensor:
    """Interpolate ``(rows, w, K)`` to ``(rows, width, K)``."""
    if x.shape[1] == width:
        return x
    images = x.transpose(1, 2).unsqueeze(2)  # each row is an image of one row in channels-last memory
    return F.interpolate(images, (1, width), mode='bilinear', align_corners=align_corners).squeeze(2).transpose(1, 2)


class BufferPool:
    """Reusable tensors for the intermediate results of chunks, one for each concurrent chunk."""

    def __init__(self, like: Tensor, *shape: int) -> None:
        self.like, self.shape = like, shape
        self.free: list[Tensor] = []

    @contextmanager
    def borrow(self) -> Iterator[Tensor]:
        try:
            buffer = self.free.pop()
        except IndexError:
            buffer = self.like.new_empty(self.shape)
        yield buffer
        self.free.append(buffer)


class _CrossEntropy(torch.autograd.Function):
    """Sum of the losses and number of correct pixels; the forward pass also computes the gradient."""

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
        buffers = BufferPool(like, 2, parts[0][0].stop * width, classes)
        losses, corrects, grads = ([like.new_empty(0)] * len(chunks) for _ in range(3))

        def work(i: int) -> None:
            image, part, transposed = chunks[i]
            rows = part.stop - part.start
            with buffers.borrow() as (x, p):
                x, p = x[: rows * width], p[: rows * width]
                wide = _resize_columns(to_pixels_first(logits[image, :, part.first : part.last]), width, align_corners)
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
        ctx.save_for_backward(grad)  # freed in the backward pass
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
    """Compute the cross-entropy of logits that are interpolated to the size of the labels.

    Equals ``F.cross_entropy(F.interpolate(logits, size, mode='bilinear'), labels, reduction='sum')``, with a few
    megabytes of one image's rows at a time instead of ``(N, K, H, W)``. The forward pass also computes the gradient.
    Sums use float32 for any precision of the logits, and float64 for float64.

    Args:
        logits: ``(N, K, h, w)``, fastest in channels-last memory.
        labels: Class of each pixel, ``(N, H, W)`` integers.
        ignore_index: Label of pixels to ignore. Defaults to 255.
        align_corners: As in ``F.interpolate``. Defaults to False.

    Returns:
        Three scalars: the sum of the losses (differentiable), the number of pixels whose label has the largest logit,
        and the number of pixels that are not ignored.

    Raises:
        ValueError: If the shapes do not match or the labels are not integers.
        UserError: If a label is out of range.
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
            f'{labels.dtype}; expected (N, K, h, w) and integers (N, H, W)'
        )
    ignored = labels == ignore_index
    ids = labels.masked_fill(ignored, 0).long()
    if ids.numel():
        lowest, highest = (int(value) for value in torch.stack(ids.aminmax()))
        if lowest < 0 or highest >= logits.shape[1]:
            wrong = highest if highest >= logits.shape[1] else lowest
            raise UserError(
                f'labels: found class {wrong}; the head has {logits.shape[1]} classes '
                f'(0..{logits.shape[1] - 1}; {ignore_index} is ignored)\n'
                f'Set num_classes of every head, use_sigmoid=True for out_channels=1, or check reduce_zero_label.'
            )
    with torch.autocast(logits.device.type, enabled=False):
        total, correct = _CrossEntropy.apply(
            logits, ids, ignored, align_corners, logits.requires_grad and torch.is_grad_enabled()
        )
    return total, correct, ids.numel() - ignored.sum()
