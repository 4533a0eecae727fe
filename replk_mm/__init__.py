"""Large-kernel ConvNets (RepLKNet) and ConvNeXt as first-class OpenMMLab backbones."""
from replk_mm.compat import register_configs

__version__ = '0.1.0'

# `_base_ = 'replk_mm::upernet_replk31b_ade20k.py'` works from here on, in this process.
register_configs()
