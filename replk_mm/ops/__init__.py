"""Operators."""

from replk_mm.ops.cpu.cost_model import IMPLEMENTATIONS, implementation
from replk_mm.ops.depthwise import DepthwiseConv2d, depthwise_conv2d
from replk_mm.ops.fused import convolve, pack
from replk_mm.ops.problem import Problem

__all__ = ['IMPLEMENTATIONS', 'DepthwiseConv2d', 'Problem', 'convolve', 'depthwise_conv2d', 'implementation', 'pack']
