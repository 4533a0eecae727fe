"""Overrides of config fields, as ``--cfg-options`` and suites give them: only those that have an effect, on what is there."""
import difflib
import inspect
from collections.abc import Iterator
from keyword import iskeyword

from mmengine.config import Config
from mmengine.runner import Runner

from replk_mm.errors import UserError

#: Most names in an override, as model.backbone.arch has three.
_DEEPEST = 20


def merge(cfg: Config, options: dict, path: str) -> None:
    """Change a config.

    Args:
        cfg: Changed in place.
        options: As ``{'model.backbone.arch': 'nano'}``.
        path: Of the config, for messages.

    Raises:
        UserError: If an override does not fit.
    """
    known = [*cfg.keys(), *inspect.signature(Runner.__init__).parameters]
    for option, value in options.items():
        _check_names(option, value)
        top = option.partition('.')[0]
        close = difflib.get_close_matches(top, known, n=1, cutoff=0.8)
        # A new name may be for the user's own code; one that is almost an old name would have no effect, unnoticed.
        if close and top not in known:
            raise UserError(f'--cfg-options {option}: {path} has no {top!r}\nDid you mean {close[0]}?')
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(f'--cfg-options {options!s:.500}: does not fit {path}: {error}') from error
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper'):
        if cfg.get(key) is not None and not isinstance(cfg[key], dict):
            raise UserError(f'--cfg-options {key}={cfg[key]!r}: {key} of {path} is a dict\n'
                            f'Name the field below it: --cfg-options {key}.FIELD=VALUE.')


def _check_names(option: str, value: object) -> None:
    """Refuse names with which mmengine cannot write the config, as every run does, or takes for ever."""
    parts = option.split('.')
    odd = '' if '' in parts else None if parts[0].isidentifier() else parts[0]
    wrong = next(filter(_is_code, [*parts, *_keys(value)]), odd)
    if wrong is not None:
        raise UserError(f'--cfg-options {option:.200}: {wrong!r:.80} is no name of a config field\n'
                        f'Names are as in model.backbone.arch, without quotes, and no words of Python.')
    if len(parts) > _DEEPEST:
        raise UserError(f'--cfg-options {option:.200}: {len(parts):,} names, and no config has fields that deep')


def _is_code(name: str) -> bool:
    # mmengine writes fields as NAME=... or, between quotes that it does not escape, as 'NAME': ...
    return iskeyword(name) or repr(name) != f"'{name}'"


def _keys(node: object) -> Iterator[str]:
    """Names in nested dicts and lists."""
    if isinstance(node, dict):
        yield from (key for key in node if isinstance(key, str))
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from _keys(value)
