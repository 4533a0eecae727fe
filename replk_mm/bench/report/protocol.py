"""Which figures of a report may be ranked together: those measured under one protocol; of others, what differs."""
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: What a difference quotes of a value at most.
_QUOTED = 100


@dataclass(frozen=True)
class Protocol:
    """One way in which a measurement was made, within a suite.

    Attributes:
        name: ``'A'``, ``'B'`` ... of the metric; of other measurements with the measurement's letter, such as ``'S1'``.
        content: What has to be equal.
        differences: From the first protocol of the measurement, in words; none of the first itself.
    """

    name: str
    content: Mapping[str, Any]
    differences: tuple[str, ...] = ()


#: What names the protocols of a measurement; the metric's are A, B ...
_LETTERS = {'complexity': 'C', 'speed': 'S', 'memory': 'M', 'erf': 'E', 'shape_bias': 'B', 'curve': 'L'}


def identity(protocol: Mapping[str, Any]) -> str:
    """A text that is the same for equal protocols only; the order of keys does not matter."""
    return json.dumps(protocol, sort_keys=True, default=str)


def name_protocols(measurement: str, contents: Iterable[Mapping[str, Any]]) -> dict[str, Protocol]:
    """Protocols by :func:`identity`, the most frequent first.

    Args:
        measurement: What they are of.
        contents: One for each row that has it.
    """
    counts: dict[str, int] = {}
    by_identity: dict[str, Mapping[str, Any]] = {}
    for content in contents:
        key = identity(content)
        counts[key] = counts.get(key, 0) + 1
        by_identity[key] = content
    order = sorted(counts, key=lambda key: -counts[key])  # stable: of equally frequent ones the first to appear
    first = by_identity[order[0]] if order else {}
    return {key: Protocol(_name(measurement, i), by_identity[key], tuple(differences(by_identity[key], first)))
            for i, key in enumerate(order)}


def _name(measurement: str, index: int) -> str:
    if measurement in _LETTERS:
        return f'{_LETTERS[measurement]}{index + 1}'
    name = ''
    while index >= 0:  # A ... Z, AA, AB ...
        name = chr(ord('A') + index % 26) + name
        index = index // 26 - 1
    return name


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs in ``one`` from ``other``, a phrase for each place: ``'data.images: 40 instead of 80'``."""
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    found = []
    for place in {**theirs, **ours}:
        here, there = (in_words(leaves[place]) if place in leaves else 'not stated' for leaves in (ours, theirs))
        if place not in ours or place not in theirs or identity({'': ours[place]}) != identity({'': theirs[place]}):
            same = len(os.path.commonprefix([here, there]))
            found.append(f'{place}: {_around(here, same)} instead of {_around(there, same)}')
    return found


def described(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every place of a protocol with its value as text."""
    return [(place, in_words(value)) for place, value in _leaves(protocol)]


def _leaves(node: Any, place: str = '') -> Iterable[tuple[str, Any]]:
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, Mapping):
        parts = node.items()
    elif isinstance(node, list) and any(isinstance(part, (Mapping, list)) for part in node):
        parts = enumerate(node)
    empty = True
    for key, value in parts:
        empty = False
        yield from _leaves(value, f'{place}.{key}' if place else str(key))
    if empty and place:
        yield place, node


def _around(text: str, at: int) -> str:
    """A long text's part about a place."""
    start = max(0, at - _QUOTED // 2) if len(text) > _QUOTED else 0
    return f'{"…" * (start > 0)}{text[start:start + _QUOTED]}{"…" * (len(text) > start + _QUOTED)}'


def in_words(value: Any) -> str:
    """A plain value as text for a reader."""
    if value is None or value == [] or value == {}:
        return 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(part, (int, float)) for part in value):
        return ' x '.join(map(str, value))
    if isinstance(value, list) and all(isinstance(part, (str, list)) for part in value):
        return '; '.join(map(in_words, value))
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, (Mapping, Sequence)) else str(value)
