"""Reading checkpoints from elsewhere: their code never runs, and what cannot be read is explained."""

import argparse
import builtins
import collections
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import Exploit, assert_same, first_line, tiny_backbone, write
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from safetensors.torch import save_file

from replk_mm.checkpoints.io import (
    DownloadError,
    fetch_checkpoint,
    read_checkpoint,
    register_safe_loaders,
    save_checkpoint,
)
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.engine.inference import load_model
from replk_mm.errors import UserError


# ---- code
@pytest.mark.parametrize('legacy', [False, True])
def test_code_is_rejected_and_does_not_run(legacy, tmp_path):
    proof, path = tmp_path / 'proof', tmp_path / 'evil.pth'
    torch.save(
        {'state_dict': {'w': torch.ones(2)}, 'x': Exploit(os.mkdir, str(proof))},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert not proof.exists()
    assert first_line(caught).startswith(f'{path}: ') and '.mkdir' in first_line(caught)
    assert f'convert_checkpoint {path} {tmp_path}/evil.safetensors --trust-checkpoint' in str(caught.value)
    read_checkpoint(path, trust=True)
    assert proof.exists(), 'the same file does run code for those who ask for it'


@pytest.mark.parametrize(
    ('value', 'named'),
    [
        (Exploit(builtins.eval, '1'), 'eval'),
        (Exploit(getattr, Exploit, '__init__'), 'Exploit'),
        (Exploit(zipfile.ZipInfo), 'zipfile.ZipInfo'),
        (Exploit(HistoryBuffer.register_statistics, 1), 'register_statistics'),
        (np.array([{}]), "numpy.dtype('O8')"),
        (Exploit(np.memmap, '/dev/zero'), 'numpy.memmap'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_other_objects_are_named(value, named, tmp_path):
    path = write(tmp_path / 'a.pth', {'state_dict': {'w': torch.ones(2)}, 'x': value})
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert first_line(caught).startswith(f'{path}: ') and named in first_line(caught)


def test_log_buffers_take_no_methods_from_the_file(tmp_path, monkeypatch):
    """mmengine's own unpickling takes the ways to count from the file, for every buffer of the process."""
    ways = dict(HistoryBuffer._statistics_methods)
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, '_statistics_methods', {**ways, 'mean': HistoryBuffer.max})
        path = write(tmp_path / 'x.pth', {'log': HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 2])})
    assert read_checkpoint(path)['log'].statistics('mean') == 9 / 4
    assert HistoryBuffer._statistics_methods['mean'] is HistoryBuffer.mean


def test_numpy_types_cannot_be_given_flags(tmp_path):
    """A real dtype told that its numbers are object pointers crashes the process."""

    class Flagged:
        def __reduce__(self):
            return np.dtype, ('i8', False, True), (3, '<', None, None, None, -1, -1, 63)

    class Array:
        def __reduce__(self):
            build, args, _ = np.zeros(2, np.int64).__reduce__()
            return build, args, (1, (2,), Flagged(), False, b'\7' * 16)

    found = read_checkpoint(write(tmp_path / 'x.pth', {'x': Array()}))['x']
    assert found.dtype == np.int64 and not found.dtype.hasobject and found[0] == 0x0707070707070707


# ---- what circulates
def test_values_of_training_scripts_are_read(tmp_path):
    """Of the authors' and timm's scripts, of mmengine and of numpy's random state."""
    state = np.random.default_rng(0).bit_generator.state
    content = {
        'model': collections.OrderedDict(w=torch.ones(2)),
        'args': argparse.Namespace(lr=0.1, model='x'),
        'best': np.float64(1.5),
        'n': np.int64(7),
        'flag': np.bool_(True),
        'name': np.str_('abc'),
        'rng': state,
        'legacy_rng': np.random.RandomState(1).get_state(),
        'grid': np.arange(6).reshape(2, 3).T,
        'seen': {'a'},
        'log': HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 2], max_length=3),
    }
    for legacy in (False, True):
        torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
        loaded = read_checkpoint(tmp_path / 'a.pth')
        assert loaded['args'].lr == 0.1 and loaded['rng'] == state
        assert (loaded['best'], loaded['n'], loaded['flag'], loaded['name']) == (1.5, 7, True, 'abc')
        assert loaded['grid'].tolist() == [[0, 3], [1, 4], [2, 5]] and loaded['seen'] == {'a'}
        assert (loaded['legacy_rng'][1] == content['legacy_rng'][1]).all()
        log = loaded['log']
        assert type(log) is HistoryBuffer and (log.mean(), log.max(), log.current()) == (9 / 4, 6, 6)
        log.update(3.0)
        assert log.current() == 3 and log.data[0].tolist() == [2, 6, 3]


