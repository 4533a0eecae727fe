"""Access to what mmengine wraps: models, optimizers."""

from typing import Any

import torch.nn as nn
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict


def unwrap_model(model: Any) -> Any:
    """The model inside a distributed wrapper; any other model unchanged."""
    return model.module if is_model_wrapper(model) else model


def optim_wrappers(wrapper: OptimWrapper) -> list[OptimWrapper]:
    """The wrappers of all single optimizers."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def num_classes_of(model: nn.Module) -> int | None:
    """Number of classes of a segmentor's main head, the last one of a cascade; None for other models."""
    head = getattr(model, 'decode_head', None)
    return getattr(head[-1] if isinstance(head, nn.ModuleList) else head, 'num_classes', None)
