"""What loading a checkpoint's pickle would call and how much it would make, found by reading it without obeying it.

torch's ``weights_only`` loader calls listed functions only. The list alone does not do: ``bytearray`` takes any number for a
length, numpy's dtypes take flags that make numbers into pointers, and tuples of tuples of one tuple, a few hundred bytes,
take for ever to hash or overflow the stack. So the arguments are looked at here, before torch does what the file says.
"""
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

#: Deepest nesting, and most values counted as often as they are referred to, of what a checkpoint may hold.
DEPTH, VALUES = 100, 10_000_000
_SHOWN = 3
_STATISTICS = ('min', 'max', 'mean', 'current')
_NUMBERS = re.compile(r'(b1|[iu][1248]|f[248]|U[1-9]\d{0,3})\Z')
_DTYPES = re.compile(r'torch\.(bool|half|b?float\w*|u?int\d+|c?q?u?int\d+|complex\d+)\Z')
_CONTAINERS = ('tuple', 'list', 'dict', 'set')
_OLD_NAMES = (('__builtin__.', 'builtins.'), ('numpy.core.', 'numpy._core.'))
_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'


class Unsafe(Exception):
    """What a file would do that it must not."""


class Item:
    """A value that is no plain constant.

    Attributes:
        kind: ``'tuple'``, ``'list'``, ``'dict'``, ``'set'``, ``'global'``, ``'call'`` or ``'storage'``.
        name: Of a global, or of what is called.
        parts: What is in it, a dict's keys and values in turns; of a call the arguments.
        size: Values in a tuple, counted as often as they are referred to.
        depth: Of nested tuples.
    """

    __slots__ = ('depth', 'kind', 'name', 'parts', 'size')

    def __init__(self, kind: str, parts: list | None = None, name: str = '') -> None:
        self.kind, self.name, self.parts, self.size, self.depth = kind, name, parts or [], 1, 1
        if kind == 'tuple':
            inner = [part for part in self.parts if isinstance(part, Item)]
            self.size += len(self.parts) - len(inner) + sum(part.size for part in inner)
            self.depth += max((part.depth for part in inner), default=0)
            if self.size > VALUES or self.depth > DEPTH:
                raise Unsafe(f'it holds tuples within tuples that have {self.size:,} parts, {self.depth} deep')


def _is(value: object, kind: str, name: str | None = None) -> bool:
    return isinstance(value, Item) and value.kind == kind and name in (None, value.name)


def _few(args: list) -> bool:
    return len(args) <= 1


def _any(args: list) -> bool:
    return True


def _view(args: list) -> bool:
    # The storage, its part, and then functions to call in a backward pass and other things that weights do not have.
    hooks = args[5] if len(args) > 5 else None
    return 4 <= len(args) <= 6 and _is(args[0], 'storage') and (
        hooks is None or _is(hooks, 'call', 'collections.OrderedDict') and not hooks.parts)


#: What a checkpoint may call, and with which arguments. Whatever else torch would call makes tensors of a size that the
#: arguments say, or none that copy_ takes: sparse, quantized, nested, on no device.
_CALLS: dict[str, Callable[[list], bool]] = {
    'collections.OrderedDict': _few,
    'collections.Counter': _few,
    'torch._utils._rebuild_tensor': _view,
    'torch._utils._rebuild_tensor_v2': _view,
    'torch._utils._rebuild_parameter': _any,
    'torch.Size': _few,
    'torch.device': _any,
    'torch.serialization._get_layout': _few,
    '_codecs.encode': lambda args: len(args) == 2 and isinstance(args[0], str) and args[1] in ('latin1', 'latin-1'),
    'builtins.set': _few,
    'builtins.bytearray': lambda args: bool(args) and (isinstance(args[0], (str, bytes)) or _is(args[0], 'call',
                                                                                             '_codecs.encode')),
    'builtins.complex': lambda args: all(isinstance(part, (int, float)) for part in args),
    'builtins.getattr': lambda args: len(args) == 2 and _is(args[0], 'global', _BUFFER) and args[1] in _STATISTICS,
    'numpy._core.multiarray._reconstruct': lambda args: (
        len(args) == 3 and _is(args[0], 'global', 'numpy.ndarray') and _is(args[1], 'tuple') and args[1].parts == [0]),
    'numpy._core.multiarray.scalar': lambda args: len(args) == 2 and _is(args[0], 'call', 'numpy.dtype'),
    'numpy.dtype': lambda args: isinstance(args[0] if args else None, str) and bool(_NUMBERS.match(args[0])),
    _BUFFER: lambda args: not args,
}


