"""Depthwise convolution and its gradients by FFTs.

A convolution with stride 1 is an element-wise product of spectra ("Fast Training of Convolutional Networks through
FFTs", Mathieu, Henaff and LeCun, arXiv:1312.5851). Its cost hardly depends on the size of the kernel. Transforms run
over blocks of channels and images that fit the cache of a CPU. The spectra of the whole tensor are stored only for the
backward pass, in which the two gradients share the spectrum of the output's gradient.

The transforms have size ``S >= size + padding`` on each axis, so that the results below do not wrap around. The input
is at offset ``padding`` in a buffer of zeros, the output's gradient and the kernel are at offset 0:

* ``y[i] = sum_k w[k] x[i + k]``: correlation, rows and columns ``0 .. out``;
* ``dx[j] = sum_i g[i] w[j - i]``: convolution, rows and columns ``padding .. padding + size``;
* ``dw[k] = sum_i g[i] x[i + k]``: correlation, rows and columns ``0 .. kernel``.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from replk_mm.ops.cpu import threads
from replk_mm.ops.cpu.problem import DepthwiseProblem, Pair

#: Bytes of the real buffer of a block, if all threads share one block or each thread has its own. Together with the
#: spectrum and the product, a block uses about four times this.
BLOCK_BYTES, THREAD_BLOCK_BYTES = 2 * 1024 * 1024, 640 * 1024
#: Total pixels of the transforms above which threads of our own are faster. Below, they compete with torch's threads,
#: which spin for some milliseconds after every operator.
MIN_PIXELS_FOR_THREADS = 4_000_000


@cache
def good_size(n: int) -> int:
    """Return the smallest even size of at least ``n`` with only the factors 2, 3 and 5, which FFT libraries prefer."""
    while True:
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1 and n % 2 == 0:
            return n
        n += 1


def transform_size(problem: DepthwiseProblem) -> Pair:
    """Return height and width of the transforms in pixels."""
    height, width = problem.size
    return good_size(height + problem.padding[0]), good_size(width + problem.padding[1])


def supports(problem: DepthwiseProblem) -> bool:
    """Return whether FFTs apply: stride and dilation are 1, and kernel and output fit into the transform."""
    axes = zip(problem.kernel, problem.out, transform_size(problem), strict=True)
    return problem.stride == problem.dilation == (1, 1) and all(max(k, o) <= s for k, o, s in axes)


def kernel_spectra(weight: Tensor, problem: DepthwiseProblem) -> list[Tensor]:
    """Return the conjugate spectra of the kernels for each block of :func:`forward`."""
    size = transform_size(problem)
    return [
        _kernel_spectrum(weight[channels], size, problem.dtype).conj_physical_() for channels, _ in _blocks(problem)
    ]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: DepthwiseProblem,
    keep: list[Tensor] | None = None,
    kernels: Sequence[Tensor] = (),
) -> Tensor:
    """Convolve ``(N, C, H, W)`` to ``(N, C, H', W')``.

    Args:
        x: Input.
        weight: Kernels, ``(C, 1, kh, kw)``.
        bias: ``(C,)`` or None.
        problem: The convolution.
        keep: List that receives the spectra of input and kernels for :func:`gradients`.
        kernels: Cached output of :func:`kernel_spectra`, for inference only. Computed if empty.
    """
    out = problem.empty(x, problem.out)
    size, (rows, cols) = transform_size(problem), problem.out
    blocks = _blocks(problem)
    kept: list[list[Tensor]] = [[] for _ in blocks]

    def work(i: int) -> None:
        channels, parts = blocks[i]
        kernel = None if kernels else _kernel_spectrum(weight[channels], size, x.dtype)
        conjugate = kernels[i] if kernel is None else kernel.conj_physical()
        shift = None if bias is None else bias[channels, None, None].to(conjugate.real.dtype)
        buffer = _Buffer(size, problem.padding, problem.size)
        if keep is not None and kernel is not None and _stores_kernel_spectra(problem):
            kept[i].append(kernel)
        for part in parts:
            spectrum = buffer.transform(x[part, channels])
            if keep is None:
                spectrum.mul_(conjugate)
            else:
                kept[i].append(spectrum)
                spectrum = spectrum * conjugate
            y = _inverse(spectrum, size, slice(0, rows), slice(0, cols))
            out[part, channels] = y if shift is None else y.add_(shift)

    threads.parallel_for(work, len(blocks), _uses_own_threads(problem))
    if keep is not None:
        keep.extend(spectrum for block in kept for spectrum in block)
    return out


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    problem: DepthwiseProblem,
    needs_input: bool,
    needs_weight: bool,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of the input ``(N, C, H, W)`` and of the weight ``(C, 1, kh, kw)``.

    Args:
        grad: Gradient of the output, ``(N, C, H', W')``.
        x: Input of the convolution.
        weight: Kernels of the convolution.
        problem: The convolution.
        needs_input: Compute the gradient of the input; otherwise it is None.
        needs_weight: Compute the gradient of the weight; otherwise it is None.
        kept: Spectra from :func:`forward`. Computed again if empty.
    """
    grad_x = problem.empty(grad, problem.size) if needs_input else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    size, (top, left), (height, width) = transform_size(problem), problem.padding, problem.size
    blocks = _blocks(problem)
    with_kernels = int(_stores_kernel_spectra(problem))
    per_block = with_kernels + len(blocks[0][1])  # the kernels, and each part of the batch

    def work(i: int) -> None:
        channels, parts = blocks[i]
        spectra = list(kept[i * per_block : (i + 1) * per_block])
        grads, inputs = _Buffer(size, (0, 0), problem.out), _Buffer(size, problem.padding, problem.size)
        kernel = (
            None
            if not needs_input
            else spectra[0]
            if spectra and with_kernels
            else _kernel_spectrum(weight[channels], size, grad.dtype)
        )
        lags: Tensor | None = None
        for j, part in enumerate(parts):
            spectrum = grads.transform(grad[part, channels])
            if grad_weight is not None:
                conjugate = spectrum.conj_physical()
                other = spectra[with_kernels + j] if spectra else inputs.transform(x[part, channels])
                products = conjugate.mul_(other).sum(0)
                # Summing spectra over images needs one inverse transform per channel for any batch size.
                lags = products if lags is None else lags.add_(products)
            if grad_x is not None and kernel is not None:
                grad_x[part, channels] = _inverse(
                    spectrum.mul_(kernel), size, slice(top, top + height), slice(left, left + width)
                )
        if grad_weight is not None and lags is not None:
            grad_weight[channels, 0] = _inverse(lags, size, slice(0, problem.kernel[0]), slice(0, problem.kernel[1]))

    threads.parallel_for(work, len(blocks), _uses_own_threads(problem))
    return grad_x, grad_weight


