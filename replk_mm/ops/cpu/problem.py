"""Description of a depthwise convolution, from which its implementation is chosen."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class DepthwiseProblem:
    """Shapes, dtype, layout and threads of a depthwise convolution."""

    batch: int  #: number of images
    channels: int  #: channels of input and output
    size: Pair  #: height and width of the input in pixels
    kernel: Pair  #: height and width of the kernels in pixels
    stride: Pair  #: strides in pixels
    padding: Pair  #: zeros on both sides of each axis in pixels
    dilation: Pair  #: dilation in pixels
    dtype: torch.dtype  #: data type of input and weight
    channels_last: bool  #: whether the input is in channels-last memory
    threads: int  #: number of threads of torch

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> 'DepthwiseProblem':
        """Describe the convolution of ``x`` with ``weight``."""
        # Memory that has both layouts, as with one channel, counts as the default layout; a part of the channels of a
        # channels-last map counts as channels-last.
        channels_last = not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1
        threads = torch.get_num_threads()
        return _describe(x.shape, weight.shape, stride, padding, dilation, x.dtype, channels_last, threads)

    @cached_property
    def out(self) -> Pair:
        """Height and width of the output in pixels."""
        rows, cols = (
            (s + 2 * p - d * (k - 1) - 1) // step + 1
            for s, p, d, k, step in zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return rows, cols

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the output, and of each gradient."""
        return self.batch * self.channels * self.out[0] * self.out[1] * self.kernel[0] * self.kernel[1]

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the input and of the output."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def empty(self, like: Tensor, size: Pair) -> Tensor:
        """Return an uninitialized ``(N, C, *size)`` in this memory format."""
        return torch.empty(
            self.batch, self.channels, *size, dtype=like.dtype, device=like.device, memory_format=self.memory_format
        )

    def __str__(self) -> str:
        step = '' if self.stride == (1, 1) else f' stride {self.stride[0]}x{self.stride[1]}'
        layout = 'channels-last' if self.channels_last else 'default layout'
        kernel, size = ('x'.join(map(str, pair)) for pair in (self.kernel, self.size))
        return (
            f'{kernel}{step} on {self.batch}x{self.channels}x{size} {str(self.dtype)[6:]} {layout}, '
            f'{self.threads} threads'
        )


@lru_cache(4096)  # images of many sizes have many shapes
def _describe(x: torch.Size, weight: torch.Size, *others: Any) -> DepthwiseProblem:
    return DepthwiseProblem(x[0], x[1], (x[2], x[3]), (weight[2], weight[3]), *others)
