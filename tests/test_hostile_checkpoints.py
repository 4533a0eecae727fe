"""Checkpoints made to do harm: each is refused by a message, nothing of it runs, and it takes little memory and time."""
import io
import pickle
import pickletools
import resource
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fuzz.checkpoint_files import number, pickle_of, saved, text, with_pickle
from mmengine.logging import HistoryBuffer
from tiny import tool_environment

from replk_mm import pickle_scan, safe_load
from replk_mm.checkpoints import read
from replk_mm.errors import UserError

WEIGHTS = {'w': torch.arange(4.)}
DTYPE = b'cnumpy\ndtype\n(' + text('f8') + b'\x89\x88tR'
BUFFER = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
ARRAY = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85'
#: A view of one number as a billion; the storage is the one that the weights have.
VIEW = (b'ctorch._utils\n_rebuild_tensor_v2\n((' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu')
        + b'K\x04tQK\x00' + number(10**9) + b'\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtR')


def state(size: int, alignment: int, flags: int) -> bytes:
    return b'(K\x03' + text('<') + b'NNN' + number(size) + number(alignment) + number(flags) + b't'


#: What to call it, a pickled value, what the message names.
GADGETS = {
    'a program': (b'cposix\nsystem\n(' + text('true') + b'tR', 'posix.system'),
    'a number of bytes to make room for': (b'cbuiltins\nbytearray\n(' + number(2**35) + b'tR', 'bytearray(34359738368)'),
    'a tensor of a size of its own': (b'ctorch\nTensor\n(' + number(2**35) + b'tR', 'torch.Tensor(34359738368)'),
    'an array of a size of its own': (b'cnumpy\nndarray\n((' + number(2**35) + b'ttR', 'numpy.ndarray'),
    'a text in a slow encoding': (b'c_codecs\nencode\n(' + text('\u4e00' * 9) + text('punycode') + b'tR', 'punycode'),
    'numbers that are taken for pointers': (DTYPE + state(-1, -1, 1) + b'b', 'inner state of numpy.dtype'),
    'texts that are taken for pointers': (b'cnumpy\ndtype\n(' + text('U2') + b'\x89\x88tR' + state(8, 4, 1) + b'b',
                                          'inner state of numpy.dtype'),
    'objects in an array': (b'cnumpy\ndtype\n(' + text('O') + b'\x89\x88tR', "numpy.dtype('O'"),
    'tuples within tuples, 60 deep, each twice the former': (
        b'}' + b')q\x20' + b''.join(b'h\x20h\x20\x86q\x20' for _ in range(60)) + b'K\x01s', 'tuples within tuples'),
    'tuples within tuples, deeper than the stack': (b'})' + b'\x85' * 300_000 + b'K\x01s', 'tuples within tuples'),
    'lists within lists, each three times the former': (
        b']q\x21' + b''.join(b's' + text(str(i)) + b'](h\x21h\x21h\x21eq\x21' for i in range(60)), 'values'),
    'a list that contains itself': (b']q\x21h\x21a', 'contains itself'),
    'a dict whose method is a function of the file': (
        b'ccollections\nOrderedDict\n)R}' + text('items') + b'cbuiltins\nbytearray\nsb',
        'inner state of collections.OrderedDict'),
    'a log whose mean is a function of the file': (
        BUFFER + b')\x81}' + text('statistics_methods') + b'}' + text('mean') + b'cbuiltins\nbytearray\nssb',
        'inner state of mmengine'),
    'a function as a value': (b'cbuiltins\nbytearray\n', 'builtins.bytearray, which is no data'),
    'a class in a list': (b'](' + BUFFER + b'e', 'which is no data'),
    'a sparse tensor': (b'ctorch._utils\n_rebuild_sparse_tensor\n)R', '_rebuild_sparse_tensor'),
    'a text in a slow encoding, as bytes': (
        b'cbuiltins\nbytearray\n(' + text('\u4e00' * 9) + text('punycode') + b'tR', 'punycode'),
    'a set of what is no list': (b'cbuiltins\nset\n(' + VIEW + b'tR', 'builtins.set(torch._utils._rebuild_tensor_v2())'),
    'a count of what is no list': (b'ccollections\nCounter\n(' + VIEW + b'tR', 'collections.Counter(torch._utils'),
    'an ordered dict of what is no list': (b'ccollections\nOrderedDict\n(' + VIEW + b'tR', 'collections.OrderedDict(torch'),
    'a size of what is no list': (b'ctorch\nSize\n(' + VIEW + b'tR', 'torch.Size(torch._utils'),
    'values that are made and left behind': (b'Ns}' + text('y') + b'N', 'beside its content'),
    'a mark that is never met': (b'Ns(}' + text('y') + b'N', 'beside its content'),
    'a function in an ordered dict': (b'ccollections\nOrderedDict\n)R' + text('w') + b'cbuiltins\nbytearray\ns',
                                      'builtins.bytearray, which is no data'),
    'a function that is counted': (b'ccollections\nCounter\n)R' + text('w') + b'cbuiltins\nbytearray\ns', 'which is no data'),
    'an empty array of two gigabytes': (ARRAY + text('V2000000000') + b'tR', "numpy._core.multiarray._reconstruct("),
    'a call of what a call returned': (b'ccollections\nOrderedDict\n)R)R', 'collections.OrderedDict()'),
}


