"""What mmengine wraps around a model and around optimizers, taken off."""
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict


def bare(model: Any) -> Any:
    """A runner's model without what distributes it."""
    return model.module if is_model_wrapper(model) else model


def each(wrapper: OptimWrapper) -> list[OptimWrapper]:
    """The wrappers of single optimizers."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
