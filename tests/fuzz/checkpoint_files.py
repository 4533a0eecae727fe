"""Checkpoints to spoil, and ways to spoil them: bytes, the zip around the pickle, the pickle's operations, the content."""
import functools
import io
import pickletools
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from fuzz.mutate import Choices, changed_bytes, edited, odd


def network() -> torch.nn.Module:
    """What the checkpoints are of: a backbone with a large kernel, and a head."""
    torch.manual_seed(0)
    large = torch.nn.ModuleDict({'large_kernel': torch.nn.ModuleDict({'lkb_origin': torch.nn.Conv2d(2, 2, 3, bias=False)})})
    network = torch.nn.ModuleDict(
        {
            'backbone': torch.nn.ModuleDict({'stages': torch.nn.ModuleList([large])}),
            'decode_head': torch.nn.Conv2d(2, 3, 1, bias=False),
        }
    )
    network.backbone.out_indices = (0,)
    return network


@functools.cache
def contents() -> list[Any]:
    """Checkpoints as training programs save them."""
    weights = network().state_dict()
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    parameters = list(weights.values())[:2]
    trained = dict(
        meta=dict(
            epoch=1,
            iter=4,
            seed=3,
            time='now',
            experiment_name='x',
            hook_msgs={},
            config='a = 1\n',
            mmengine_version='0',
            dataset_meta=dict(classes=('a', 'b', 'c'), palette=[[1, 2, 3]] * 3),
        ),
        state_dict=weights,
        optimizer=dict(
            state={0: dict(step=torch.tensor(4.0), exp_avg=parameters[0] * 0, exp_avg_sq=parameters[1] * 0)},
            param_groups=[dict(lr=1e-3, betas=(0.9, 0.999), params=[0, 1])],
        ),
        param_schedulers=[dict(last_step=4, _global_step=5, last_value=[0.1])],
        message_hub=dict(
            log_scalars={'train/loss': buffer},
            runtime_info=dict(iter=4, lr=np.float64(0.1), n=np.int64(2)),
            resumed_keys={'train/loss': True},
        ),
    )
    merged = dict(meta=dict(replk_mm=dict(reparameterized=dict(merge=False, fold=True))), state_dict=weights)
    timm = {
        'stages.0.blocks.0.conv_dw.weight': torch.ones(4, 1, 7, 7),
        'stages.0.blocks.0.mlp.grn.weight': torch.ones(1, 1, 1, 4),
        'head.fc.bias': torch.ones(9),
    }
    official = {
        'model': OrderedDict(
            timm
            | {
                'stages.0.0.dwconv.weight': torch.ones(4, 1, 7, 7),
                'norm.weight': torch.ones(4),
                'head.weight': torch.ones(9, 4),
            }
        )
    }
    return [trained, merged, dict(weights), timm, official, {'state_dict': {f'module.{k}': v for k, v in weights.items()}}]


def saved(content: Any, legacy: bool = False) -> bytes:
    """A file of torch; nothing if torch cannot save it."""
    file = io.BytesIO()
    try:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    except Exception:  # pickle and torch refuse in many ways what is no data
        return b''
    return file.getvalue()


#: Values that no checkpoint should hold, made anew for each use.
_STRANGE = [
    lambda: torch.ones(1).expand(10**12), lambda: torch.ones(2, 1).expand(2, 10**7),
    lambda: torch.ones(1000).expand(10**6, 1000), lambda: torch.eye(3).to_sparse(),
    lambda: torch.empty(10**6, 10**6, device='meta'), lambda: torch.ones(0), lambda: torch.tensor(float('nan')),
    lambda: torch.ones(2, 2).t(), lambda: torch.ones(3, dtype=torch.complex64), lambda: torch.ones(3, dtype=torch.bool),
    lambda: torch.ones(3, dtype=torch.bfloat16), lambda: torch.ones(4)[::2],
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), lambda: torch.nn.Parameter(torch.ones(2)),
    lambda: torch.ones(2, requires_grad=True), lambda: np.ones((2, 2)), lambda: np.float32(2),
    lambda: np.array(['a', 'bc']), lambda: np.array([None, 1], object), lambda: np.ones(2, [('a', 'f4')]),
    lambda: np.datetime64('2001-01-01'), lambda: HistoryBuffer([1.0], [1]), lambda: OrderedDict(a=1), lambda: {1: 2},
    lambda: {(1, (2, 3)): 4}, lambda: b'bytes', lambda: bytearray(b'x'), lambda: {1, 2}, lambda: frozenset([1]),
    lambda: 1j, lambda: torch.Size([1, 2]), lambda: torch.float32, lambda: torch.device('cpu'), lambda: print,
    lambda: HistoryBuffer, lambda: (1,) * 50, lambda: {None: 1}, lambda: {2.5: torch.ones(1)}]


def _itself() -> list:
    """A list that contains itself."""
    found: list = []
    found.append(found)
    return found


