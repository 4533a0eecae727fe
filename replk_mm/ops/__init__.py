"""Operators."""
from replk_mm.ops.depthwise import DepthwiseConv2d

__all__ = ['DepthwiseConv2d']
