"""Is what a checkpoint holds beside the weights what a training leaves? Asked before mmengine and torch take it over."""
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from torch import Tensor

from replk_mm.errors import UserError

#: Keys of mmengine's wrappers of several optimizers that name none.
_NO_OPTIMIZERS = ('base_param_settings', 'loss_scaler')


def check(checkpoint: Mapping, where: str) -> None:
    """Refuse a checkpoint whose log, optimizer or schedules are not of the kinds that training stores.

    Args:
        checkpoint: Its content.
        where: Name of the file, for the message.

    Raises:
        UserError: With the first place that is something else.
    """
    problem = next((found for found in (*_log(checkpoint.get('message_hub')), *_optimizers(checkpoint.get('optimizer')),
                                        *_schedules(checkpoint.get('param_schedulers', []))) if found), None)
    if problem:
        raise UserError(f'{where}: cannot be resumed: {problem}\nResume from a checkpoint that training wrote.')


def _named(node: object) -> bool:
    return isinstance(node, Mapping) and all(isinstance(key, str) for key in node)


def _log(hub: Any) -> Iterator[str]:
    for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
        if not _named(hub) or not _named(hub.get(key)):
            yield f'message_hub.{key} is no mapping of names'


def _optimizers(stored: Any) -> Iterator[str]:
    if not isinstance(stored, Mapping):
        yield f'optimizer is a {type(stored).__name__}'
        return
    several = 'param_groups' not in stored
    if not stored.keys() - set(_NO_OPTIMIZERS):
        yield 'optimizer is empty'
    for name, one in stored.items() if several else (('', stored),):
        if not (several and name in _NO_OPTIMIZERS):
            yield from _optimizer(one, f'optimizer.{name}' if several else 'optimizer')


def _optimizer(one: Any, place: str) -> Iterator[str]:
    groups, state = (one.get('param_groups'), one.get('state')) if isinstance(one, Mapping) else (None, None)
    if not isinstance(groups, list) or not groups or not all(
            _named(group) and isinstance(group.get('params'), list) and _number(group.get('lr')) for group in groups):
        yield f'{place}.param_groups is no list of groups with params and a learning rate'
    if not isinstance(state, Mapping) or not all(_named(values) for values in state.values()):
        yield f'{place}.state is no mapping of the state of every parameter'


def _schedules(stored: Any) -> Iterator[str]:
    lists = stored.values() if isinstance(stored, Mapping) else [stored]
    for schedules in lists:
        if not isinstance(schedules, Sequence) or isinstance(schedules, str) or not all(map(_named, schedules)):
            yield 'param_schedulers is no list of schedules'
            continue
        for schedule in schedules:  # which mmengine makes their attributes
            for key, value in schedule.items():
                counts = key in ('last_step', '_global_step')
                if callable(getattr(_ParamScheduler, key, None)) or (counts and type(value) is not int):
                    yield f'param_schedulers: {key} is a {type(value).__name__}'


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and isfinite(value) or isinstance(value, Tensor) and value.numel() == 1