@pytest.mark.parametrize('dtype', ['bool', 'u1', 'i8', 'f2', '>f4', 'c8', 'U3'])
@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_arrays_of_both_numpy_generations(dtype, core, tmp_path):
    array = np.ones((2, 3), dtype)
    path = tmp_path / 'a.pth'
    torch.save({'a': array, 'b': array[0, 0]}, path, _use_new_zipfile_serialization=False)
    own = np.arange(1.0).__reduce__()[0].__module__.encode().removesuffix(b'.multiarray')
    path.write_bytes(path.read_bytes().replace(own, core))
    loaded = read_checkpoint(path)
    assert loaded['a'].dtype == array.dtype.newbyteorder('=')
    assert (loaded['a'] == array).all() and loaded['b'] == array[0, 0]


@pytest.mark.slow
def test_checkpoint_of_mmengine_itself(tmp_path):
    """Written by a real Runner, with its log buffers, optimizer and scheduler."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Toy(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = tiny_backbone()

        def forward(self, inputs, data_samples=None, mode='loss'):
            return dict(loss=sum(o.square().mean() for o in self.backbone(inputs)))

    runner = Runner(
        Toy(),
        str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=[dict(inputs=torch.randn(3, 32, 32)) for _ in range(4)],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=dict(type='PolyLR', eta_min=0, power=0.9, begin=0, end=4, by_epoch=False),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        experiment_name='toy',
    )
    runner.train()
    loaded = read_checkpoint(tmp_path / 'epoch_1.pth')
    buffers = loaded['message_hub']['log_scalars']
    assert buffers['train/loss'].data[0].shape == (2,) and buffers['train/loss'].mean() > 0
    assert loaded['optimizer']['state'] and loaded['param_schedulers'] and loaded['meta']['epoch'] == 1
    model = tiny_backbone(5)
    load_pretrained(model, tmp_path / 'epoch_1.pth')
    assert_same(model, runner.model.backbone.state_dict())


# ---- damage
def plain(path):
    torch.save({'state_dict': {'w': torch.randn(1000)}}, path)
    return path.read_bytes()


BROKEN = {
    'empty': lambda p: p.write_bytes(b''),
    'a page': lambda p: p.write_text('<!DOCTYPE html><html>not found</html>\n'),
    'a readme': lambda p: p.write_text('# Model card\n\nWeights of a network.\n'),
    'a Git LFS pointer': lambda p: p.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n'),
    'text that begins like a number': lambda p: p.write_text('404: Not Found'),
    'cut in half': lambda p: p.write_bytes(plain(p)[:2500]),
    'cut by a byte': lambda p: p.write_bytes(plain(p)[:-1]),
    'zip of nonsense': lambda p: zipfile.ZipFile(p, 'w').writestr('readme.txt', 'hello'),
    'zip with a broken pickle': lambda p: zipfile.ZipFile(p, 'w').writestr('archive/data.pkl', b'\x80\x02}q\x00X'),
    'a bare pickle': lambda p: p.write_bytes(pickle.dumps({'a': 1}, 4)),
    'a cut legacy file': lambda p: (
        torch.save({'w': torch.ones(99)}, p, _use_new_zipfile_serialization=False),
        p.write_bytes(p.read_bytes()[:-50]),
    ),
    'a list': lambda p: torch.save([torch.ones(2)], p),
    'a tensor': lambda p: torch.save(torch.ones(2), p),
    'a folder': lambda p: p.mkdir(),
    'nothing there': lambda p: None,
}


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('length', [1, 2000])
def test_content_decides_the_format(length, suffix, tmp_path):
    """The header of safetensors begins with its length, which may look like a pickle or a zip archive."""
    weights = {f'{i:04}' * 8: torch.full((1,), float(i)) for i in range(length)}
    for write_file in (torch.save, save_file):
        write_file(weights, tmp_path / f'a.{suffix}')
        loaded = read_checkpoint(tmp_path / f'a.{suffix}')
        assert loaded.get('state_dict', loaded) == weights


def test_header_that_begins_like_a_pickle(tmp_path):
    for size in range(1, 300):
        save_file({'w': torch.ones(1)}, tmp_path / 'a.pth', {'x': 'x' * size})
        if (tmp_path / 'a.pth').read_bytes()[:1] == b'\x80':
            break
    assert read_checkpoint(tmp_path / 'a.pth')['state_dict']['w'].item() == 1


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('kind', BROKEN)
def test_broken_files_are_explained(kind, suffix, tmp_path):
    path = tmp_path / f'broken.{suffix}'
    BROKEN[kind](path)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    expected = {
        'a folder': 'folder',
        'nothing there': 'no such',
        'a list': 'list',
        'a tensor': 'Tensor',
        **dict.fromkeys(('empty', 'a page', 'a readme', 'text that begins like a number'), 'not a checkpoint: '),
        'a Git LFS pointer': 'git-lfs',
    }
    assert first_line(caught).startswith(f'{path}: ') and expected.get(kind, 'damaged') in first_line(caught)
    assert 'weights_only' not in str(caught.value)  # torch's advice to trust the file
    assert len(str(caught.value)) < 700 and 'Traceback' not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0, 10**6), st.integers(1, 255), min_size=1, max_size=8),
    suffix=st.sampled_from(['pth', 'legacy.pth', 'safetensors']),
)
def test_changed_bytes_give_a_result_or_a_user_error(changes, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp('noise') / f'x.{suffix}'
    content = {'state_dict': {'w': torch.ones(20)}, 'meta': {'iter': 3, 'dataset_meta': {'classes': ['a']}}}
    if suffix == 'legacy.pth':
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        save_checkpoint(content, path)
    changed = bytearray(path.read_bytes())
    for at, by in changes.items():
        changed[at % len(changed)] ^= by
    path.write_bytes(changed)
    try:
        assert isinstance(read_checkpoint(path), dict)
    except UserError as error:
        assert str(error).startswith(f'{path}: ')


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    max_leaves=8,
    extend=lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def record(**fields) -> st.SearchStrategy:
    return VALUES | st.fixed_dictionaries({}, optional=fields)


@settings(max_examples=100, deadline=None)
@given(
    meta=record(
        iter=VALUES,
        epoch=VALUES,
        seed=VALUES,
        replk_mm=record(reparameterized=VALUES),
        dataset_meta=record(classes=VALUES, PALETTE=VALUES),
    )
)
def test_any_record_gives_a_result_or_a_user_error(meta, tmp_path_factory):
    path = write(tmp_path_factory.mktemp('meta') / 'x.pth', {'state_dict': {'weight': torch.ones(1, 1)}, 'meta': meta})
    try:
        load_model(torch.nn.Linear(1, 1, bias=False), path)
    except UserError as error:
        assert str(error).startswith(f'{path}: meta.')


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('seed', 'x'),
        ('seed', -1),
        ('seed', 2.5),
        ('iter', 'NaN'),
        ('iter', '7'),
        ('epoch', [1]),
        ('replk_mm', 7),
        ('dataset_meta', {'classes': {'a': 1}}),
        ('dataset_meta', {'classes': [1, None]}),
    ],
    ids=str,
)
def test_records_that_make_no_sense_are_named(key, value, tmp_path):
    path = write(tmp_path / 'x.pth', {'state_dict': {'w': torch.ones(1)}, 'meta': {key: value}})
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert first_line(caught).startswith(f'{path}: meta.{key} ')


@pytest.mark.parametrize(
    'content', [{}, {'epoch': 3}, {'state_dict': {}}, {'model': [1, 2]}, {'model': {'a': 'b'}}], ids=str
)
def test_no_weights(content, tmp_path):
    path = write(tmp_path / 'a.pth', content)
    with pytest.raises(UserError, match='no weights') as caught:
        load_pretrained(tiny_backbone(), path)
    assert first_line(caught).startswith(path)


# ---- addresses
@pytest.mark.parametrize(
    'name',
    [
        'http://127.0.0.1:abc/x.pth',
        'http://[::1/x.pth',
        'http://127.0.0.1:9/x.pth',
        'http:///x.pth',
        'http://127.0.0.1:9/a b.pth',
        f'http://127.0.0.1:9/{"x" * 300}.pth',
        'x\0y',
    ],
)
def test_neither_url_nor_path_is_rejected(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError) as caught:
        read_checkpoint(name)
    message = 'could not be downloaded' if name.startswith('http') else 'no such checkpoint'
    assert message in first_line(caught) and first_line(caught).startswith(ascii(name[:100])[1:-1])
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    'urls',
    [
        ('http://hub/timm/tiny.in1k/resolve/main/a.pth', 'http://hub/timm/tiny.in22k/resolve/main/a.pth'),
        ('http://one/a.pth', 'http://two/a.pth'),
        ('http://drive/a.pth?id=1', 'http://drive/a.pth?id=2'),
        ('http://hub/a.safetensors?revision=v1', 'http://hub/a.safetensors?revision=v2'),
    ],
    ids=['folder', 'host', 'query', 'revision'],
)
def test_downloads_with_the_same_file_name_are_different_files(urls, tmp_path, monkeypatch):
    downloads, log = [], []

    def download(url, path, progress):
        save_checkpoint({'state_dict': {'w': torch.tensor(float(urls.index(url)))}}, path)
        downloads.append(url)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr('replk_mm.checkpoints.io.announce', log.append)
    for _ in range(2):
        assert [read_checkpoint(url)['state_dict']['w'].item() for url in urls] == [0, 1]
    assert downloads == list(urls)  # the second time from the cache
    path = fetch_checkpoint(urls[1])
    assert path.parent == tmp_path / 'checkpoints' and f'already downloaded to {path}' in log[-1]


def test_a_download_that_broke_off_is_not_kept(tmp_path, monkeypatch):
    """torch.hub notices it only if the name has digits of the SHA-256."""

    def download(url, path, progress):
        save_checkpoint({'state_dict': {'w': torch.ones(1000)}}, path)
        Path(path).write_bytes(Path(path).read_bytes()[:2000])

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    with pytest.raises(DownloadError, match='the file is incomplete'):
        fetch_checkpoint('http://host/a.pth')
    assert list((tmp_path / 'checkpoints').iterdir()) == []


# ---- mmengine's own loading
class Theirs(BaseModule):
    """A backbone of another package."""

    def __init__(self, checkpoint):
        super().__init__(dict(type='Pretrained', checkpoint=checkpoint))
        self.conv = torch.nn.Conv2d(1, 1, 1)


@pytest.fixture
def safe_loaders(monkeypatch):
    from mmengine.runner import checkpoint

    monkeypatch.setattr(checkpoint.CheckpointLoader, '_schemes', dict(checkpoint.CheckpointLoader._schemes))
    for name in ('load_from_local', 'load_from_http', 'load_state_dict'):
        monkeypatch.setattr(checkpoint, name, getattr(checkpoint, name))
    register_safe_loaders()
    return checkpoint


def test_backbones_of_others_load_data_only_in_our_commands(safe_loaders, tmp_path, monkeypatch):
    """A local file and an address, of which mmengine would run the content."""
    proof, source = tmp_path / 'proof', tmp_path / 'source.pth'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, path, progress: shutil.copy(source, path))
    address = 'https://example.org/hostile.pth'
    monkeypatch.setattr(safe_loaders, 'get_torchvision_models', lambda: {'hostile': address})
    torch.save({'state_dict': {'conv.weight': Exploit(os.mkdir, str(proof))}}, source)
    for place in (str(source), address, 'torchvision://hostile'):
        with pytest.raises(UserError, match='mkdir'):
            Theirs(place).init_weights()
    assert not proof.exists()
    torch.save(
        {
            'state_dict': {'conv.weight': torch.full((1, 1, 1, 1), 3.0), 'conv.bias': torch.ones(1)},
            'log': HistoryBuffer([1.0], [1]),
        },
        source,
    )
    backbone = Theirs(f'{address}?version=2')  # the first one stays in the cache
    backbone.init_weights()
    assert backbone.conv.weight.item() == 3
    assert safe_loaders.load_from_local(str(source), 'meta')['state_dict']['conv.bias'].is_meta
    with pytest.raises(FileNotFoundError, match='absent.pth: no such checkpoint'):
        safe_loaders.load_checkpoint(torch.nn.Linear(2, 2), str(tmp_path / 'absent.pth'))


@pytest.mark.parametrize(
    'weights',
    [{'backbone.conv.weight': torch.ones(1, 1, 1, 1)}, {'conv.weight': torch.ones(2)}, {'other': torch.ones(1)}],
    ids=['prefix', 'shape', 'names'],
)
def test_backbones_of_others_do_not_stay_random(weights, safe_loaders, tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr('replk_mm.checkpoints.io.announce', lambda text, level: log.append(text))
    path = write(tmp_path / 'a.pth', {'state_dict': weights})
    with pytest.raises(UserError, match='fits 0 of 2 weights'):
        Theirs(path).init_weights()
    backbone = Theirs(write(tmp_path / 'b.pth', {**weights, 'conv.bias': torch.full((1,), 3.0)}))
    backbone.init_weights()
    assert backbone.conv.bias.item() == 3 and '1 of 2 weights, not conv.weight' in log[0]
    model = Theirs(write(tmp_path / 'd.pth', Theirs(None).state_dict()))  # has all but the backbone
    model.backbone = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(UserError, match='fits 2 of 4 weights'):
        model.init_weights()
    register_safe_loaders()  # a second call changes nothing
    assert Theirs(write(tmp_path / 'c.pth', Theirs(None).state_dict())).init_weights() is None and len(log) == 1
