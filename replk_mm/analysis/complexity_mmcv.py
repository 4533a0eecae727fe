"""Multiply-accumulates as mmcv's counter of the papers' time counts them."""
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn import get_model_complexity_info
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.analysis.complexity import on_meta
from replk_mm.analysis.complexity_forward import forward
from replk_mm.ops import DepthwiseConv2d


class _Pass(nn.Module):
    """A network whose forward pass is the one that is counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        forward(self.model, image)


def macs(model: nn.Module, shape: tuple[int, int]) -> int:
    """Multiply-accumulates of one inference on one image, by ``mmcv.cnn.get_model_complexity_info``.

    It goes by layers of torch's and mmcv's own classes. Beside convolutions and linear layers, as torch's counter counts
    them, it counts a bias once for each output, ReLU and pooling once, and BatchNorm, GroupNorm and LayerNorm twice for each
    number; SyncBN, GELU, layer scales, interpolation, norms of classes of one's own and whatever is no layer count as nothing.

    Args:
        model: A segmentor, detector or backbone, on any device; not changed.
        shape: Height and width of the image in pixels.
    """
    whole: Any = _Pass(on_meta(model))
    ours: list[Any] = [module for module in whole.modules() if type(module) is DepthwiseConv2d]
    for module in ours:
        module.__class__ = nn.Conv2d  # the authors' class: the counter knows no classes but torch's and mmcv's
    # Under torch's counter every network runs layer by layer.
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False):
        return int(get_model_complexity_info(whole, (3, *shape), print_per_layer_stat=False, as_strings=False)[0])
