"""Name the config field when building a part of a run fails."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry

from replk_mm.errors import UserError, did_you_mean, first_line, import_error, install_advice


@contextmanager
def explain_build_errors(cfg: Config, what: str) -> Iterator[None]:
    """Turn errors of constructors into a message that names the config field.

    Args:
        cfg: The whole config.
        what: The part that is built; a top-level key of the config, such as ``'model'``.

    Raises:
        UserError: If the part cannot be built.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # mmengine reports Ctrl-C as a faulty config
            raise error.__context__ from None
        raise UserError(f'{cfg.filename}: the {what} cannot be built: {_explain(cfg, error, what)}') from error


def _explain(cfg: Config, error: Exception, what: str) -> str:
    text = str(error.args[0]) if error.args and not isinstance(error, OSError) else str(error)
    whole = what in cfg
    fields = [
        (path, part)
        for node, start in ((cfg.get(what), what), (cfg._cfg_dict, ''))  # a loop is built with its loader
        for path, part in walk_dicts(node, start)
        if 'type' in part
    ]
    missing = re.match(r'(\S+) is not in the (?:\S+::)?(.+) registry', text)
    if missing:
        values = ((f'{path}.{key}', value) for path, part in fields for key, value in part.items())
        field = next((path for path, value in values if value == missing[1]), f'{what}.type')
        package, dot, _ = missing[1].partition('.')
        if dot and find_spec(package) is None:
            return f'{field}={missing[1]!r}: the package {package} is not installed\n{install_advice()}'
        return f'{field}={missing[1]!r}: unknown {missing[2]}\n' + (
            did_you_mean(missing[1], _registered(missing[2]))
            or 'Check the spelling, and that the package of the type is installed.'
        )
    unknown = re.search(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    for path, part in fields:
        known = arguments_of(part['type']) if unknown else []
        if unknown and unknown[2] in part and known and unknown[2] not in known:
            return (
                f'{path}.{unknown[2]}: {part["type"]} does not take this argument\n'
                f'{did_you_mean(unknown[2], known)}It takes: {", ".join(known)}'
            )
    if failed := import_error(error):
        return f'a package cannot be imported: {failed}\n{install_advice()}'
    if 'not installed' in text:
        return f'{text}\n{install_advice()}'
    for path, part in fields:  # mmengine's error for an unknown optimizer names nothing
        if text == 'None is not a callable object' and path.endswith('optimizer'):
            return f'{path}.type={part["type"]!r}: unknown type\nCheck the spelling.'
    kind = '' if isinstance(error, (AssertionError, ValueError)) else f'{type(error).__name__}: '
    return f'{kind if text else ""}{text or first_line(error)}\nCheck ' + (
        f'the fields of cfg.{what}.' if whole else 'the config and --cfg-options.'
    )


def _registries() -> Iterator[Registry]:
    for value in vars(mmengine.registry).values():
        if isinstance(value, Registry):
            yield value
            yield from value.children.values()


def _registered(kind: str) -> list[str]:
    return [
        name if registry.parent is None else f'{prefix}{name}'
        for registry in _registries()
        if registry.name == kind
        for name in (*registry.module_dict, *getattr(registry, 'modules', ()))  # lazy registries too
        for prefix in ('', f'{registry.scope}.')
    ]


def arguments_of(kind: object) -> list[str]:
    """Arguments of the class of a ``type``; empty if it takes any."""
    if isinstance(kind, str):
        name = kind.rpartition('.')[2]
        kind = next((r.module_dict[name] for r in _registries() if name in r.module_dict), None)
    if not inspect.isclass(kind):
        return []
    names: list[str] = []
    for owner in kind.__mro__:
        if '__init__' in vars(owner):
            given = inspect.signature(vars(owner)['__init__']).parameters.values()
            names += [p.name for p in list(given)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if all(p.kind != p.VAR_KEYWORD for p in given):
                return list(dict.fromkeys(names))
    return []


def walk_dicts(node: object, path: str = '') -> Iterator[tuple[str, dict]]:
    """Yield path and dict of every dict in a nest, outer ones first. A path is such as ``model.bbox_head[0]``."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from walk_dicts(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from walk_dicts(value, f'{path}[{i}]')
