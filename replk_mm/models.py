"""Deprecated import path of :mod:`replk_mm.backbones`. To be removed in 0.3."""

import warnings

from replk_mm.backbones import ConvNeXt, RepLKNet

__all__ = ['ConvNeXt', 'RepLKNet']
warnings.warn('replk_mm.models is deprecated: use replk_mm.backbones', DeprecationWarning, stacklevel=2)
