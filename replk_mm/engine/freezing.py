"""Frozen backbones, as a config with ``freeze_backbone = True`` trains them."""

from typing import Any

import torch
import torch.nn as nn

from replk_mm.backbones.adapters import HFBackbone, TimmBackbone
from replk_mm.errors import UserError
from replk_mm.wrappers import unwrap_model


def freeze_backbone(model: nn.Module) -> None:
    """Freeze the backbone of a segmentor or detector, in place: no gradients, and evaluation mode for good.

    ``train()`` does not undo it: stochastic depth and dropout stay inactive, statistics of BatchNorm stay fixed. Names
    of weights do not change. Of a network of timm or transformers, the layers that make maps of other strides are new
    and stay trainable.

    Raises:
        UserError: If the model has no backbone.
    """
    backbone: Any = getattr(unwrap_model(model), 'backbone', None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f'freeze_backbone: {type(model).__name__} has no backbone\nUse a segmentor or a detector.')
    module = backbone.net if isinstance(backbone, (HFBackbone, TimmBackbone)) else backbone
    kind: Any = type(module)

    def train(self: Any, mode: bool = True) -> Any:
        return kind.train(self, False) or self  # mmdet's backbones return None

    # A subclass: a copy of the module, as for averaged weights, stays frozen. Functions on the instance would not.
    module.__class__ = type(kind.__name__, (kind,), dict(train=train, forward=torch.no_grad()(kind.forward)))
    module.requires_grad_(False).train()
