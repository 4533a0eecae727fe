"""The heads in a model's config that predict the classes of the data, and their number of classes."""

import re
from collections.abc import Iterator
from typing import Any

from replk_mm.data.datasets import as_list
from replk_mm.errors import UserError

#: Keys of heads, or lists of heads, that predict all classes.
HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'mask_head', 'head')
#: Parts with other classes.
_OTHERS = ('backbone', 'rpn_head', 'semantic_head')
#: Heads that predict boundaries or objects of any class; the RPN of mmdet alone has it as ``bbox_head``.
_NO_CLASSES = re.compile('STDCHead|RPNHead')


def is_class_head(path: str, kind: object = '') -> bool:
    """Whether the part of a model (config or module) with this path and type is a head that predicts all classes."""
    return re.sub(r'\.\d+$', '', path).rpartition('.')[2] in HEADS and not _NO_CLASSES.search(str(kind))


def _counting_parts(node: object, path: str) -> Iterator[tuple[str, dict]]:
    """Parts of a model's config with ``num_classes`` that may be the classes of the data, with their paths."""
    if isinstance(node, dict):
        if 'num_classes' in node and not _NO_CLASSES.search(str(node.get('type'))):
            yield path, node
        for key, value in node.items():
            if key not in _OTHERS:
                yield from _counting_parts(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _counting_parts(value, f'{path}.{i}')


def classes_per_head(model: dict) -> dict[str, int]:
    """Number of classes of every head whose config states it, by path."""
    return {path: head['num_classes'] for path, head in _counting_parts(model, 'model') if is_class_head(path)}


def _panoptic_parts(model: dict) -> dict[str, dict]:
    """Parts of a model's config with numbers of things and stuff classes, by path."""
    parts = {f'model.{key}': part for key, part in model.items() if isinstance(part, dict)}
    return {path: part for path, part in parts.items() if 'num_things_classes' in part}


def reject_stuff(model: dict) -> None:
    """Reject class names for a model that predicts things and stuff: names do not distinguish them.

    Raises:
        UserError: With the path of the part.
    """
    for path, part in _panoptic_parts(model).items():
        if part.get('num_stuff_classes'):
            raise UserError(
                f'--classes: {path} predicts things and stuff, and names do not say which are which\n'
                f'Set num_things_classes, num_stuff_classes and the classes of the data in a config.'
            )


def set_num_classes(model: dict, count: int, former: set[int]) -> list[str]:
    """Set the number of classes of every head whose config states one.

    Args:
        model: Config, changed in place.
        count: Number of classes.
        former: Former numbers of classes of the data. Other parts with one of these change too.

    Returns:
        What else was changed, one line each.
    """
    notes = []
    former = former | set(classes_per_head(model).values())
    for path, head in _counting_parts(model, 'model'):
        old = head['num_classes']
        if is_class_head(path) or old in former:
            if head.get('out_channels') == old:
                head.pop('out_channels', None)
            head['num_classes'] = count
            notes += _set_class_weights(path, head, old, count)
    for path, part in _panoptic_parts(model).items():
        if not part.get('num_stuff_classes'):
            old, part['num_things_classes'] = part['num_things_classes'], count
            notes += _set_class_weights(path, part, old, count)
    return notes


def _set_class_weights(path: str, head: dict, old: int, count: int) -> list[str]:
    """Adapt ``class_weight`` of the losses. Some have one weight more, for background or "no object"."""
    notes = []
    for key in ('loss_decode', 'loss_cls'):
        for loss in as_list(head.get(key)):
            weights: Any = loss.get('class_weight')
            if not isinstance(weights, (list, tuple)) or old == count and len(weights) in (count, count + 1):
                continue
            if len(weights) == old + 1:
                are_equal = len(set(weights[:-1])) == 1
                loss['class_weight'] = [weights[0] if are_equal else 1.0] * count + [weights[-1]]
                notes += [] if are_equal else [f'{path}.{key}: class_weight set to 1: it was that of other classes']
            elif len(weights) == old or len(weights) not in (count, count + 1):
                loss.pop('class_weight')
                notes.append(f'{path}.{key}: class_weight removed: it was that of other classes')
    return notes
