"""What a checkpoint says of itself, ``meta``: read by many, so that it is checked once, when the file is read."""
from collections.abc import Callable, Mapping
from typing import Any

from replk_mm.errors import UserError


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _names(value: object) -> bool:
    return value is None or isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _colours(value: object) -> bool:
    return value is None or isinstance(value, (list, tuple)) and all(
        isinstance(colour, (list, tuple)) and len(colour) == 3 and all(_count(part) and part < 256 for part in colour)
        for colour in value)


def _mapping(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _merging(value: object) -> bool:
    return value is None or _mapping(value) and (not value or all(
        isinstance(value.get(key), bool) for key in ('merge', 'fold')))  # type: ignore[attr-defined]


#: What is used of it: path, whether a value will do, what is needed. Names of data sets' keys are in either case.
_USED: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (('iter',), _count, 'a whole number'),
    (('epoch',), _count, 'a whole number'),
    (('seed',), lambda value: value is None or _count(value), 'a whole number'),
    (('dataset_meta',), lambda value: value is None or _mapping(value), 'a mapping with names as keys'),
    (('dataset_meta', 'classes'), _names, 'a list of names'),
    (('dataset_meta', 'palette'), _colours, 'a list of colours, three whole numbers from 0 to 255 each'),
    (('replk_mm',), _mapping, 'a mapping with names as keys'),
    (('replk_mm', 'reparameterized'), _merging, 'whether it is merged and folded'))


def record_of(checkpoint: Mapping, where: str) -> dict[str, Any]:
    """The record of a checkpoint, empty if it has none.

    Args:
        checkpoint: Its content.
        where: Name of the file, for messages.

    Raises:
        UserError: If something in it that this package uses is not what it is in checkpoints.
    """
    record = checkpoint.get('meta')
    if not isinstance(record, Mapping):
        return {}
    for path, fits, needed in _USED:
        node: Any = record
        for key in path[:-1]:
            node = node.get(key)
            node = node if isinstance(node, Mapping) else {}
        for key in (path[-1], path[-1].upper()):
            if key in node and not fits(node[key]):
                shown = str(node[key]) if isinstance(node[key], (str, int, float, bool)) else f'a {type(node[key]).__name__}'
                raise UserError(f'{where}: meta.{".".join((*path[:-1], key))} is {shown:.80}, not {needed}\n'
                                f'Take the file from where it was made; or, if that is all there is, keep its weights only: '
                                f"torch.save({{'state_dict': ...}}, FILE).")
    return dict(record)
