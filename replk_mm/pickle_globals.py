"""What torch's loader of plain weights is let read beside tensors: the log that mmengine keeps in its checkpoints."""
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

try:
    from numpy._core import multiarray
except ImportError:  # numpy < 2
    from numpy.core import multiarray  # type: ignore[no-redef]


def _history_method(owner: type, name: str) -> Callable:
    """What ``getattr`` may do in a checkpoint: name one of the statistics of a log buffer."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'the checkpoint asks for attribute {name!r} of {owner!r}')
    return getattr(owner, name)


@functools.cache
def _renamed(function: Callable, name: str) -> Callable:
    """``function`` under the full name that a pickle calls it by."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call.__module__, _, call.__name__ = name.rpartition('.')
    call.__qualname__ = call.__name__
    return call


def harmless_pickles() -> list:
    """Classes and functions that mmengine's checkpoints name and that can do nothing but hold data."""
    # A buffer is pickled with references to its own methods, as calls of `getattr`. The real one would open every object
    # that the list allows, so our restricted one takes its name.
    takes_name = _renamed(_history_method, 'builtins.getattr')
    # numpy 2 moved what unpickles its arrays; files name the place of the numpy that wrote them.
    moved = [_renamed(function, f'numpy.{core}.multiarray.{function.__name__}')
             for function in (multiarray._reconstruct, multiarray.scalar) for core in ('core', '_core')]
    dtypes = {type(np.dtype(kind)) for kind in ('bool', 'int32', 'int64', 'float16', 'float32', 'float64', 'U1')}
    return [HistoryBuffer, takes_name, np.ndarray, np.dtype, *moved, *dtypes]


@contextmanager
def harmless_pickles_allowed() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read mmengine's own checkpoints, whose log buffers it refuses.

    Only for pickles that :func:`replk_mm.pickle_scan.scan` has passed: given other arguments than mmengine's, what is allowed
    here makes memory out of numbers. torch before 2.5 has no list to add to.
    """
    if not hasattr(torch.serialization, 'safe_globals'):
        yield
        return
    known = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([item for item in harmless_pickles() if item not in known]):
        yield
