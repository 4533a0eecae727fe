"""Access to what mmengine and torch wrap: models, optimizers."""

from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict

#: Names of the inner module in torch's wrappers: ``torch.compile``, FSDP, activation checkpointing.
_INNER = ('_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')


def _inner_module(model: Any) -> Any:
    """The module that a wrapper wraps; None if ``model`` is no wrapper."""
    name = next((name for name in _INNER if name in getattr(model, '_modules', {})), None)
    return getattr(model, name or 'module') if name or is_model_wrapper(model) else None


def unwrap_model(model: Any) -> Any:
    """The model inside all wrappers: data parallelism, FSDP, ``torch.compile``. Any other model unchanged."""
    while (inner := _inner_module(model)) is not None:
        model = inner
    return model


def named_unwrapped_parameters(model: nn.Module, prefix: str = '') -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield name, parameter and owner of each parameter, as ``named_parameters(remove_duplicate=False)`` does.

    The names are those of the model without wrappers, also around single modules of it.
    """
    yield from ((prefix + name, param, model) for name, param in model._parameters.items() if param is not None)
    for name, child in model._modules.items():
        if child is not None:
            wrapped = child is _inner_module(model)
            yield from named_unwrapped_parameters(child, prefix if wrapped else f'{prefix}{name}.')


def optim_wrappers(wrapper: OptimWrapper) -> list[OptimWrapper]:
    """The wrappers of all single optimizers."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def num_classes_of(model: nn.Module) -> int | None:
    """Number of classes of a segmentor's main head, the last one of a cascade; None for other models."""
    head = getattr(model, 'decode_head', None)
    return getattr(head[-1] if isinstance(head, nn.ModuleList) else head, 'num_classes', None)


def input_channels(model: nn.Module) -> int:
    """Channels of a network's images: as many as the mean in its data preprocessor, or else as its stem takes."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if mean is not None and len(mean) > 1:
        return len(mean)
    stem = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)
    return stem // 4 if any(type(part).__name__ == 'Focus' for part in model.modules()) else stem  # YOLOX: 2x2 pixels
