"""Read a checkpoint as data: by safetensors, or by torch's ``weights_only`` loader and a short list of harmless types.

Beside tensors and plain Python values, checkpoints in circulation hold ``argparse.Namespace`` (the authors' and
timm's scripts), numpy scalars and arrays, and mmengine's log buffers. Unpickling the last two trusts the file: a
numpy dtype can declare numbers to be pointers, a log buffer can replace its methods. Classes of the same names
without these powers take their place here.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer

from replk_mm.errors import UserError, command_line

#: Key of the record (``meta``) in the header of a safetensors file, as JSON.
META_KEY = 'meta'
# How torch's messages name what a file asks for.
_REFUSED = re.compile(r'(?:GLOBAL|Unsupported class|blocklisted module|unrecognized function) ([^\s,]+)')
_NUMBERS = re.compile(r'b1|[iufc]\d{1,2}|[US]\d{1,6}')


class _DType:
    """Stands for ``numpy.dtype``: booleans, numbers and text only."""

    def __init__(self, name: str, *_flags) -> None:
        if not _NUMBERS.fullmatch(name):
            raise pickle.UnpicklingError(f'GLOBAL numpy.dtype({name!r})')
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder('>' if state[1] == '>' else '<')


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray`` while it is filled."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, fortran, data))


class _Log(HistoryBuffer):
    """Stands for mmengine's log buffer; its methods stay its own, whatever the file names."""

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        history, counts = np.asarray(state['_log_history']), np.asarray(state['_count_history'])
        self.__init__(history, counts, int(state['max_length']))  # type: ignore[misc]


def _named(name: str, item: Any) -> Any:
    """``item`` under the name by which pickles call it."""
    item.__module__, _, item.__qualname__ = name.rpartition('.')
    item.__name__ = item.__qualname__
    return item


def _scalar(dtype: _DType, data: bytes) -> Any:
    return np.ndarray((), dtype.dtype, data).item()


def _function(function: Callable) -> Callable:
    return lambda *args: function(*args)


#: What a checkpoint may name beside what torch allows. numpy 2 moved what unpickles its arrays.
_ALLOWED = [
    argparse.Namespace,
    _named('numpy.dtype', _DType),
    _named('numpy.ndarray', _Array),
    _named('mmengine.logging.history_buffer.HistoryBuffer', _Log),
    # A buffer names its own methods, as getattr(HistoryBuffer, 'mean'); they are not taken from the file.
    _named('builtins.getattr', lambda owner, name: name),
    *(
        _named(f'numpy.{core}.multiarray.{name}', _function(function))
        for core in ('core', '_core')
        for name, function in (('_reconstruct', lambda *_: _Array((0,), np.int8)), ('scalar', _scalar))
    ),
]


def safe_load(path: Path, map_location: Any = 'cpu', trust: bool = False) -> Any:
    """Read a file of torch or safetensors, without running anything in it unless told to trust it.

    Args:
        path: The file. One that ends in ``.safetensors`` gives ``{'state_dict': weights, 'meta': its record}``.
        map_location: Device of the tensors, as :func:`torch.load` takes it. Defaults to the CPU.
        trust: Unpickle anything, which lets a file of torch run any program.

    Raises:
        UserError: If the file is damaged, or asks for code to be run.
    """
    try:
        if path.suffix == '.safetensors':
            return _load_safetensors(path, map_location)
        # torch 2.4 has no such list to extend.
        safe_globals = getattr(torch.serialization, 'safe_globals', nullcontext)
        with safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about pickles that it may not understand
            return torch.load(path, map_location=map_location, weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        if found is None:
            raise _damaged(path, error) from error
        convert = command_line('convert_checkpoint', path, path.with_suffix('.safetensors'), '--trust-checkpoint')
        raise UserError(
            f'{path}: refused: to load it, {found[1]} would have to run\n'
            f'If you trust its author, convert it to plain weights, without the state to resume from: '
            f'{convert}'
        ) from error
    except Exception as error:  # a few changed bytes make torch raise errors of a dozen kinds
        raise _damaged(path, error) from error


def _load_safetensors(path: Path, map_location: Any) -> dict:
    device = str(map_location) if isinstance(map_location, (str, torch.device)) else 'cpu'
    with safetensors.safe_open(path, 'pt', device=device) as file:
        meta = json.loads((file.metadata() or {}).get(META_KEY, '{}'))
        keys = file.keys()  # no mapping
        return {'state_dict': {key: file.get_tensor(key) for key in keys}, 'meta': meta}


def _damaged(path: Path, error: Exception) -> UserError:
    text = str(error).strip()
    return UserError(
        f'{path}: not a readable checkpoint: damaged, cut off or no checkpoint at all '
        f'({path.stat().st_size:,} bytes)\n'
        f'The loader reports: {text.splitlines()[0][:200] if text else type(error).__name__}\n'
        f'Copy or download it again, and compare its size and hash with the source.'
    )
