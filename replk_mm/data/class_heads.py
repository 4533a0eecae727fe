"""The heads in a model's config that predict the data's classes: their number of classes, and how to change it."""

import re
from collections.abc import Iterator
from typing import Any

from replk_mm.data.datasets import as_list
from replk_mm.errors import UserError

#: Keys of a model's config with a head that predicts all classes, or a list of such.
HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'mask_head')
#: Parts with classes of their own.
_OTHERS = ('backbone', 'rpn_head', 'semantic_head')
#: A type in these places that predicts borders between classes.
_BORDERS = 'STDCHead'


def is_class_head(path: str, kind: object = '') -> bool:
    """Whether a part of a model (config or module) at a path, of a type, is a head that predicts all classes."""
    return re.sub(r'\.\d+$', '', path).rpartition('.')[2] in HEADS and _BORDERS not in str(kind)


def _parts(node: object, path: str) -> Iterator[tuple[str, dict]]:
    """Dicts of a model's config with a number of classes that may be the data's, with their paths."""
    if isinstance(node, dict):
        if 'num_classes' in node and _BORDERS not in str(node.get('type')):
            yield path, node
        for key, value in node.items():
            if key not in _OTHERS:
                yield from _parts(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _parts(value, f'{path}.{i}')


def classes_per_head(model: dict) -> dict[str, int]:
    """Number of classes of every head whose config states it, by path."""
    return {path: head['num_classes'] for path, head in _parts(model, 'model') if is_class_head(path)}


def _panoptic_parts(model: dict) -> dict[str, dict]:
    """Parts of a model's config that count things and stuff, by path."""
    return {
        f'model.{key}': part for key, part in model.items() if isinstance(part, dict) and 'num_things_classes' in part
    }


def reject_stuff(model: dict) -> None:
    """Reject names of classes for a model that predicts stuff beside things: names alone do not say which are which.

    Raises:
        UserError: With the part's path.
    """
    for path, part in _panoptic_parts(model).items():
        if part.get('num_stuff_classes'):
            raise UserError(
                f'--classes: {path} predicts things and stuff, and names do not say which are which\n'
                f'Set num_things_classes, num_stuff_classes and the classes of the data in a config.'
            )


def set_counts(model: dict, count: int, former: set[int]) -> list[str]:
    """Give every head of a model whose config states a number of classes this one.

    Args:
        model: Config, changed in place.
        count: Number of classes.
        former: Numbers of classes the data had: what else in the model counts as many is meant too.

    Returns:
        What else had to be changed, a line each.
    """
    notes = []
    former = former | set(classes_per_head(model).values())
    for path, head in _parts(model, 'model'):
        old = head['num_classes']
        if is_class_head(path) or old in former:
            if head.get('out_channels') == old:
                head.pop('out_channels', None)
            head['num_classes'] = count
            notes += _set_weights(path, head, old, count)
    for path, part in _panoptic_parts(model).items():
        if not part.get('num_stuff_classes'):
            old, part['num_things_classes'] = part['num_things_classes'], count
            notes += _set_weights(path, part, old, count)
    return notes


def _set_weights(path: str, head: dict, old: int, count: int) -> list[str]:
    """Fit ``class_weight`` of a head's losses; some have one number more, for no class (background, no object)."""
    notes = []
    for key in ('loss_decode', 'loss_cls'):
        for loss in as_list(head.get(key)):
            weights: Any = loss.get('class_weight')
            if not isinstance(weights, (list, tuple)) or old == count and len(weights) in (count, count + 1):
                continue
            if len(weights) == old + 1:
                same = len(set(weights[:-1])) == 1
                loss['class_weight'] = [weights[0] if same else 1.0] * count + [weights[-1]]
                notes += [] if same else [f'{path}.{key}: class_weight is 1 for every class, it was of other classes']
            elif len(weights) == old or len(weights) not in (count, count + 1):
                loss.pop('class_weight')
                notes.append(f'{path}.{key}: class_weight left out, it is of another number of classes')
    return notes
