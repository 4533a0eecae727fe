"""Read checkpoints without running code in them, and write them as tensors and plain data."""

import functools
import hashlib
import inspect
import io
import json
import logging
import re
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeInt, ValidationError

from replk_mm.checkpoints.safe_load import META_KEY, safe_load
from replk_mm.errors import UserError, first_line, format_list
from replk_mm.files import sha256, write_atomic
from replk_mm.logs import announce
from replk_mm.wrappers import unwrap_model


class DownloadError(UserError):
    """The checkpoint cannot be downloaded."""


class CheckpointNotFoundError(UserError, FileNotFoundError):
    """The checkpoint does not exist. Programs that use mmengine catch ``FileNotFoundError``."""


def fetch_checkpoint(checkpoint: str | Path, folder: str | Path | None = None, progress: bool = True) -> Path:
    """Return the local path of a checkpoint; download it first if ``checkpoint`` is a URL or a name on Hugging Face.

    A download is cached under its whole URL, because many files share a name, such as ``pytorch_model.bin``. If the
    name has digits of its SHA-256, as ``NAME-1a2b3c4d.pth``, the file is verified.

    Args:
        checkpoint: Path, URL, ``hf-hub:OWNER/NAME`` with an optional ``@REVISION``, ``package:MODULE/PATH`` for a file
            of an installed package, or a folder with the weights of one model. For sharded weights, the index file; for
            the folder of an exported network, its manifest.
        folder: Where downloads go. Defaults to torch's cache.
        progress: Show a progress bar. Defaults to True.

    Raises:
        DownloadError: If the download fails.
        CheckpointNotFoundError: If the file does not exist, or a folder does not contain exactly one model.
    """
    name = str(checkpoint)
    if name.startswith(_HUB):
        return _fetch_from_hub(name)
    if name.startswith(_PACKAGE):
        return _find_in_package(name)
    if not name.startswith(_REMOTE):
        path = Path(unquote(urlsplit(name).path) if name.startswith('file://') else name)
        try:
            path = path.expanduser()
            if path.is_file():
                return path
            is_folder, why = path.is_dir(), ''
        except (OSError, RuntimeError) as error:  # a name that is too long, an unknown user
            is_folder, why = False, f' ({error})'
        if is_folder:
            return _weights_in_folder(path)
        raise CheckpointNotFoundError(f'{path}: no such checkpoint{why}')
    path = download_path(name, folder)
    timeout = socket.getdefaulttimeout()
    try:
        if path.is_file():
            announce(f'{name}: already downloaded to {path}')
            return path
        announce(f'downloading {name} to {path}')
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = sha256_in_name(name)
        verify = dict(hash_prefix=expected) if expected else {}
        socket.setdefaulttimeout(_TIMEOUT)  # torch.hub has none
        torch.hub.download_url_to_file(name, str(path), progress=progress, **verify)
        with path.open('rb') as file:
            page = _PAGE.match(begin := file.read(512))
        if page or (begin.startswith(b'PK') and not zipfile.is_zipfile(path)):
            path.unlink()
            raise OSError('the address is a web page, not a file' if page else 'the file is incomplete')
    except (OSError, ValueError, RuntimeError, HTTPException) as error:
        raise DownloadError(
            f'{name:.200}: the checkpoint could not be downloaded ({error!s:.150})\n'
            f'Check URL and network, or download it with a browser: copy the file to {path!s:.200}, or pass its path.'
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def download_path(url: str, folder: str | Path | None = None) -> Path:
    """Where :func:`fetch_checkpoint` keeps the download of a URL."""
    cached = f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{PurePosixPath(url.split("?")[0]).name}'
    return Path(folder or Path(torch.hub.get_dir()) / 'checkpoints') / cached


def local_files(checkpoint: str | Path) -> list[Path]:
    """The files that reading a checkpoint opens; none if it does not exist or is downloaded."""
    if str(checkpoint).startswith(_REMOTE):
        return []
    try:
        path = fetch_checkpoint(checkpoint)
        return [path, *set(_shards(path).values())] if path.name.endswith(_INDEX) else [path]
    except UserError:  # reading it reports the reason
        return []


def sha256_in_name(url: str) -> str | None:
    """The first digits of a file's SHA-256 that its name has, as in torch.hub; None if there are none."""
    found = re.search(r'-([0-9a-f]{8,64})\.\w+$', url)
    return found and found[1]


#: Seconds without an answer after which a download fails.
_TIMEOUT = 30.0
_PAGE = re.compile(rb'\s*<(!doctype )?html', re.IGNORECASE)
_HUB = ('hf-hub:', 'hf_hub:')  # the prefixes of timm
_REMOTE = ('http://', 'https://', *_HUB)
_PACKAGE = 'package:'
_INDEX = '.index.json'
#: Describes the exported network in a folder, see :mod:`replk_mm.deploy.artefact`.
MANIFEST = 'manifest.json'
#: Weights in a folder: the only file of the first pattern that matches.
_WEIGHTS = (
    *(f'{name}{end}' for name in ('model.safetensors', 'pytorch_model.bin') for end in ('', _INDEX)),
    *('*.safetensors', '*.bin', '*.pth', '*.pt'),
)


def is_export(folder: Path) -> bool:
    """Whether a folder has the manifest of an exported network; other programs write files of this name too."""
    try:
        found = json.loads(Path(folder, MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {'generator', 'schema_version', 'network'} <= found.keys()


def _weights_in_folder(folder: Path) -> Path:
    if is_export(folder):
        return folder / MANIFEST
    files = next((files for pattern in _WEIGHTS if (files := sorted(folder.glob(pattern)))), [])
    # OpenVINO's network.bin looks like weights.
    exported = any(Path(folder, f'network.{end}').exists() for end in ('onnx', 'xml', 'pt2'))
    if exported or (not files and Path(folder, MANIFEST).exists()):
        raise UserError(
            f'{folder / MANIFEST}: is missing or damaged, so that this is no exported network\n'
            f'Copy the whole folder, or export the network again.'
        )
    if len(files) != 1:
        raise CheckpointNotFoundError(
            f'{folder}: no such checkpoint (a folder with {format_list(file.name for file in files) or "no weights"})\n'
            f'Pass the path of one file.'
        )
    return files[0]


def _fetch_from_hub(name: str) -> Path:
    repository, _, revision = name[len(_HUB[0]) :].partition('@')
    announce(f'{name}: downloading, unless it is in the cache of Hugging Face')
    try:
        from huggingface_hub import snapshot_download

        for pattern in ('*.safetensors', '*.bin'):
            files = [pattern, pattern + _INDEX]
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
            if any(folder.glob(pattern)):
                break
    except Exception as error:  # of the package, its HTTP library or the system
        raise DownloadError(
            f'{name:.200}: cannot be downloaded ({first_line(error):.200})\n'
            f'This needs a network and the package huggingface_hub (pip install huggingface_hub). '
            f'Or download the file yourself and pass its path.'
        ) from error
    return _weights_in_folder(folder)


def _find_in_package(name: str) -> Path:
    module, _, path = name.removeprefix(_PACKAGE).partition('/')
    spec = find_spec(module) if module.isidentifier() else None
    for folder in (spec and spec.submodule_search_locations) or ():
        if '..' not in path and (file := Path(folder, path.lstrip('/'))).is_file():
            return file
    raise CheckpointNotFoundError(
        f'{name}: {f"the package {module} has no such file" if spec else "this package is not installed"}\n'
        f'Run make setup EXTRAS=weights, or pip install {module.replace("_", "-")}.'
    )


def _shards(index: Path) -> dict[str, Path]:
    """The file of each weight in an index of shards."""
    try:
        return {str(key): index.parent / name for key, name in json.loads(index.read_text())['weight_map'].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index}: not an index of shards ({error!r:.200})\nDownload it again.') from error


def _read_shards(index: Path, map_location: Any, trust: bool) -> dict:
    shards, weights = _shards(index), {}
    for path in sorted(set(shards.values())):
        shard = safe_load(fetch_checkpoint(path), map_location, trust)
        weights.update(shard.get('state_dict', shard))
    if missing := sorted(shards.keys() - weights.keys()):
        raise UserError(f'{shards[missing[0]]}: lacks {missing[0]}, which is in {index}\nDownload both again.')
    return {'state_dict': weights}


def _read_manifest(path: Path) -> dict:
    """Classes of an exported network, as ``meta`` of a checkpoint without weights."""
    try:
        manifest = json.loads(path.read_bytes())
        dataset = {key: manifest[key] for key in ('classes', 'palette')}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: is no manifest of an exported network ({error!r:.200})\nExport it again.') from error
    meta = {
        'dataset_meta': dataset,
        'iter': manifest.get('iteration'),
        'replk_mm': {'reparameterized': {'merge': True, 'fold': True}},
    }
    return {'meta': _validated_meta(meta, path), 'state_dict': {}}


def hash_checkpoint(path: Path) -> str:
    """SHA-256 of a checkpoint, in hexadecimal; for an index, of the hashes of its shards in order of name."""
    if not path.name.endswith(_INDEX):
        return sha256(path)
    return hashlib.sha256(''.join(map(sha256, sorted(set(_shards(path).values())))).encode()).hexdigest()


def read_checkpoint(checkpoint: str | Path, map_location: Any = 'cpu', trust: bool = False) -> dict:
    """Read a checkpoint without running code in it.

    Args:
        checkpoint: A torch file, a safetensors file or an index of shards: as in :func:`fetch_checkpoint`.
        map_location: Device of the tensors, as in :func:`torch.load`. Defaults to ``'cpu'``.
        trust: Unpickle any object. The file can then run any code. Defaults to False.

    Raises:
        UserError: If the file does not exist, is damaged, would run code, or does not contain a dict.
    """
    path = fetch_checkpoint(checkpoint)
    if path.name == MANIFEST:
        return _read_manifest(path)
    loaded = (_read_shards if path.name.endswith(_INDEX) else safe_load)(path, map_location, trust)
    if not isinstance(loaded, Mapping):
        raise UserError(f'{path}: contains a {type(loaded).__name__}\nA checkpoint is a dict of tensors.')
    if 'meta' in loaded:
        return {**loaded, 'meta': _validated_meta(loaded['meta'], path)}
    return dict(loaded)


class _Reparameterized(BaseModel):
    merge: bool
    fold: bool


class _PackageMeta(BaseModel):
    reparameterized: _Reparameterized | None = None


class _DatasetMeta(BaseModel):
    classes: list[str] | tuple[str, ...] | None = None
    palette: list[list | tuple] | tuple[list | tuple, ...] | None = None


def _lower_keys(value: Any) -> Any:
    return {str(key).lower(): item for key, item in value.items()} if isinstance(value, Mapping) else value


class _Meta(BaseModel):
    """The fields of ``meta`` that this package reads; all others are accepted as they are."""

    model_config = ConfigDict(strict=True)

    iter: NonNegativeInt | None = None
    epoch: NonNegativeInt | None = None
    seed: NonNegativeInt | None = None
    dataset_meta: Annotated[_DatasetMeta | None, BeforeValidator(_lower_keys)] = None
    replk_mm: _PackageMeta = _PackageMeta()


def _validated_meta(meta: Any, path: Path) -> dict[str, Any]:
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    try:
        _Meta.model_validate({key: value for key, value in meta.items() if key in _Meta.model_fields})
    except ValidationError as error:
        field = error.errors()[0]['loc'][0]
        raise UserError(
            f'{path}: meta.{field} has an invalid value: {meta[field]!r:.80}\n'
            f"Get the file again, or keep only its weights: torch.save({{'state_dict': ...}}, FILE)."
        ) from error
    return meta


def register_safe_loaders() -> None:
    """Make mmengine's own loading in this process, such as ``init_cfg`` of any package, use :func:`read_checkpoint`.

    mmengine 0.10.7 unpickles downloads with any code in them. With torch 2.6 and newer it cannot read the log buffers
    in its own checkpoints. It also accepts weights of which none fits, such as those under another prefix. This changes
    mmengine for the whole process; only our commands and ``python -m replk_mm.mmcv_ops`` call it.
    """
    from mmengine.runner import checkpoint

    def load(filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = True) -> dict:
        return read_checkpoint(fetch_checkpoint(filename, model_dir, progress), map_location or 'cpu')

    load_weights = inspect.unwrap(checkpoint.load_state_dict)

    @functools.wraps(load_weights)
    def load_some(module: torch.nn.Module, weights: Mapping, *args, **kwargs) -> None:
        own = {key: value for key, value in unwrap_model(module).state_dict().items() if not key.endswith('_tracked')}
        missing = [key for key in own if getattr(weights.get(key), 'shape', None) != own[key].shape]
        what = f'{type(module).__name__}: the checkpoint fits {len(own) - len(missing)} of {len(own)} weights'
        if own and (len(missing) == len(own) or any(key.startswith('backbone.') for key in missing)):
            raise UserError(f'{what}; its keys begin with {format_list(weights, 3)}\nSet the prefix in init_cfg.')
        if missing:
            announce(f'warning: {what}, not {format_list(missing)}', logging.WARNING)
        load_weights(module, weights, *args, **kwargs)

    checkpoint.load_state_dict = load_some
    # The loaders of other schemes call these functions by name.
    checkpoint.load_from_local = checkpoint.load_from_http = load
    checkpoint.CheckpointLoader.register_scheme(('', 'http://', 'https://'), load, force=True)


def save_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint atomically, as tensors and plain data.

    Args:
        checkpoint: For ``.safetensors``, a dict of ``state_dict`` and ``meta``; ``meta`` goes into the file's header.
        path: The file; its folder is created if needed.

    Raises:
        UserError: If the file cannot be written, or ``.safetensors`` cannot store a key. An existing file is kept.
    """
    path, content = Path(path), to_plain_data(checkpoint)
    if path.suffix == '.safetensors':
        if extra := content.keys() - {'state_dict', 'meta'}:
            raise UserError(
                f'{path}: a safetensors file stores weights only, not {", ".join(sorted(extra))}\n'
                f'Choose a file name that ends in .pth.'
            )
        weights = {key: value.detach().clone().contiguous() for key, value in content['state_dict'].items()}
        data = safetensors.torch.save(weights, {'format': 'pt', META_KEY: json.dumps(content.get('meta', {}))})
    else:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error})\nChoose another path, or free some space.') from error


_PLAIN = (bool, int, float, complex, str, bytes)
_TORCH = (torch.Tensor, torch.dtype, torch.device, torch.Size)


def to_plain_data(value: Any, name: str = 'checkpoint') -> Any:
    """Convert a value to what ``torch.load(weights_only=True)`` reads without a list of classes.

    Arrays and numpy scalars become lists and numbers, mappings become dicts, and paths become strings. mmengine's log
    buffers become dicts of tensors; :func:`restore_log_buffer` converts them back. An entry of a mapping that has no
    plain form, such as a function, is dropped with a warning.

    Args:
        value: A checkpoint or a part of it.
        name: Name of ``value`` in warnings.

    Raises:
        TypeError: If ``value`` itself, or an item of a list in it, has no plain form.
    """
    if value is None or type(value) in _PLAIN or isinstance(value, _TORCH):
        return value
    if isinstance(value, HistoryBuffer):
        values, counts = value.data
        return {'values': torch.as_tensor(values), 'counts': torch.as_tensor(counts), 'max_length': value.max_length}
    if isinstance(value, Mapping):
        return _to_plain_dict(value, name)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [to_plain_data(item, f'{name}[{index}]') for index, item in enumerate(value)]
        return items if isinstance(value, list) else set(items) if isinstance(value, (set, frozenset)) else tuple(items)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value)  # type: ignore[arg-type]
    raise TypeError(f'{name} is a {type(value).__name__}')


def _to_plain_dict(mapping: Mapping, name: str) -> dict:
    out: dict = OrderedDict() if isinstance(mapping, OrderedDict) else {}
    for key, value in mapping.items():
        try:
            out[to_plain_data(key, name)] = to_plain_data(value, f'{name}.{key}')
        except TypeError as error:
            announce(f'warning: not saved in the checkpoint: {error}', logging.WARNING)
    if hasattr(mapping, '_metadata'):  # module versions of a state dict
        out._metadata = mapping._metadata  # type: ignore[attr-defined]
    return out


def restore_log_buffer(stored: Any) -> Any:
    """Convert the dict that :func:`to_plain_data` makes of a log buffer back to one; return anything else unchanged."""
    if isinstance(stored, Mapping) and stored.keys() == {'values', 'counts', 'max_length'}:
        return HistoryBuffer(stored['values'].numpy(), stored['counts'].numpy(), stored['max_length'])
    return stored
