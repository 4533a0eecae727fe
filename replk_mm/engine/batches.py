"""Batches of any of the libraries as plain data, which a file can hold and a stranger's file cannot abuse.

A batch is nested lists and dicts of tensors, numbers and objects of a few classes of mmengine, mmseg and mmdet. Packed, every
object is a dict that names its class; unpacked, only the classes of a fixed table are built: reading runs no code of the file.
"""
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

#: Classes that a packed batch may name, and where they are. Nothing else is built.
_ELEMENTS = {name: module for module, names in {
    'mmengine.structures': ('BaseDataElement', 'InstanceData', 'LabelData', 'PixelData'),
    'mmseg.structures': ('SegDataSample',), 'mmdet.structures': ('DetDataSample',)}.items() for name in names}
_BOXES = {'HorizontalBoxes': 'mmdet.structures.bbox'}
_MASKS = dict.fromkeys(('BitmapMasks', 'PolygonMasks'), 'mmdet.structures.mask')
_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES = {'list': list, 'tuple': tuple, 'size': torch.Size}


class BadPackage(ValueError):
    """What is to be unpacked was not packed here."""


def pack(value: Any) -> Any:
    """``value`` as tensors on the CPU, numbers, strings, lists and dicts with a ``kind``.

    Samples of a class that is not in the table are packed as the nearest of their base classes that is; what has none is
    left out, and its type is kept in its place.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.detach().to('cpu', copy=True).contiguous()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return _packed_array(value)
    if isinstance(value, Mapping):
        return dict(kind='dict', items=[[pack(key), pack(entry)] for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        kind = 'size' if isinstance(value, torch.Size) else 'list' if isinstance(value, list) else 'tuple'
        return dict(kind=kind, items=[pack(entry) for entry in value])
    known = next((base.__name__ for base in type(value).__mro__ if _module_of(base.__name__) in _parents(base)), None)
    if known in _ELEMENTS:
        # Sorted, for mmengine keeps the names in sets, whose order is another in every process.
        return dict(kind=known, meta=pack(dict(sorted(value.metainfo_items()))), data=pack(dict(sorted(value.items()))))
    if known in _BOXES:
        return dict(kind=known, tensor=pack(value.tensor))
    if known in _MASKS:
        return dict(kind=known, masks=pack(value.masks), height=int(value.height), width=int(value.width))
    return dict(kind='omitted', type=f'{type(value).__module__}.{type(value).__qualname__}')


def _packed_array(array: np.ndarray) -> dict:
    try:
        return dict(kind='array', tensor=torch.from_numpy(np.ascontiguousarray(array)).clone().reshape(array.shape))
    except TypeError:  # of strings or objects
        return dict(kind='objects', items=pack(array.tolist()))


def _module_of(name: str) -> str | None:
    return {**_ELEMENTS, **_BOXES, **_MASKS}.get(name)


def _parents(kind: type) -> list[str]:
    """A class's module and the packages around it."""
    parts = kind.__module__.split('.')
    return ['.'.join(parts[:i]) for i in range(1, len(parts) + 1)]


def unpack(node: Any) -> Any:
    """What :func:`pack` was given; None for what it left out.

    Raises:
        BadPackage: If the node, or something in it, is nothing that :func:`pack` makes.
    """
    try:
        return _unpack(node)
    except BadPackage:
        raise
    except Exception as error:  # constructors of the libraries refuse what does not fit with errors of all kinds
        raise BadPackage(f'{type(error).__name__}: {error}') from error


def _unpack(node: Any) -> Any:
    if isinstance(node, (*_PLAIN, Tensor)):
        return node
    kind = node.get('kind') if isinstance(node, dict) else type(node).__name__
    if not isinstance(node, dict) or not isinstance(kind, str):
        raise BadPackage(f'an entry of type {kind}')
    if kind == 'omitted':
        return None
    if kind == 'dict':
        return {_unpack(key): _unpack(entry) for key, entry in node['items']}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_unpack(entry) for entry in node['items'])
    if kind == 'array':
        return node['tensor'].numpy()
    if kind == 'objects':
        return np.array(_unpack(node['items']))
    module = _module_of(kind)
    if module is None:
        raise BadPackage(f'an entry of kind {kind!r}')
    made = getattr(import_module(module), kind)
    if kind in _BOXES:
        return made(node['tensor'])
    if kind in _MASKS:
        return made(_unpack(node['masks']), node['height'], node['width'])
    element = made(metainfo=_unpack(node['meta']))
    element.set_data(_unpack(node['data']))
    return element


def omitted(node: Any) -> list[str]:
    """Types of what :func:`pack` left out."""
    if isinstance(node, dict):
        return [node['type']] if node.get('kind') == 'omitted' else [t for v in node.values() for t in omitted(v)]
    return [t for v in node for t in omitted(v)] if isinstance(node, list) else []


def tensors_in(node: Any, path: str = '') -> Iterator[tuple[str, Tensor]]:
    """Every tensor and numeric array of a batch, or of what a layer takes and returns, with the path to it."""
    if isinstance(node, Tensor):
        yield path, node
    elif isinstance(node, np.ndarray):
        if node.dtype.kind in 'fiub':
            yield path, torch.from_numpy(np.ascontiguousarray(node))
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from tensors_in(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from tensors_in(value, f'{path}[{i}]')
    elif isinstance(node, BaseDataElement):
        for key, value in node.items():
            yield from tensors_in(value, f'{path}.{key}')
    elif isinstance(getattr(node, 'tensor', None), Tensor):  # boxes
        yield path, node.tensor


def samples_in(batch: Any) -> list[BaseDataElement]:
    """The samples of a batch, one for each image, in the order of the images."""
    if isinstance(batch, BaseDataElement):
        return [batch]
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return [sample for child in children for sample in samples_in(child)]


def image_paths(batch: Any) -> list[str]:
    """Paths of the images of a batch, as far as its samples know them."""
    return [str(Path(sample.get('img_path'))) for sample in samples_in(batch) if sample.get('img_path')]
