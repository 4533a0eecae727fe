"""What a checkpoint's pickle may call, with which arguments, and what state it may give to what it has made."""
import re
from collections import OrderedDict
from collections.abc import Callable

#: Deepest nesting, and most values counted as often as they are referred to, of what a checkpoint may hold.
DEPTH, VALUES = 100, 10_000_000
CONTAINERS = ('tuple', 'list', 'dict', 'set')
#: Calls that make a dict.
DICTS = ('collections.OrderedDict', 'collections.Counter')
_STATISTICS = ('min', 'max', 'mean', 'current')
_NUMBERS = re.compile(r'(b1|[iu][1248]|f[248]|U[1-9]\d{0,3})\Z')
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


def is_(value: object, kind: str, name: str | None = None) -> bool:
    """Whether a value is of a kind, and of this name if one is given."""
    return isinstance(value, Item) and value.kind == kind and name in (None, value.name)


def _collected(args: list) -> bool:
    # A tensor would do too, and a few bytes make one with a billion values to go through.
    return not args or len(args) == 1 and isinstance(args[0], Item) and args[0].kind in CONTAINERS


def _up_to(count: int) -> Callable[[list], bool]:
    return lambda args: len(args) <= count


def _bytes(args: list) -> bool:
    """What is ``bytes`` of a text: ``(text, 'latin1')``. Other encodings take the square of its length."""
    return len(args) == 2 and isinstance(args[0], str) and args[1] in ('latin1', 'latin-1')


def _of_bytes(args: list) -> bool:
    return not args or _bytes(args) or len(args) == 1 and (
        isinstance(args[0], bytes) or is_(args[0], 'call', '_codecs.encode'))


def _empty_array(args: list) -> bool:
    # numpy writes the shape (0,) and the type b'b'; what it becomes is in the state.
    return len(args) == 3 and is_(args[0], 'global', 'numpy.ndarray') and is_(args[1], 'tuple') and args[1].parts == [0] and (
        args[2] in ('b', b'b') or is_(args[2], 'call', '_codecs.encode') and args[2].parts[0] == 'b')


def _view(args: list) -> bool:
    # The storage, its part, and then functions to call in a backward pass and other things that weights do not have.
    hooks = args[5] if len(args) > 5 else None
    return 4 <= len(args) <= 6 and is_(args[0], 'storage') and (
        hooks is None or is_(hooks, 'call', 'collections.OrderedDict') and not hooks.parts)


#: What a checkpoint may call, and with which arguments. Whatever else torch would call makes tensors of a size that the
#: arguments say, or none that copy_ takes: sparse, quantized, nested, on no device.
CALLS: dict[str, Callable[[list], bool]] = {
    'collections.OrderedDict': _collected,
    'collections.Counter': _collected,
    'torch._utils._rebuild_tensor': _view,
    'torch._utils._rebuild_tensor_v2': _view,
    'torch._utils._rebuild_parameter': _up_to(3),
    'torch.Size': _collected,
    'torch.device': _up_to(2),
    'torch.serialization._get_layout': _up_to(1),
    '_codecs.encode': _bytes,
    'builtins.set': _collected,
    'builtins.bytearray': _of_bytes,
    'builtins.complex': lambda args: len(args) <= 2 and all(isinstance(part, (int, float)) for part in args),
    'builtins.getattr': lambda args: len(args) == 2 and is_(args[0], 'global', _BUFFER) and args[1] in _STATISTICS,
    'numpy._core.multiarray._reconstruct': _empty_array,
    'numpy._core.multiarray.scalar': lambda args: len(args) == 2 and is_(args[0], 'call', 'numpy.dtype'),
    'numpy.dtype': lambda args: isinstance(args[0] if args else None, str) and bool(_NUMBERS.match(args[0])),
    _BUFFER: lambda args: not args,
}


def _attributes(state: object) -> dict | None:
    """A dict of attributes whose names are constants."""
    if not is_(state, 'dict') or not all(isinstance(key, str) for key in state.parts[::2]):  # type: ignore[attr-defined]
        return None
    return dict(zip(state.parts[::2], state.parts[1::2], strict=True))  # type: ignore[attr-defined]


def _dict_state(target: Item, state: object) -> bool:
    found = _attributes(state)
    return found is not None and not any(hasattr(OrderedDict, name) for name in found)


def _dtype_state(target: Item, state: object) -> bool:
    """``(version, byte order, None, None, None, bytes, alignment, flags)``: flags say, for one, that it holds pointers."""
    if not is_(state, 'tuple') or len(state.parts) != 8:  # type: ignore[attr-defined]
        return False
    version, order, *rest = state.parts  # type: ignore[attr-defined]
    kind = target.parts[0]
    expected = [4 * int(kind[1:]), 4, 8] if kind[0] == 'U' else [-1, -1, 0]
    return version == 3 and order in ('<', '>', '|', '=') and rest == [None, None, None, *expected]


def _array_state(target: Item, state: object) -> bool:
    return is_(state, 'tuple') and len(state.parts) == 5 and is_(state.parts[2], 'call', 'numpy.dtype')  # type: ignore


def _buffer_state(target: Item, state: object) -> bool:
    found = _attributes(state)
    if found is None or not found.keys() <= {'max_length', '_log_history', '_count_history', 'statistics_methods'}:
        return False
    named = _attributes(found.get('statistics_methods', Item('dict')))
    # They are kept for all buffers of the process.
    return type(found.get('max_length', 0)) is int and named is not None and all(
        is_(method, 'call', 'builtins.getattr') and method.parts[1] == name for name, method in named.items()) and all(
        is_(found[key], 'call', 'numpy._core.multiarray._reconstruct') for key in ('_log_history', '_count_history')
        if key in found)


STATES: dict[str, Callable[[Item, object], bool]] = {
    'collections.OrderedDict': _dict_state, 'numpy.dtype': _dtype_state,
    'numpy._core.multiarray._reconstruct': _array_state, _BUFFER: _buffer_state}