def _attributes(state: object) -> dict | None:
    """A dict of attributes whose names are constants."""
    if not _is(state, 'dict') or not all(isinstance(key, str) for key in state.parts[::2]):  # type: ignore[attr-defined]
        return None
    return dict(zip(state.parts[::2], state.parts[1::2], strict=True))  # type: ignore[attr-defined]


def _dict_state(target: Item, state: object) -> bool:
    found = _attributes(state)
    return found is not None and not any(hasattr(OrderedDict, name) for name in found)


def _dtype_state(target: Item, state: object) -> bool:
    """``(version, byte order, None, None, None, bytes, alignment, flags)``: flags say, for one, that it holds pointers."""
    if not _is(state, 'tuple') or len(state.parts) != 8:  # type: ignore[attr-defined]
        return False
    version, order, *rest = state.parts  # type: ignore[attr-defined]
    kind = target.parts[0]
    expected = [4 * int(kind[1:]), 4, 8] if kind[0] == 'U' else [-1, -1, 0]
    return version == 3 and order in ('<', '>', '|', '=') and rest == [None, None, None, *expected]


def _array_state(target: Item, state: object) -> bool:
    return _is(state, 'tuple') and len(state.parts) == 5 and _is(state.parts[2], 'call', 'numpy.dtype')  # type: ignore


def _buffer_state(target: Item, state: object) -> bool:
    found = _attributes(state)
    if found is None or not found.keys() <= {'max_length', '_log_history', '_count_history', 'statistics_methods'}:
        return False
    named = _attributes(found.get('statistics_methods', Item('dict')))
    # They are kept for all buffers of the process.
    return type(found.get('max_length', 0)) is int and named is not None and all(
        _is(method, 'call', 'builtins.getattr') and method.parts[1] == name for name, method in named.items()) and all(
        _is(found[key], 'call', 'numpy._core.multiarray._reconstruct') for key in ('_log_history', '_count_history')
        if key in found)


_STATES: dict[str, Callable[[Item, object], bool]] = {
    'collections.OrderedDict': _dict_state, 'numpy.dtype': _dtype_state,
    'numpy._core.multiarray._reconstruct': _array_state, _BUFFER: _buffer_state}


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
            check = _STATES.get(target.name) if _is(target, 'call') else None
            if check is None or not check(target, state):
                raise Unsafe(f'it sets the inner state of {_shown(target)}')
            target.parts = [*target.parts, state]
        elif code == 'BINPERSID':
            key = stack.pop()
            if not _is(key, 'tuple'):
                raise ValueError('a storage without a name')
            stack.append(Item('storage', key.parts))
            self.storages.append(stack[-1])
        elif code not in ('PROTO', 'STOP'):
            raise ValueError(f'a pickle with {code}, which torch does not read')

    @staticmethod
    def _fill(target: Any, parts: list, code: str) -> None:
        if 'ITEM' not in code:
            if not _is(target, 'list'):
                raise ValueError('something is appended to what is no list')
        elif len(parts) % 2 or not (_is(target, 'dict') or _is(target, 'call', 'collections.OrderedDict')
                                    or _is(target, 'call', 'collections.Counter')):
            raise ValueError('an item is set of what is no dict')
        target.parts.extend(parts)


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, **dict.fromkeys(
    ('BININT', 'BININT1', 'BININT2', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINSTRING', 'LONG1'))}
_EMPTY = {'EMPTY_TUPLE': 'tuple', 'EMPTY_LIST': 'list', 'EMPTY_DICT': 'dict', 'EMPTY_SET': 'set'}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def _called(function: object, arguments: object) -> Item:
    parts = arguments.parts if isinstance(arguments, Item) and arguments.kind == 'tuple' else None
    allows = _CALLS.get(function.name) if isinstance(function, Item) and function.kind == 'global' else None
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
        elif item.kind in _CONTAINERS and any(_is_function(part) for part in inner):
            raise Unsafe(f'it holds {next(part.name for part in inner if _is_function(part))}, which is no data')
        elif id(item) in path:
            raise Unsafe('it holds something that contains itself')
        elif id(item) not in done:
            path.add(id(item))
            todo.append((item, True))
            todo += [(part, False) for part in inner if id(part) not in done]
