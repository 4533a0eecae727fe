"""Tensors and plain Python data, which ``torch.load(weights_only=True)`` takes without a list of classes."""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

_PLAIN = (bool, int, float, complex, str, bytes)
_TORCH = (torch.Tensor, torch.dtype, torch.device, torch.Size)


def plain(value: Any, place: str = 'checkpoint') -> Any:
    """``value`` with tensors and plain Python data only.

    Arrays and numpy scalars become lists and numbers, mappings dicts, paths text, mmengine's log buffers a dict of
    tensors (see :func:`log_buffer`). An entry of a mapping that is none of these (a function, an object) is left out
    with a warning.

    Args:
        value: A checkpoint or a part of one.
        place: Its keys, for the warning.

    Raises:
        TypeError: If ``value`` itself, or an item of a list in it, is none of these.
    """
    if value is None or type(value) in _PLAIN or isinstance(value, _TORCH):
        return value
    if isinstance(value, HistoryBuffer):
        values, counts = value.data
        return {'values': torch.as_tensor(values), 'counts': torch.as_tensor(counts), 'max_length': value.max_length}
    if isinstance(value, Mapping):
        return _plain_dict(value, place)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item, f'{place}[{index}]') for index, item in enumerate(value)]
        return items if isinstance(value, list) else set(items) if isinstance(value, (set, frozenset)) else tuple(items)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value)  # type: ignore[arg-type]
    raise TypeError(f'{place} is a {type(value).__name__}')


def _plain_dict(mapping: Mapping, place: str) -> dict:
    out: dict = OrderedDict() if isinstance(mapping, OrderedDict) else {}
    for key, value in mapping.items():
        try:
            out[plain(key, place)] = plain(value, f'{place}.{key}')
        except TypeError as error:
            print_log(f'left out of the checkpoint: {error}', logger='current', level=logging.WARNING)
    if hasattr(mapping, '_metadata'):  # versions of the modules of a state dict
        out._metadata = mapping._metadata  # type: ignore[attr-defined]
    return out


def log_buffer(stored: Any) -> Any:
    """mmengine's log buffer out of what :func:`plain` has made of it; anything else as it is."""
    if isinstance(stored, Mapping) and stored.keys() == {'values', 'counts', 'max_length'}:
        return HistoryBuffer(stored['values'].numpy(), stored['counts'].numpy(), stored['max_length'])
    return stored
