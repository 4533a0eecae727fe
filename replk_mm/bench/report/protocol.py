"""Which figures of a report may be ranked together: those measured under one protocol; of others, what differs."""

import json
import os
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from replk_mm.bench.report.words import clean, in_words, leaves

#: What a difference quotes of a value at most, in characters.
_QUOTED = 100
#: Prefix of the protocols of a measurement; the metric's are A, B ...
_LETTERS = {'complexity': 'C', 'speed': 'S', 'memory': 'M', 'erf': 'E', 'shape_bias': 'B', 'curve': 'L'}
#: Entries of the metric's protocol that the heading of its group names.
_SUMMARY = ('task', 'data', 'crop', 'mode', 'tta', 'iterations', 'batch', 'pretraining', 'precision')


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

    @property
    def summary(self) -> str:
        """What a reader wants to know of a metric's protocol first."""
        parts = []
        for name in _SUMMARY:
            value = self.content.get(name)
            if name == 'data' and isinstance(value, Mapping):
                images = f' ({value["images"]} images)' if value.get('images') else ''
                value = f'{in_words(value.get("root") or value.get("name"))}{images}'
            if value not in (None, '', [], {}):
                parts.append(f'{name} {clean(in_words(value), 80)}')
        return ', '.join(parts) or 'not stated'


def identity(protocol: Mapping[str, Any]) -> str:
    """A text that is the same for equal protocols only; the order of keys does not matter."""
    return json.dumps(protocol, sort_keys=True, default=str)


def name_protocols(measurement: str, contents: Iterable[Mapping[str, Any]]) -> dict[str, Protocol]:
    """Protocols by :func:`identity`, the most frequent first.

    Args:
        measurement: What they are of.
        contents: One for each record.
    """
    contents = list(contents)
    by_identity = {identity(content): content for content in contents}
    order = [key for key, _ in Counter(map(identity, contents)).most_common()]
    return {
        key: Protocol(
            _name(measurement, i), by_identity[key], tuple(differences(by_identity[key], by_identity[order[0]]))
        )
        for i, key in enumerate(order)
    }


def _name(measurement: str, index: int) -> str:
    if measurement in _LETTERS:
        return f'{_LETTERS[measurement]}{index + 1}'
    return string.ascii_uppercase[index] if index < 26 else f'Z{index - 24}'


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs in ``one`` from ``other``, a phrase for each place: ``'data.images: 40 instead of 80'``."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    found = []
    for place in {**theirs, **ours}:
        here, there = (in_words(part[place]) if place in part else 'not stated' for part in (ours, theirs))
        if place not in ours or place not in theirs or identity({'': ours[place]}) != identity({'': theirs[place]}):
            same = len(os.path.commonprefix([here, there]))
            found.append(f'{place}: {_around(here, same)} instead of {_around(there, same)}')
    return found


def _around(text: str, at: int) -> str:
    """A long text's part about a place."""
    start = max(0, at - _QUOTED // 2) if len(text) > _QUOTED else 0
    return f'{"…" * (start > 0)}{text[start : start + _QUOTED]}{"…" * (len(text) > start + _QUOTED)}'
