"""Read checkpoints with safetensors, or with torch's ``weights_only`` loader and a short list of safe types.

Apart from tensors and plain Python values, published checkpoints contain ``argparse.Namespace`` (scripts of the authors
and of timm), numpy scalars and arrays, and mmengine's log buffers. The original unpickling code of the last two trusts
the file: a numpy dtype can declare numbers as pointers, and a log buffer can replace its methods. Restricted stand-ins
with the same names replace them here.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer

from replk_mm.errors import UserError, command_line

#: Key of ``meta``, as JSON, in the header of a safetensors file.
META_KEY = 'meta'
# The part of torch's messages that names the rejected object.
_REFUSED = re.compile(r'(?:GLOBAL|Unsupported class|blocklisted module|unrecognized function) ([^\s,]+)')
_NUMBERS = re.compile(r'b1|[iufc]\d{1,2}|[US]\d{1,6}')


class _DType:
    """Stand-in for ``numpy.dtype`` with booleans, numbers and text only."""

    def __init__(self, name: str, *_flags) -> None:
        if not _NUMBERS.fullmatch(name):
            raise pickle.UnpicklingError(f'GLOBAL numpy.dtype({name!r})')
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder('>' if state[1] == '>' else '<')


class _Array(np.ndarray):
    """Stand-in for ``numpy.ndarray`` during unpickling."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, fortran, data))


class _Log(HistoryBuffer):
    """Stand-in for mmengine's log buffer, which ignores the methods named in the file."""

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        history, counts = np.asarray(state['_log_history']), np.asarray(state['_count_history'])
        self.__init__(history, counts, int(state['max_length']))  # type: ignore[misc]


def _named(name: str, item: Any) -> Any:
    """Give ``item`` the name that pickles use."""
    item.__module__, _, item.__qualname__ = name.rpartition('.')
    item.__name__ = item.__qualname__
    return item


def _scalar(dtype: _DType, data: bytes) -> Any:
    return np.ndarray((), dtype.dtype, data).item()


def _function(function: Callable) -> Callable:
    return lambda *args: function(*args)


#: Allowed globals in addition to torch's own. numpy 2 moved the functions that unpickle its arrays.
_ALLOWED = [
    argparse.Namespace,
    set,  # torch 2.5 rejects it
    _named('numpy.dtype', _DType),
    _named('numpy.ndarray', _Array),
    _named('mmengine.logging.history_buffer.HistoryBuffer', _Log),
    # A log buffer stores its methods as getattr(HistoryBuffer, 'mean'); they are not looked up.
    _named('builtins.getattr', lambda owner, name: name),
    *(
        _named(f'numpy.{core}.multiarray.{name}', _function(function))
        for core in ('core', '_core')
        for name, function in (('_reconstruct', lambda *_: _Array((0,), np.int8)), ('scalar', _scalar))
    ),
]


def safe_load(path: Path, map_location: Any = 'cpu', trust: bool = False) -> Any:
    """Read a torch or safetensors file without running code in it.

    Args:
        path: The file. The content decides its format; safetensors returns ``{'state_dict': weights, 'meta': meta}``.
        map_location: Device of the tensors, as in :func:`torch.load`. Defaults to ``'cpu'``.
        trust: Unpickle any object. A torch file can then run any code.

    Raises:
        UserError: If the file is damaged, or would run code.
    """
    try:
        with path.open('rb') as file:
            start = file.read(40)
            if start[6:9] == b'\0\0{':  # the length of safetensors' header, and its begin
                return _load_safetensors(path, map_location)
            if not start.startswith((b'PK', b'\x80')):  # neither a zip archive nor a pickle
                raise UserError(
                    f'{path}: not a checkpoint: it begins with {start!r} ({path.stat().st_size:,} bytes)\n'
                    f'Check the path. If this is a web page or a Git LFS pointer, the download failed: repeat it.'
                )
            file.seek(0)
            with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # torch warns about unknown pickle versions
                return torch.load(file, map_location=map_location, weights_only=not trust)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        if found is None:
            raise _damaged(path, error) from error
        convert = command_line('convert_checkpoint', path, path.with_suffix('.safetensors'), '--trust-checkpoint')
        raise UserError(
            f'{path}: rejected: loading it would run {found[1]}\n'
            f'If you trust its author, convert it to weights without training state: '
            f'{convert}'
        ) from error
    except Exception as error:  # damaged files raise many kinds of errors
        raise _damaged(path, error) from error


def _load_safetensors(path: Path, map_location: Any) -> dict:
    device = str(map_location) if isinstance(map_location, (str, torch.device)) else 'cpu'
    with safetensors.safe_open(path, 'pt', device=device) as file:
        meta = json.loads((file.metadata() or {}).get(META_KEY, '{}'))
        keys = file.keys()  # no mapping
        return {'state_dict': {key: file.get_tensor(key) for key in keys}, 'meta': meta}


def _damaged(path: Path, error: Exception) -> UserError:
    text = str(error).rpartition('WeightsUnpickler error: ')[2].strip()  # after torch's advice to trust the file
    return UserError(
        f'{path}: cannot be read: the file is damaged, truncated or not a checkpoint '
        f'({path.stat().st_size:,} bytes)\n'
        f'The loader reported: {text.splitlines()[0][:200] if text else type(error).__name__}\n'
        f'Copy or download it again, and compare its size and hash with the original.'
    )