def _value(choices: Choices) -> Any:
    return choices.pick([*_STRANGE, _itself, lambda: {'model': _itself()}])() if choices.below(3) else odd(choices)


_KEYS = (
    'model', 'state_dict', 'module', 'meta', 'optimizer', 'backbone.x', 'stages.x.1.dwconv.w', 'stages.99999.0.conv_dw',
    'stages.0.0.grn.weight', 'a.large_kernel.lkb_reparam.weight', 'norm', '', '.', '\x1b[31m', 'n_averaged', 'lkb_origin',
    'head.fc.weight', 'module.', '\ud800', 'x' * 500, 'shape', 'items')


def _changed_contents(choices: Choices) -> bytes:
    content = choices.pick(contents())
    legacy, add, nested, key = choices.below(4) == 0, choices.below(2), choices.below(2), choices.pick(_KEYS)
    try:
        content = edited(content, choices, _value)
    except (KeyError, IndexError, TypeError, RuntimeError):  # what cannot be copied or take that key
        content = {**content}
    if add and isinstance(content, dict):
        node = content['state_dict'] if nested and isinstance(content.get('state_dict'), dict) else content
        node[key] = _value(choices)
    return saved(content, legacy)


def text(value: str) -> bytes:
    """A pickled text."""
    raw = value.encode('utf-8', 'surrogatepass')
    return b'X' + len(raw).to_bytes(4, 'little') + raw


def number(value: int) -> bytes:
    """A pickled whole number."""
    size = (value.bit_length() + 8) // 8
    return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


def _name(name: str) -> bytes:
    module, _, last = name.rpartition('.')
    return f'c{module}\n{last}\n'.encode()


_NAMES = [
    'os.system', 'posix.system', 'builtins.eval', '__builtin__.eval', 'builtins.exec', 'builtins.open', 'builtins.getattr',
    '__builtin__.getattr', 'builtins.bytearray', 'builtins.set', 'builtins.complex', '_codecs.encode',
    'collections.OrderedDict', 'collections.Counter', 'collections.defaultdict', 'subprocess.Popen', 'torch.Tensor',
    'torch.FloatStorage', 'torch.Size', 'torch.storage.UntypedStorage', 'torch.storage.TypedStorage', 'torch.device',
    'torch.float32', 'torch.load', 'torch.hub.load', 'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_tensor_v3',
    'torch._utils._rebuild_parameter', 'torch._utils._rebuild_sparse_tensor', 'torch._utils._rebuild_qtensor',
    'torch._utils._rebuild_meta_tensor_no_storage', 'torch._utils._rebuild_device_tensor_from_numpy',
    'torch._utils._rebuild_parameter_with_state', 'torch._tensor._rebuild_from_type_v2', 'torch.nn.parameter.Parameter',
    'numpy.ndarray', 'numpy.dtype', 'numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct',
    'numpy._core.multiarray.scalar', 'numpy.dtypes.Float64DType', 'mmengine.logging.history_buffer.HistoryBuffer',
    'torch.serialization._get_layout']
_PIECES = [_name(name) for name in _NAMES] + [
    b')', b'(', b't', b'R', b'\x81', b'b', b'a', b'e', b's', b'u', b']', b'}', b'\x8f', b'\x85', b'\x86', b'\x87', b'N',
    b'\x88', b'\x89', b'Q', b'q\x00', b'q\x01', b'h\x00', b'h\x01', b'h\x02', b'r\xff\xff\xff\x7f', b'0', b'2', b'P1\n',
    b'\x95' + b'\xff' * 8, b'.', b'K\x05', b'J\xff\xff\xff\xff', number(2**62), number(10**12), number(10**9),
    b'G' + b'\x7f\xf8' + b'\x00' * 6, b'U\x03abc', text('latin1'), text('punycode'), text('storage'), text('cpu'),
    text('0'), text('mean'), text('__init__'), text('__globals__'), text('f8'), text('O'), text('U3'), text('V1000000000'),
    text('statistics_methods'), text('_log_history'), text('touch x'), text('<')]
