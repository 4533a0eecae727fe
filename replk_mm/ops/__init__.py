"""Depthwise convolution that is fast on CPUs, and fused inference of convolutions."""

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
