"""Deprecated import path of :mod:`replk_mm.deploy.equivalence`. To be removed in 0.3."""

import warnings

from replk_mm.deploy.equivalence import compare_networks as compare

__all__ = ['compare']
warnings.warn(
    'replk_mm.equivalence.compare is deprecated: use replk_mm.deploy.equivalence.compare_networks',
    DeprecationWarning,
    stacklevel=2,
)