# Whole sentences that did harm to some loader.
_SENTENCES = [
    b'cposix\nsystem\n(' + text('touch hostile') + b'tR',
    b'c__builtin__\neval\n(' + text('1') + b'tR',
    b'cbuiltins\nbytearray\n(' + number(2**34) + b'tR',
    b'ctorch\nFloatStorage\n(' + number(2**34) + b'tR',
    b'ctorch\nTensor\n(' + number(2**34) + b'tR',
    b'cnumpy\nndarray\n((' + number(2**34) + b'tR',
    b'cnumpy\nndarray\n(' + number(2**34) + b'\x85t\x81',
    b'c_codecs\nencode\n(' + text('ä' * 3000) + text('punycode') + b'tR',
    b')' + b'\x85' * 3000,
    b')' + b'\x86'.join([b'q\x30h\x30'] * 40) + b'\x86',
    b'})' + b''.join(b'2\x86' for _ in range(40)) + b'K\x01s',
    b'}' + b')q\x20' + b''.join(b'h\x20h\x20\x86q\x20' for _ in range(60)) + b'K\x01s',
    b']q\x21h\x21a',
    b'}q\x21' + text('model') + b'h\x21s',
    b']q\x21' + b''.join(b'](h\x21h\x21h\x21eq\x21' for _ in range(40)),
    b'cnumpy\ndtype\n(' + text('f8') + b'\x89\x88tR(K\x03' + text('<') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x01tb',
    b'cnumpy\ndtype\n(' + text('U2') + b'\x89\x88tR(K\x03' + text('<') + b'NNNK\x08K\x04K\x01tb',
    b'cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(' + text('U900000000') + b'\x89\x88tRtR',
    b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81}'
    + text('statistics_methods')
    + b'}'
    + text('mean')
    + b'cbuiltins\nbytearray\nssb',
    b'ccollections\nOrderedDict\n)R}' + text('items') + b'cbuiltins\nbytearray\nsb',
    b'ccollections\nOrderedDict\n)R' + text('w') + b'cbuiltins\nbytearray\ns',
    b'cbuiltins\nbytearray\n(' + text('ä' * 3000) + text('punycode') + b'tR',
    b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85' + text('V2000000000') + b'tR',
    b'Ns)' + b''.join(b'q\x20h\x20\x86' for _ in range(16)) + b'q\x20}' + b'h\x20Ns' * 50 + b'}' + text('y') + b'N',
    *(name + b'\n(ctorch._utils\n_rebuild_tensor_v2\n((' + text('storage') + b'ctorch\nFloatStorage\n' + text('0')
      + text('cpu') + b'K\x04tQK\x00' + number(10**7) + b'\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtRtR'
      for name in (b'cbuiltins\nset', b'ccollections\nCounter', b'ctorch\nSize')),
]


def pickle_of(file: bytes) -> bytes:
    """The pickle in a file of torch."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith('data.pkl')))


def with_pickle(file: bytes, pickled: bytes, how: int = 0, where: int = 0) -> bytes:
    """The file with another pickle; ``how`` and ``where`` spoil the zip around it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as source:
        entries = [
            (item.filename, pickled if item.filename.endswith('data.pkl') else source.read(item)) for item in source.infolist()
        ]
    at = where % len(entries)
    name, content = entries[at]
    if how == 1:
        entries[at] = (name.replace('/', '/../', 1), content)
    elif how == 2:
        entries[at] = ('../../../home/hostile' if where % 2 else '/etc/hostile', content)
    elif how == 3:
        entries[at] = name, content[: where % (len(content) + 1)]
    elif how == 4:
        entries[at] = name, content + b'\x00' * (where % 5000)
    elif how == 5:
        entries.insert(where % 3, entries[at])
    elif how == 6:
        del entries[at]
    elif how == 7:
        entries[at] = name, b'\x00' * (4 << 20)
    packed = zipfile.ZIP_DEFLATED if how in (7, 8) else zipfile.ZIP_STORED
    import warnings

    with zipfile.ZipFile(out, 'w', packed) as target, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of names that are there twice
        for name, content in entries:
            target.writestr(name, content)
    return out.getvalue()


def _reassembled(choices: Choices) -> bytes:
    file, pickled, ends = choices.pick(_originals())
    how, where = (choices.below(9), choices.below(2**16)) if choices.below(2) else (0, 0)
    for _ in range(choices.below(3)):
        piece = (
            choices.pick(_SENTENCES)
            if choices.below(2)
            else b''.join(choices.pick(_PIECES) for _ in range(1 + choices.below(6)))
        )
        what, place = choices.below(5), choices.pick(ends)
        if what == 0:  # in the place of a value
            pickled = pickled[:place] + piece + pickled[place:]
        elif what == 1:
            pickled = pickled[:place] + piece + b'0' + pickled[place:]
        elif what == 2:
            pickled = pickled[:2] + piece + b'.'
        elif what == 3:  # as a value of the outermost dict
            pickled = pickled[:-1] + text('y') + piece + b's.'
        else:
            pickled = pickled[:place] + pickled[choices.pick(ends) :]
    return with_pickle(file, pickled, how, where)


@functools.cache
def _originals() -> list[tuple[bytes, bytes, list[int]]]:
    """Files, their pickles, and where the operations of these begin."""
    files = [saved(content) for content in contents()]
    return [(file, pickle_of(file), [place for _, _, place in pickletools.genops(pickle_of(file))][1:]) for file in files]


@functools.cache
def _files() -> list[bytes]:
    return [*(file for file, _, _ in _originals()), *(saved(content, legacy=True) for content in contents()[:3])]


def spoiled(choices: Choices) -> bytes:
    """A spoiled checkpoint."""
    kind = choices.below(4)
    if kind == 0:
        return changed_bytes(choices.pick(_files()), choices)
    return _changed_contents(choices) if kind == 1 else _reassembled(choices)
