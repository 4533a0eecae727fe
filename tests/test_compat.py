"""The mends for mmengine and torch: idempotent, and no wider than needed."""
import io
import pickle
import zipfile
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from replk_mm import compat, pickle_globals
from replk_mm.errors import UserError


@pytest.fixture(autouse=True)
def _allowed():
    with pickle_globals.harmless_pickles_allowed():
        yield


def checkpoint(payload: bytes) -> io.BytesIO:
    """A file as torch writes it, with a hand-made pickle in it."""
    plain = io.BytesIO()
    torch.save({}, plain)
    out = io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(out, 'w') as target:
        for item in source.infolist():
            target.writestr(item, payload if item.filename.endswith('data.pkl') else source.read(item))
    out.seek(0)
    return out


def test_register_configs_twice_wraps_once():
    from mmengine.config import utils
    compat.register_configs()
    first = utils._get_package_and_cfg_path
    compat.register_configs()
    assert utils._get_package_and_cfg_path is first
    assert first('replk_mm::a/b.py') == ('replk_mm', 'a/b.py')
    assert first('replk_mm::b.py') == ('replk_mm', 'b.py')
    assert first('mmseg::x/y.py') == ('mmsegmentation', 'x/y.py')
    with pytest.raises(ValueError):
        first('y.py')


def test_log_buffer_round_trip():
    buffer = HistoryBuffer([1., 2., 6.], [1, 1, 2])
    file = io.BytesIO()
    torch.save({'message_hub': {'log_scalars': {'train/loss': buffer}}, 'scalar': np.float64(1.5), 'n': np.int64(7),
                'grid': np.arange(6).reshape(2, 3), 'flag': np.bool_(True)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin = loaded['message_hub']['log_scalars']['train/loss']
    assert twin.mean() == buffer.mean() == 9 / 4 and twin.max() == 6 and twin.current() == 6
    twin.update(3.)
    assert twin.statistics('current') == 3
    assert loaded['scalar'] == 1.5 and loaded['n'] == 7 and loaded['flag']
    assert loaded['grid'].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_arrays_of_both_numpy_generations(module):
    """Published checkpoints were written with numpy 1, whose module has the older name."""
    payload = pickle.dumps({'a': np.arange(4.), 'b': np.float32(2.5)}, 2)
    own = np.arange(1.).__reduce__()[0].__module__.encode()
    loaded = torch.load(checkpoint(payload.replace(own, module.encode())), weights_only=True)
    assert loaded['a'].tolist() == [0, 1, 2, 3] and loaded['b'] == 2.5


# Python pickles protocol 2 by hand: c = global, ( = mark, t = tuple, R = call, X = text, . = end.
def text(value: str) -> bytes:
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


BUFFER = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
EXPLOITS = {
    'os.system': b'\x80\x02cposix\nsystem\n(' + text('true') + b'tR.',
    'eval': b'\x80\x02c__builtin__\neval\n(' + text('1') + b'tR.',
    'getattr of a class for __init__': b'\x80\x02c__builtin__\ngetattr\n(' + BUFFER + text('__init__') + b'tR.',
    'getattr, new name': b'\x80\x02cbuiltins\ngetattr\n(' + BUFFER + text('__init__') + b'tR.',
    'getattr for __globals__': b'\x80\x02cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(' + BUFFER + text('mean') + b'tR'
                               + text('__globals__') + b'tR.',
    'getattr of the class of a class': b'\x80\x02cbuiltins\ngetattr\n(' + BUFFER + text('__class__') + b'tR.',
    'getattr of numpy for an allowed name': b'\x80\x02cbuiltins\ngetattr\n(cnumpy\nndarray\n' + text('max') + b'tR.',
    'getattr of numpy': b'\x80\x02cbuiltins\ngetattr\n(cnumpy\nndarray\n' + text('tofile') + b'tR.',
    'a method of the allowed class': b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer.register_statistics\n('
                                     + text('x') + b'tR.',
}


@pytest.mark.parametrize('name', EXPLOITS)
def test_exploits_are_refused(name):
    with pytest.raises(UnpicklingError):
        torch.load(checkpoint(EXPLOITS[name]), weights_only=True)


def test_the_harmless_call_is_allowed():
    payload = b'\x80\x02cbuiltins\ngetattr\n(' + BUFFER + text('mean') + b'tR.'
    assert torch.load(checkpoint(payload), weights_only=True) is HistoryBuffer.mean


def test_allow_list_holds_no_code():
    """Names as a pickle would write them; none may be a module's way to run or import something."""
    names = {f'{item.__module__}.{item.__qualname__}' for item in pickle_globals.harmless_pickles()}
    assert {n for n in names if not n.startswith(('numpy', 'mmengine.logging.history_buffer.HistoryBuffer'))} == {
        'builtins.getattr'}
    assert not any(item is getattr for item in pickle_globals.harmless_pickles())


# ---- mmengine's loading

@pytest.fixture
def checkpoints():
    from mmengine.runner import checkpoint

    import replk_mm.registry  # noqa: F401 (mends mmengine)
    return checkpoint


def test_mmengines_arguments_are_honoured(checkpoints, tmp_path, monkeypatch):
    content = {'state_dict': torch.nn.Linear(2, 2).state_dict(), 'list': [(torch.ones(1), 3)]}
    fetched = []

    def download(address, path, progress):
        torch.save(content, path)
        fetched.append((address, path, progress))

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    found = checkpoints.load_from_http('http://host/x.pth', model_dir=str(tmp_path / 'models'), progress=False)
    assert fetched == [('http://host/x.pth', str(tmp_path / 'models' / 'x.pth'), False)]
    assert found['state_dict']['weight'].device.type == 'cpu'
    moved = checkpoints.load_from_local(str(tmp_path / 'models' / 'x.pth'), 'meta')
    assert {t.device.type for t in (*moved['state_dict'].values(), moved['list'][0][0])} == {'meta'}
    assert moved['state_dict']._metadata == content['state_dict']._metadata and moved['list'][0][1] == 3
    assert checkpoints.load_from_local(str(tmp_path / 'models' / 'x.pth'), lambda storage, place: storage)['list'][0][0] == 1


def test_mmengines_kind_of_error_for_a_file_that_is_not_there(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.pth: no such checkpoint') as info:
        checkpoints.load_checkpoint(torch.nn.Linear(2, 2), str(tmp_path / 'absent.pth'))
    assert isinstance(info.value, UserError)


def test_the_remedy_is_one_for_programs_without_our_options(checkpoints, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': {}, 'x': zipfile.ZipInfo()}, path)
    with pytest.raises(UserError, match='refused') as info:
        checkpoints.load_checkpoint(torch.nn.Linear(2, 2), str(path))
    assert f'tools/convert_checkpoint.py {path} NEW --trust-checkpoint' in str(info.value)
