"""Values of records as text for a reader."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: Names of figures whose keys in records are ambiguous: ``training`` is an unmerged network, not a training step.
FIGURE_NAMES = {
    'training': 'forward, unmerged',
    'reparameterized': 'forward, merged',
    'inference_bytes': 'memory of inference',
    'training_bytes': 'memory of a training step',
}
#: Longest text of a record that is shown, in characters.
LONGEST = 600

# Characters that no page may hold (control characters, lone surrogates), and marks that change the direction of text.
_UNFIT = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]')
# What Markdown or the HTML within it would interpret.
_MARKDOWN = re.compile(r'([\\`*_{}\[\]<>#|~&])')


def clean(text: object, longest: int = LONGEST) -> str:
    """A text without characters that disturb a page, cut to a bounded length. It is not escaped: Jinja2 does that."""
    found = str(text)
    return _UNFIT.sub('\ufffd', found if len(found) <= longest else f'{found[:longest]}…')


def markdown_text(text: object) -> str:
    """A text that Markdown shows as it is, in one line."""
    return _MARKDOWN.sub(r'\\\1', ' '.join(clean(text).split()))


def format_value(value: Any) -> str:
    """A plain value as text."""
    if value is None or value == [] or value == {}:
        return 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, (int, float)) for part in value):
        return ' x '.join(map(str, value))
    if isinstance(value, list) and all(isinstance(part, (str, list)) for part in value):
        return '; '.join(map(format_value, value))
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, (Mapping, Sequence)) else str(value)


def leaves(node: Any, place: str = '') -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists with their places, such as ``'data.root'``; a list of plain values is a leaf."""
    parts: Any = ()
    if isinstance(node, Mapping):
        parts = node.items()
    elif isinstance(node, list) and any(isinstance(part, (Mapping, list)) for part in node):
        parts = enumerate(node)
    if not parts and place:
        yield place, node
    for key, value in parts:
        yield from leaves(value, f'{place}.{key}' if place else str(key))


def number(node: Any, *place: str) -> float | None:
    """The finite number at a place of nested dicts; None if there is none."""
    for name in place:
        node = node.get(name) if isinstance(node, Mapping) else None
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        return None
    return float(node) if abs(node) < 10**30 else None  # nothing measured is larger; NaN is not smaller
