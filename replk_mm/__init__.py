"""Large-kernel ConvNets (RepLKNet) and ConvNeXt as first-class OpenMMLab backbones."""
import os

from replk_mm.compat import register_configs

__version__ = '0.1.0'

# Pixels that OpenCV makes room for, which it asks when it is imported: Pillow's limit instead of six times as many.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '178956970')

# `_base_ = 'replk_mm::upernet_replk31b_ade20k.py'` works from here on, in this process.
register_configs()