@pytest.mark.parametrize('name', GADGETS)
def test_hostile_values_are_refused_before_torch_reads_them(name, tmp_path, monkeypatch):
    value, named = GADGETS[name]
    path = tmp_path / 'hostile.pth'
    file = saved(WEIGHTS)
    path.write_bytes(with_pickle(file, pickle_of(file)[:-1] + text('x') + value + b's.'))
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: pytest.fail('torch has read it'))
    start = time.process_time()
    with pytest.raises(UserError) as info:
        read(path)
    assert str(info.value).startswith(f'{path}: refused: ') and named in str(info.value)
    assert time.process_time() - start < 20  # the same values keep torch busy for ever


def test_tensors_that_are_more_than_the_file(tmp_path):
    for name, tensor in (('huge', torch.ones(1).expand(10**12)), ('sparse', torch.eye(3).to_sparse()),
                         ('nowhere', torch.ones(3, device='meta'))):
        path = tmp_path / f'{name}.pth'
        torch.save({'w': torch.ones(2), name: tensor}, path)
        with pytest.raises(UserError) as info:
            read(path)
        assert str(info.value).startswith(f'{path}: refused: ')
    torch.save({'w': torch.ones(1).expand(2000)}, tmp_path / 'small.pth')
    assert read(tmp_path / 'small.pth')['w'].sum() == 2000


def zipped(path, entries: dict, how: int) -> None:
    with zipfile.ZipFile(path, 'w', how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_a_zip_that_unpacks_to_much_more(tmp_path):
    path = tmp_path / 'bomb.pth'
    zipped(path, {'x/data.pkl': pickle_of(saved(WEIGHTS)), 'x/data/0': bytes(64 << 20), 'x/version': b'3\n'},
           zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match='compressed') as info:
        read(path)


def test_names_in_a_zip_lead_nowhere(tmp_path):
    path = tmp_path / 'in' / 'x.pth'
    path.parent.mkdir()
    file = with_pickle(saved(WEIGHTS), pickle_of(saved(WEIGHTS)), 2, 3)  # an entry with the path of another folder
    path.write_bytes(file)
    with pytest.raises(UserError, match='not a readable checkpoint'):
        read(path)
    assert sorted(tmp_path.rglob('*')) == [path.parent, path]


@pytest.mark.parametrize('legacy', [False, True])
def test_storages_shorter_than_they_say(legacy, tmp_path):
    path = tmp_path / 'short.pth'
    file = saved(WEIGHTS, legacy)
    said = b'K\x04'
    if legacy:
        path.write_bytes(file.replace(said + b'N', number(10**11) + b'N', 1))
    else:
        path.write_bytes(with_pickle(file, pickle_of(file).replace(said + b't', number(10**11) + b't', 1)))
    assert path.read_bytes() != file
    with pytest.raises(UserError) as info:
        read(path)
    assert '400,000,000,000' in str(info.value)


def test_a_tar_archive_that_reads_as_pickles(tmp_path, monkeypatch):
    """Older versions of torch hand archives to another loader, whose pickles nobody would have looked at."""
    path = tmp_path / 'tar.pth'
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo('N.N.N.N.N.'))
    with path.open('rb') as file:
        assert not any(pickle_scan.scan(file) for _ in range(5)), 'its name is five pickles of nothing'
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: pytest.fail('torch has read it'))
    with pytest.raises(UserError, match='refused: it is a tar archive') as info:
        read(path)


@pytest.mark.parametrize('legacy', [False, True])
def test_what_is_no_storage(legacy, tmp_path):
    path = tmp_path / 'module.pth'
    file = saved(WEIGHTS, legacy)
    if legacy:
        path.write_bytes(file.replace(text('storage'), text('modules')))
    else:
        path.write_bytes(with_pickle(file, pickle_of(file).replace(text('storage'), text('modules'))))
    with pytest.raises(UserError, match='a storage without a type, a name or a size'):
        read(path)