def _stores_kernel_spectra(problem: DepthwiseProblem) -> bool:
    # Spectra have at least float32: for bfloat16 tensors they would more than double the memory of a layer.
    return problem.dtype != torch.bfloat16


def _uses_own_threads(problem: DepthwiseProblem) -> bool:
    return problem.batch * problem.channels * math.prod(transform_size(problem)) >= MIN_PIXELS_FOR_THREADS


@cache
def _blocks(problem: DepthwiseProblem) -> list[tuple[slice, list[slice]]]:
    """Return the channels of each block, and the parts of the batch to process with them."""
    threads, limit = (problem.threads, THREAD_BLOCK_BYTES) if _uses_own_threads(problem) else (1, BLOCK_BYTES)
    # In channels-last memory, blocks of fewer than eight channels would load every cache line several times.
    maps = max(8 if problem.channels_last else 1, limit // (4 * math.prod(transform_size(problem))))
    channels = min(-(-problem.channels // threads), maps)
    images = max(1, maps // channels)
    parts = [slice(i, i + images) for i in range(0, problem.batch, images)]
    return [(slice(start, start + channels), parts) for start in range(0, problem.channels, channels)]


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Buffer:
    """Buffer of zeros around the maps to transform, reused for all parts of the batch."""

    def __init__(self, size: Pair, offset: Pair, area: Pair) -> None:
        self.size = size
        self.rows, self.cols = (slice(o, o + a) for o, a in zip(offset, area, strict=True))
        self.data: Tensor | None = None

    def transform(self, maps: Tensor) -> Tensor:
        """Return the spectrum ``(n, c, S_h, S_w / 2 + 1)`` of ``(n, c, h, w)``."""
        if self.data is None or self.data.shape[:2] != maps.shape[:2]:
            self.data = torch.zeros(*maps.shape[:2], *self.size, dtype=_precision(maps.dtype), device=maps.device)
        # One copy changes layout, precision and position.
        self.data[:, :, self.rows, self.cols] = maps
        return torch.fft.rfft2(self.data)


def _kernel_spectrum(kernel: Tensor, size: Pair, dtype: torch.dtype) -> Tensor:
    return torch.fft.rfft2(kernel[:, 0].to(_precision(dtype)), s=size)


def _inverse(spectrum: Tensor, size: Pair, rows: slice, cols: slice) -> Tensor:
    # The second transform runs only on the rows that are kept.
    return torch.fft.irfft(torch.fft.ifft(spectrum, dim=-2)[..., rows, :], n=size[1])[..., cols]
