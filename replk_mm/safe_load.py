"""Load a checkpoint that a stranger made: none of its code runs, and it takes no more memory than a file of its size needs."""
import os
import pickle
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from replk_mm import pickle_scan
from replk_mm.errors import UserError
from replk_mm.pickle_globals import harmless_pickles_allowed

#: Memory that loading may take beside that of the file itself, and the most a single tensor may have more than the file
#: (a view may repeat its values), bytes.
_SPARE, _REPEATED = 2 << 30, 1 << 30
#: Pickles at the start of a file in torch's format from before 1.6: a mark, a version, sizes, the content, names of storages.
_PICKLES = 5
_ZIP = b'PK\x03\x04'
_BOUND = threading.RLock()
_REMEDY = ('A checkpoint of plain weights needs no code. If you know who made this file and trust them, pass '
           '--trust-checkpoint.')


def load(path: Path, remedy: str = _REMEDY) -> Any:
    """Read a file of torch onto the CPU.

    Args:
        path: Of the file.
        remedy: What to say to those who trust it nevertheless.

    Raises:
        UserError: If it is damaged, would run code, or asks for more than a checkpoint of its size needs.
    """
    try:
        with bounded_memory(4 * path.stat().st_size + _SPARE):
            _check(path)
            with harmless_pickles_allowed(), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of pickles it may not understand; what it makes of them is looked at
                loaded = torch.load(path, map_location='cpu', weights_only=True)
    except pickle_scan.Unsafe as error:
        raise UserError(f'{path}: refused: {error}\n{remedy}') from error
    except pickle.UnpicklingError as error:
        reason = _unsafe_global(str(error))
        if reason is None:
            raise damaged(path, error) from error
        raise UserError(f'{path}: refused: to load it, {reason} would have to run\n{remedy}') from error
    except Exception as error:  # a few changed bytes make torch raise errors of a dozen kinds
        raise damaged(path, error) from error
    for name, tensor in _tensors(loaded):
        wrong = _misfit(tensor, path)
        if wrong:
            raise UserError(f'{path}: refused: {name} is {wrong}\nA checkpoint of weights has dense tensors of its own size. '
                            f'Save its tensors with .contiguous().')
    return loaded



def damaged(path: Path, error: Exception) -> UserError:
    """What to say of a file that torch cannot read."""
    text = str(error).strip()
    return UserError(f'{path}: not a readable checkpoint: damaged, cut off or no checkpoint at all '
                     f'({path.stat().st_size:,} bytes)\n'
                     f'torch says: {text.splitlines()[0][:200] if text else type(error).__name__}\n'
                     f'Copy or download it again, and compare its size and hash with the source.')


def _unsafe_global(message: str) -> str | None:
    for marker in ('GLOBAL ', 'Unsupported class ', 'asks for attribute', 'blocklisted module '):
        if marker in message:
            return message[message.index(marker) + len(marker):].split(' was not')[0].split('\n')[0].strip()
    return 'an unlisted function' if 'Trying to' in message else None


def _check(path: Path) -> None:
    """Look at the pickles and at the sizes that the file claims."""
    size = path.stat().st_size
    with path.open('rb') as file:
        head = file.read(tarfile.BLOCKSIZE)
        if head.startswith(_ZIP):
            lengths = _records(path, size)
            storages = pickle_scan.scan(torch._C.PyTorchFileReader(str(path)).get_record('data.pkl'))
        elif _is_tar(head):
            raise pickle_scan.Unsafe('it is a tar archive, which torch has long ceased to write')
        else:
            file.seek(0)
            lengths = None
            storages = [storage for _ in range(_PICKLES) for storage in pickle_scan.scan(file)]
    claimed: dict[object, int] = {}
    for storage in storages:
        key, length = _claim(storage)
        if lengths is not None and lengths.get(key) != length:
            raise ValueError(f'storage {key}: {length:,} bytes are expected, and {lengths.get(key, 0):,} there')
        claimed[key] = max(length, claimed.get(key, 0))
    if sum(claimed.values()) > size:
        raise pickle_scan.Unsafe(f'it asks for {sum(claimed.values()):,} bytes of weights, and the file has {size:,}')


def _is_tar(head: bytes) -> bool:
    """Whether torch takes a file that begins like this for one of its first form, which another loader reads."""
    try:
        tarfile.TarInfo.frombuf(head, 'utf-8', 'surrogateescape')
    except tarfile.HeaderError:
        return False
    return True


def _records(path: Path, size: int) -> dict[object, int]:
    """Bytes of every storage of a zip file by its key."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise pickle_scan.Unsafe(f'{packed.filename} in it is compressed, to {packed.file_size:,} bytes from '
                                 f'{packed.compress_size:,}, which torch never does')
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise pickle_scan.Unsafe(f'its entries have {total:,} bytes, and the file {size:,}')
    folder = f'{entries[0].filename.partition("/")[0]}/data/' if entries else ''
    return {entry.filename[len(folder):]: entry.file_size for entry in entries if entry.filename.startswith(folder)}


def _claim(storage: pickle_scan.Item) -> tuple[str, int]:
    """Key and bytes of a storage in a persistent id, ``('storage', class, key, location, elements)``."""
    mark, kind, key, _, elements = storage.parts[:5]
    if mark != 'storage' or not isinstance(kind, pickle_scan.Item) or type(elements) is not int or elements < 0 or (
            not isinstance(key, str)):
        raise ValueError('a storage without a type, a name or a size')
    if kind.name == 'torch.storage.UntypedStorage':
        return key, elements
    dtype = torch.storage._storage_type_to_dtype_map().get(kind.name.rpartition('.')[2])
    if dtype is None:
        raise ValueError(f'a storage of type {kind.name}')
    return key, elements * dtype.itemsize


def _tensors(node: Any, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested containers, with the keys that lead to it."""
    if isinstance(node, torch.Tensor):
        yield name or 'its content', node
    elif isinstance(node, (Mapping, list, tuple)):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            if isinstance(value, (torch.Tensor, Mapping, list, tuple)):
                yield from _tensors(value, f'{name}.{key}'.lstrip('.')[-100:])


def _misfit(tensor: torch.Tensor, path: Path) -> str | None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return f'a {type(tensor).__name__} of layout {tensor.layout}, dtype {tensor.dtype}'
    if tensor.device.type != 'cpu':
        return f'a tensor on device {tensor.device}'
    size = tensor.numel() * tensor.element_size()
    if size > path.stat().st_size + _REPEATED:
        return f'a view of {size:,} bytes in a file of {path.stat().st_size:,}'
    return None


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Let this process take only so many bytes more than it has, on Linux: what asks for more gets a MemoryError.

    The bound is of the whole process, so that threads come one after the other.
    """
    if sys.platform != 'linux':
        yield
        return
    import resource

    with _BOUND:
        pages = int(Path('/proc/self/statm').read_text().split()[5])
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        bound = pages * os.sysconf('SC_PAGE_SIZE') + more
        if soft == resource.RLIM_INFINITY or bound < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
