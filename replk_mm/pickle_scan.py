"""What loading a checkpoint's pickle would call and how much it would make, found by reading it without obeying it.

torch's ``weights_only`` loader calls listed functions only. The list alone does not do: ``bytearray`` takes any number for a
length, numpy's dtypes take flags that make numbers into pointers, and tuples of tuples of one tuple, a few hundred bytes,
take for ever to hash or overflow the stack. So the arguments are looked at here, before torch does what the file says.
"""
import pickletools
import re
from typing import IO, Any

from replk_mm.pickle_calls import CALLS, CONTAINERS, DEPTH, DICTS, STATES, VALUES, Item, Unsafe, is_

_SHOWN = 3
_DTYPES = re.compile(r'torch\.(bool|half|b?float\w*|u?int\d+|c?q?u?int\d+|complex\d+)\Z')
_OLD_NAMES = (('__builtin__.', 'builtins.'), ('numpy.core.', 'numpy._core.'))


def scan(pickled: bytes | IO[bytes]) -> list[Item]:
    """Read one pickle as torch's loader would.

    Args:
        pickled: The pickle, or a file that stands at its first byte and then behind its last.

    Returns:
        The storages that it asks for: their ``parts`` are the fields of torch's persistent ids.

    Raises:
        Unsafe: If it calls what it must not, or makes more than a checkpoint needs.
        ValueError: If it is damaged; so do IndexError and KeyError.
    """
    reader = _Reader()
    for code, argument, _ in pickletools.genops(pickled):
        reader.take(code.name, argument)
    if len(reader.stack) > 1 or reader.marked:
        raise Unsafe('it makes values beside its content')  # of which nobody would know how much they are
    _check_whole(reader.stack[-1])
    return reader.storages


class _Reader:
    """The stack of an unpickler, in torch's own dialect, without its effects."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Item] = []

    def take(self, code: str, argument: Any) -> None:
        stack = self.stack
        if code in _CONSTANTS:
            stack.append(_CONSTANTS.get(code, argument) if argument is None else argument)
        elif code in ('BINPUT', 'LONG_BINPUT'):
            self.memo[argument] = stack[-1]
        elif code in ('BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif code == 'MARK':
            self.marked.append(stack)
            self.stack = []
        elif code in _EMPTY:
            stack.append(Item(_EMPTY[code]))
        elif code == 'TUPLE':
            self.stack = self.marked.pop()
            self.stack.append(Item('tuple', stack))
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:
                raise ValueError('nothing left for a tuple')
            stack[-count:] = [Item('tuple', stack[-count:])]
        elif code in ('APPEND', 'SETITEM'):
            parts = [stack.pop() for _ in range(1 if code == 'APPEND' else 2)][::-1]
            self._fill(stack[-1], parts, code)
        elif code in ('APPENDS', 'SETITEMS'):
            self.stack = self.marked.pop()
            self._fill(self.stack[-1], stack, code)
        elif code == 'GLOBAL':
            name = argument.replace(' ', '.', 1)
            for old, new in _OLD_NAMES:
                name = new + name[len(old):] if name.startswith(old) else name
            stack.append(Item('global', name=name))
        elif code in ('REDUCE', 'NEWOBJ'):
            arguments = stack.pop()
            stack[-1] = _called(stack[-1], arguments)
        elif code == 'BUILD':
            state, target = stack.pop(), stack[-1]
            check = STATES.get(target.name) if is_(target, 'call') else None
            if check is None or not check(target, state):
                raise Unsafe(f'it sets the inner state of {_shown(target)}')
            target.parts = [*target.parts, state]
        elif code == 'BINPERSID':
            key = stack.pop()
            if not is_(key, 'tuple'):
                raise ValueError('a storage without a name')
            stack.append(Item('storage', key.parts))
            self.storages.append(stack[-1])
        elif code not in ('PROTO', 'STOP'):
            raise ValueError(f'a pickle with {code}, which torch does not read')

    @staticmethod
    def _fill(target: Any, parts: list, code: str) -> None:
        if 'ITEM' not in code:
            if not is_(target, 'list'):
                raise ValueError('something is appended to what is no list')
        elif len(parts) % 2 or not (is_(target, 'dict') or any(is_(target, 'call', name) for name in DICTS)):
            raise ValueError('an item is set of what is no dict')
        target.parts.extend(parts)


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, **dict.fromkeys(
    ('BININT', 'BININT1', 'BININT2', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINSTRING', 'LONG1'))}
_EMPTY = {'EMPTY_TUPLE': 'tuple', 'EMPTY_LIST': 'list', 'EMPTY_DICT': 'dict', 'EMPTY_SET': 'set'}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def _called(function: object, arguments: object) -> Item:
    parts = arguments.parts if isinstance(arguments, Item) and arguments.kind == 'tuple' else None
    allows = CALLS.get(function.name) if isinstance(function, Item) and function.kind == 'global' else None
    if parts is None or allows is None or not allows(parts):
        raise Unsafe(f'to load it, {_shown(function)}({", ".join(map(_shown, (parts or [])[:_SHOWN]))}) would have to run')
    return Item('call', list(parts), function.name)  # type: ignore[attr-defined]


def _shown(value: object) -> str:
    if isinstance(value, Item):
        return f'{value.name}()' if value.kind == 'call' else value.name or f'a {value.kind}'
    return f'{value!r:.60}'


def _is_function(item: Item) -> bool:
    return item.kind == 'global' and not _DTYPES.match(item.name)


def _check_whole(root: object) -> None:
    """Refuse what refers to itself, is nested too deeply, or is too much for whoever goes through all of it."""
    done: dict[int, tuple[int, int]] = {}  # values and depth, by id
    path: set[int] = set()
    todo: list[tuple[Item, bool]] = [(root, False)] if isinstance(root, Item) else []
    while todo:
        item, left = todo.pop()
        inner = [part for part in item.parts if isinstance(part, Item)]
        if left:
            path.discard(id(item))
            sizes = [done[id(part)] for part in inner]
            size = 1 + len(item.parts) - len(inner) + sum(size for size, _ in sizes)
            depth = 1 + max((depth for _, depth in sizes), default=0)
            if size > VALUES or depth > DEPTH:
                raise Unsafe(f'it holds {size:,} values, {depth} deep')
            done[id(item)] = size, depth
        elif (item.kind in CONTAINERS or item.name in DICTS) and any(_is_function(part) for part in inner):
            raise Unsafe(f'it holds {next(part.name for part in inner if _is_function(part))}, which is no data')
        elif id(item) in path:
            raise Unsafe('it holds something that contains itself')
        elif id(item) not in done:
            path.add(id(item))
            todo.append((item, True))
            todo += [(part, False) for part in inner if id(part) not in done]
