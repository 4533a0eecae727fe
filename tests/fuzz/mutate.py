"""Spoil valid data: bytes of a file, values in a tree of JSON.

What is done is decided by a few bytes that hypothesis draws: one draw is quick, and shrinks to fewer and simpler changes.
"""

import copy
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st


class Choices:
    """Decisions read off bytes; when they have run out, each is the first choice."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def below(self, count: int) -> int:
        """A whole number from 0."""
        size = max(1, ((count - 1).bit_length() + 7) // 8)
        part, self.at = self.raw[self.at : self.at + size], self.at + size
        return int.from_bytes(part, 'little') % count

    def pick(self, items: Sequence[Any]) -> Any:
        """One of them."""
        return items[self.below(len(items))]


#: What makes an input of choices.
Build = Callable[[Choices], bytes]
#: What a :class:`Choices` is made of.
RAW = st.binary(min_size=24, max_size=64)


#: Bytes that mean something in formats, and the ends of number types.
_WORDS = (
    b'\x00', b'\xff', b'\x7f', b'\x80', b'\xff\xff\xff\xff', b'\xff\xff\xff\x7f', b'\x00\x00\x00\x80', b'PK\x03\x04',
    b'PK\x01\x02', b'PK\x05\x06', b'\n', b'\x1b[2J', b'\x00' * 8, b'IHDR', b'IDAT', b'\xff\xd8\xff', b'\xff\xd9',
    b'\xff\xc0', b'"', b'{', b'}', b'[', b']', b',', b':', b'e999', b'NaN', b'-', b'\\ud800', b'9' * 400)


def changed_bytes(data: bytes, choices: Choices) -> bytes:
    """Bytes set, inserted, removed, repeated or cut off."""
    found = bytearray(data)
    for _ in range(1 + choices.below(4)):
        what, at, value = choices.below(7), choices.below(max(len(found), 1)), choices.below(256)
        word = _WORDS[value % len(_WORDS)]
        if what == 0:
            found[at : at + 1] = bytes([value])
        elif what == 1:
            found[at : at + 1] = bytes([(found[at] if at < len(found) else 0) ^ (1 << value % 8)])
        elif what == 2:
            found[at : at + len(word)] = word
        elif what == 3:
            found[at:at] = word
        elif what == 4:
            del found[at : at + 1 + value % 64]
        elif what == 5:
            found[at:at] = found[at : at + value]
        elif value % 4 == 0:
            del found[at:]
    return bytes(found)


#: Values that JSON can hold and readers do not expect.
_ODD = (
    None, True, False, 0, -1, 1, 2, 255, 256, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308,
    1e-320, float('nan'), float('inf'), float('-inf'), '', ' ', '0', 'nan', '\x00', '\x1b]0;x\x07', '\ud800', '\u202e',
    '../../x', '/', '.', '%s', '{0.__class__}', '<script>', 'x' * 3000, [], {}, [[]], [None], [[[[[]]]]], {'': None},
    {'a': {'a': {'a': 1}}}, [0, 0], [1, 'a'], [2**40, 2**40], [float('nan')] * 4, ['x'] * 100, '=1+1', '\r\n', 'a\tb',
    '\U0001f600', {'x': []}, [{}], [{'a': 1}], '~/x', '**')


def odd(choices: Choices) -> Any:
    """A value that is seldom meant."""
    kind = choices.below(8)
    if kind == 0:
        return choices.below(2**64) - 2**63
    if kind == 1:
        return struct.unpack('<d', choices.below(2**64).to_bytes(8, 'little'))[0]
    if kind == 2:
        return ''.join(chr(choices.below(0x3000)) for _ in range(choices.below(6)))
    if kind == 3:
        return [odd(choices) for _ in range(choices.below(4))]
    return copy.deepcopy(choices.pick(_ODD))


def edited(tree: Any, choices: Choices, value_of: Callable[[Choices], Any] = odd) -> Any:
    """A copy of a tree of dicts and lists with values replaced, removed, doubled or exchanged, or keys renamed."""
    root = [copy.deepcopy(tree)]
    for _ in range(1 + choices.below(3)):
        places = list(_places(root))
        what, (node, key) = choices.below(7), choices.pick(places[1:] if len(places) > 1 and choices.below(16) else places)
        if what <= 2:
            node[key] = value_of(choices)
        elif what == 3 and node is not root:
            del node[key]
        elif what == 4 and isinstance(node, dict):
            node[str(value_of(choices))] = node.pop(key)
        elif what == 5 and isinstance(node, list) and node is not root:
            node.insert(key, copy.deepcopy(node[key]))
        else:
            other, another = choices.pick(places)
            node[key] = copy.deepcopy(other[another])
    return root[0]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, (dict, list)):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            yield node, key
            yield from _places(value)


def text_of(tree: Any) -> bytes:
    """As JSON, with whatever Python's reader takes."""
    try:
        return json.dumps(tree).encode('utf-8', 'surrogatepass')
    except ValueError:  # an integer of more digits than Python writes
        return b'{"a": ' + b'1' * 5000 + b'}'


def changed_json(originals: Sequence[Any]) -> Build:
    """JSON of one of the trees with changed values, and sometimes with changed bytes."""
    texts = [text_of(tree) for tree in originals]

    def build(choices: Choices) -> bytes:
        which = choices.below(len(originals))
        if choices.below(4) == 0:
            return changed_bytes(texts[which], choices)
        return text_of(edited(originals[which], choices))

    return build
