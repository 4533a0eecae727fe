"""The heads in a model's config that predict the data's classes: their number of classes, and how to change it."""
import inspect
import re
from collections.abc import Iterator
from typing import Any

from mmengine.registry import MODELS, init_default_scope

from replk_mm.data.datasets import as_list
from replk_mm.errors import UserError

#: Keys of a model's config with a head that predicts all classes, or a list of such.
HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'mask_head')
#: Parts with classes of their own.
_OTHERS = ('backbone', 'rpn_head', 'semantic_head')
#: Types in these places that predict something else: STDC's predicts borders of classes.
_OTHER_TYPES = ('STDCHead',)


def is_head(path: str) -> bool:
    """Whether a path in a model (config or module) is a head that predicts all classes."""
    return re.sub(r'\.\d+$', '', path).rpartition('.')[2] in HEADS


def tells_others(kind: str | type) -> bool:
    """Whether a head of this type (name or class) predicts something else than the data's classes."""
    names = [kind.rpartition('.')[2]] if isinstance(kind, str) else [base.__name__ for base in kind.__mro__]
    return any(name in _OTHER_TYPES for name in names)


def _parts(node: object, path: str) -> Iterator[tuple[str, dict]]:
    """Dicts of a model's config that may count the data's classes, with their paths."""
    if isinstance(node, dict):
        if (is_head(path) or 'num_classes' in node) and not tells_others(node.get('type') or ''):
            yield path, node
        for key, value in node.items():
            if key not in _OTHERS:
                yield from _parts(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _parts(value, f'{path}.{i}')


def head_counts(model: dict) -> dict[str, int]:
    """Number of classes of every head whose config states it, by path."""
    return {path: head['num_classes'] for path, head in _parts(model, 'model')
            if is_head(path) and 'num_classes' in head}


def reject_stuff(model: dict) -> None:
    """Reject names of classes for a model that distinguishes things and stuff: names alone do not say which are which.

    Raises:
        UserError: With the part's path.
    """
    for path, part in _panoptic_parts(model):
        if part.get('num_stuff_classes'):
            raise UserError(f'--classes: {path} has {part["num_stuff_classes"]} stuff classes, and names do not say '
                            f'which are stuff\nSet num_things_classes, num_stuff_classes, num_classes of every head '
                            f'and metainfo of the data sets in a config of your own.')


def _panoptic_parts(model: dict) -> list[tuple[str, dict]]:
    return [(f'model.{key}', part) for key, part in model.items()
            if isinstance(part, dict) and 'num_things_classes' in part]


def set_counts(model: dict, count: int, former: set[int], scope: str) -> list[str]:
    """Give every head of a model this number of classes.

    Args:
        model: Config, changed in place.
        count: Number of classes.
        former: Numbers of classes the data had: what else in the model counts as many is meant too.
        scope: Default scope, in which the heads' types are looked up.

    Returns:
        What else had to be changed, a line each.
    """
    notes = []
    former = former | set(head_counts(model).values())
    for path, head in _parts(model, 'model'):
        if 'num_classes' not in head and not _takes_num_classes(head, scope):
            continue
        if is_head(path) or head.get('num_classes') in former:
            old = head.get('num_classes')
            if head.get('out_channels') == old:
                head.pop('out_channels', None)
            head['num_classes'] = count
            notes += _set_weights(path, head, old, count)
    for path, part in _panoptic_parts(model):
        if not part.get('num_stuff_classes'):
            old, part['num_things_classes'] = part['num_things_classes'], count
            notes += _set_weights(path, part, old, count)
    return notes


def _takes_num_classes(head: dict, scope: str) -> bool:
    """Whether the type of a head has an argument ``num_classes``, its own or one that it hands on."""
    init_default_scope(scope)
    with MODELS.switch_scope_and_registry(head.get('_scope_', scope)) as registry:
        kind = registry.get(head['type']) if isinstance(head.get('type'), str) else head.get('type')
    for owner in inspect.getmro(kind) if inspect.isclass(kind) else ():
        if '__init__' in vars(owner):
            arguments = inspect.signature(vars(owner)['__init__']).parameters
            if 'num_classes' in arguments:
                return True
            if all(argument.kind is not argument.VAR_KEYWORD for argument in arguments.values()):
                return False
    return False


def _set_weights(path: str, head: dict, old: int | None, count: int) -> list[str]:
    """Fit ``class_weight`` of a head's losses; some have one number more, for no class (background, no object)."""
    notes = []
    for key in ('loss_decode', 'loss_cls'):
        for loss in as_list(head.get(key)):
            weights: Any = loss.get('class_weight')
            if not isinstance(weights, (list, tuple)) or old == count and len(weights) in (count, count + 1):
                continue
            if old is not None and len(weights) == old + 1:
                same = len(set(weights[:-1])) == 1
                loss['class_weight'] = [weights[0] if same else 1.0] * count + [weights[-1]]
                notes += [] if same else [f'{path}.{key}: class_weight is 1 for every class, it was of other classes']
            elif len(weights) == old or len(weights) not in (count, count + 1):
                loss.pop('class_weight')
                notes.append(f'{path}.{key}: class_weight left out, it is of another number of classes')
    return notes
