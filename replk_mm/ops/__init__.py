"""Depthwise convolution that is fast on CPUs, and fused inference of convolutions."""

import warnings
from typing import Any

from replk_mm.ops.cpu.cost_model import IMPLEMENTATIONS, force_implementation
from replk_mm.ops.cpu.problem import DepthwiseProblem
from replk_mm.ops.depthwise import DepthwiseConv2d, depthwise_conv2d
from replk_mm.ops.fused import fused_conv2d, prepack

__all__ = [
    'IMPLEMENTATIONS',
    'DepthwiseConv2d',
    'DepthwiseProblem',
    'depthwise_conv2d',
    'force_implementation',
    'fused_conv2d',
    'prepack',
]
#: Names of 0.1.0, to be removed in 0.3, and their present ones.
_DEPRECATED = dict(implementation='force_implementation', convolve='fused_conv2d', pack='prepack')


def __getattr__(name: str) -> Any:
    if name not in _DEPRECATED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    message = f'replk_mm.ops.{name} is deprecated: use replk_mm.ops.{_DEPRECATED[name]}'
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return globals()[_DEPRECATED[name]]
