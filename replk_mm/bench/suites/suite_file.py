"""The values in a suite file, YAML that anyone may have written: no more of them than a suite needs."""
import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from replk_mm.errors import UserError

#: Most values in a suite file, and most keys that merging (``<<``) adds to its mappings.
MOST = 100_000
#: Most digits of a whole number: Python does not write those of very many.
_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of Python: YAML 1.1 takes ``1e-3``, without a point, for a text. A key is there once."""

    merged = 0  # keys that ``<<`` has copied

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f'the key {key.value!r} is there twice', key.start_mark)
            if isinstance(key, yaml.ScalarNode):  # others are no names, and refused later
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag == 'tag:yaml.org,2002:merge':
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(part, yaml.MappingNode):
                        self.flatten_mapping(part)
                    # Ten names of ten names of ten ... are a thousand, and PyYAML copies each.
                    self.merged += 1 + len(part.value)
                    if self.merged > MOST:
                        raise yaml.constructor.ConstructorError(None, None, f'<< adds more than {MOST:,} keys', key.start_mark)
        super().flatten_mapping(node)


_Loader.add_implicit_resolver('tag:yaml.org,2002:float', re.compile(r'[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$'),
                              list('-+0123456789'))


def read(path: Path) -> Any:
    """What a suite file holds.

    Raises:
        UserError: If it cannot be read, or holds too much.
    """
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), _Loader)
    except OSError as error:
        raise UserError(f'{path}: no such suite ({error.strerror})\nSuites are in configs/suites/, one file each.') from error
    except Exception as error:  # PyYAML raises anything on values that it cannot make
        raise UserError(f'{path}: no YAML: {" ".join(str(error).split())}') from error
    _check(content, path)
    return content


def _check(content: object, path: Path) -> None:
    """Look at all values, as often as they are referred to."""
    count, todo = 0, [content]
    while todo:
        node = todo.pop()
        count += 1
        if count > MOST:
            raise UserError(f'{path}: it holds more than {MOST:,} values\n'
                            f'Names for parts (&name, *name) repeat what they name.')
        if isinstance(node, int) and abs(node) >= 10 ** _DIGITS:
            raise UserError(f'{path}: a number in it has more than {_DIGITS} digits, it begins with {hex(node)[:20]}\n'
                            f'Nothing in a suite is that large.')
        if isinstance(node, date):
            raise UserError(f'{path}: {node} is read as a date, and configs have none\nPut it in quotes.')
        if isinstance(node, dict):
            todo += (*node.keys(), *node.values())
        elif isinstance(node, (list, tuple, set)):
            todo += node