def test_a_storage_that_is_claimed_twice_counts_as_the_larger(tmp_path):
    path = tmp_path / 'twice.pth'
    file = saved(WEIGHTS, legacy=True)
    first = file.index(text('storage'))
    claim = file[file.rindex(b'(', 0, first):file.index(b'Q', first) + 1]
    assert claim.count(b'K\x04N') == 1
    larger = claim.replace(b'K\x04N', number(10**11) + b'N')
    path.write_bytes(file.replace(b'}q\x00' + text('w'), b'}' + text('x') + larger + b'sq\x00' + text('w'), 1))
    assert path.read_bytes() != file
    with pytest.raises(UserError, match='400,000,000,000'):
        read(path)


def test_memory_is_bounded_for_what_was_not_foreseen(tmp_path, monkeypatch):
    """In a process of its own: the scan is taken away, and loading asks for 5 GiB."""
    path = tmp_path / 'bomb.pth'
    file = saved(WEIGHTS)
    value = b'cbuiltins\nbytearray\n(' + number(5 << 30) + b'tR'
    path.write_bytes(with_pickle(file, pickle_of(file)[:-1] + text('x') + value + b's.'))
    # The kernel's mark of this process; ru_maxrss begins with what the process that starts it once had.
    program = (f'from replk_mm import checkpoints, errors, pickle_scan\npickle_scan.scan = lambda file: []\n'
               f'try: checkpoints.read({str(path)!r})\nexcept errors.UserError as error: print(error)\n'
               'print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))')
    if sys.platform != 'linux':
        pytest.skip('memory is bounded on Linux only')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, env=tool_environment())
    *message, kilobytes = done.stdout.splitlines()
    assert message[0].startswith(f'{path}: not a readable checkpoint') and int(kilobytes) < 2 << 20
    assert 'MemoryError' in message[1]


def test_the_bound_ends_with_the_loading():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with safe_load.bounded_memory(1 << 30):
        if sys.platform == 'linux':
            assert resource.getrlimit(resource.RLIMIT_DATA) != before
            with pytest.raises(MemoryError):
                bytearray(4 << 30)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is bounded on Linux only')
def test_the_bound_ends_with_loadings_at_the_same_time():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    within, leave = threading.Event(), threading.Event()

    def load() -> None:
        with safe_load.bounded_memory(1 << 30):
            within.set()
            leave.wait(5)

    first = threading.Thread(target=load)
    first.start()
    within.wait(5)
    threading.Timer(.2, leave.set).start()
    with safe_load.bounded_memory(1 << 30):  # begins while the first still loads, and ends after it
        first.join()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_what_training_writes_passes_the_scan():
    """Every kind of value that mmengine, optimizers and schedules put into checkpoints, in both of torch's formats."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=.1)
    model(torch.ones(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    content = dict(
        meta=dict(iter=1, seed=None, time='now', dataset_meta=dict(classes=('a',), palette=[[1, 2, 3]])),
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(), nothing={}, flags={True, False}, raw=b'bytes', more=bytearray(b'x'),
        size=torch.Size([1]),
        message_hub=dict(log_scalars=OrderedDict(loss=HistoryBuffer([1., 2.], [1, 1])), runtime_info=OrderedDict(
            lr=np.float64(.1), name=np.str_('abc'), count=np.int64(1), flag=np.bool_(True), grid=np.ones((2, 2), np.float32))),
        shared=[model[0].weight.detach()] * 3, half=torch.ones(2).half(), empty=torch.ones(0), device=torch.device('cpu'),
        dtypes=[torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8])
    for legacy in (False, True):
        file = io.BytesIO(saved(content, legacy))
        assert file.getvalue()
        storages = []
        if legacy:
            for _ in range(5):
                storages += pickle_scan.scan(file)
        else:
            storages = pickle_scan.scan(pickle_of(file.getvalue()))
        assert len({storage.parts[2] for storage in storages}) == len({
            t.untyped_storage().data_ptr() for _, t in safe_load._tensors(content) if t.numel()}) + 1


def test_scan_reads_what_pickle_reads():
    """Its stack against Python's own unpickler, on plain values."""
    for value in (1, -5, 2**40, 'text', None, True, 2.5, (1, (2, 3)), [1, [2]], {'a': {'b': (1, 2)}}, [(), [], {}], ('x',) * 9
                  ):
        reader = pickle_scan._Reader()
        for code, argument, _ in pickletools.genops(pickle.dumps(value, 2)):
            reader.take(code.name, argument)
        assert plain(reader.stack[-1]) == value


def plain(item):
    if not isinstance(item, pickle_scan.Item):
        return item
    parts = [plain(part) for part in item.parts]
    return {'tuple': tuple, 'list': list, 'dict': lambda p: dict(zip(p[::2], p[1::2], strict=True))}[item.kind](parts)
