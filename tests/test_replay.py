"""The batch of a stopped training: kept in a file that holds no code, and run again."""
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, LabelData, PixelData
from nonfinite_cases import FaultHook, Switch, prepared, read, replay_file, stopped, switch_off  # noqa: F401
from test_commands import tool_main
from tiny import tiny, trained  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.engine.batches import BadPackage, omitted, pack, unpack
from replk_mm.engine.replay import replay
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
NECK = {'model.neck': dict(type='RootNeck'), 'model.backbone.drop_path_rate': 0.5, 'model.decode_head.dropout_ratio': 0.3}


def same(a, b) -> bool:
    """Whether two batches are one, types included; written apart from what packs them."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, BaseDataElement):
        return all(set(x) == set(y) and all(same(x[key], y[key]) for key in x)
                   for x, y in ((a.metainfo, b.metainfo), (dict(a.items()), dict(b.items()))))
    return same(vars(a), vars(b)) if hasattr(a, '__dict__') else a == b


# -- batches as plain data --------------------------------------------------------------------------------------------
def batch_of(case):
    """The first batch of the case's own loader."""
    from replk_mm.engine.runner import Runner
    cfg, _ = prepared(case, case.data.parent / 'unused')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return loader.collate_fn([loader.dataset[i] for i in range(2)])


@pytest.mark.parametrize('name', ['tiny', pytest.param('detector', marks=pytest.mark.slow)])
def test_batches_of_both_libraries_come_back_as_they_were(name, request, tmp_path):
    batch = batch_of(request.getfixturevalue(name))
    torch.save(dict(batch=pack(batch)), tmp_path / 'batch.pth')
    packed = read(tmp_path / 'batch.pth')['batch']
    assert same(unpack(packed), batch)
    assert omitted(packed) == []
    changed = unpack(packed)
    changed['data_samples'][1].set_metainfo(dict(ori_shape=(1, 1)))
    assert not same(changed, batch)


def test_every_kind_of_entry_comes_back(tmp_path):
    from mmdet.structures.mask import PolygonMasks
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(path='a.png', size=torch.Size([2, 3]), shape=(2, 3), scale=np.float32(0.5),
                                         matrix=np.eye(3), names=np.array(['a', 'b']), none=None))
    sample.gt_sem_seg = PixelData(data=torch.ones(1, 2, 3, dtype=torch.uint8), metainfo=dict(x=1))
    batch = {0: sample, 'labels': LabelData(item=torch.tensor([1])), 'empty': InstanceData(),
             'list': [1, 2.5, True, 'x', (), []], 'bytes': np.arange(6, dtype=np.uint8)[::2], 'slice': torch.arange(10.)[::3],
             'fortran': np.asfortranarray(np.eye(2)), 'things': InstanceData(labels=torch.tensor([1, 2]), names=['a', 'b']),
             'polygons': PolygonMasks([[np.array([0., 0, 1, 0, 1, 1])], [np.zeros(6), np.ones(6)]], 4, 5)}
    torch.save(dict(batch=pack(batch)), tmp_path / 'batch.pth')
    found = unpack(read(tmp_path / 'batch.pth')['batch'])
    scale = found[0].metainfo['scale']
    assert isinstance(scale, float) and scale == 0.5, 'numbers of numpy become those of Python'
    found[0].set_metainfo(dict(scale=np.float32(0.5)))
    assert same(found, batch)


def test_classes_of_others_become_what_they_extend_or_are_left_out():
    class Special(PixelData):
        pass

    Special.__module__ = 'elsewhere'
    packed = pack([Special(data=torch.ones(1, 2, 2)), object(), {'kind': 'dict', 'items': 3}])
    found = unpack(packed)
    assert type(found[0]) is PixelData and found[1] is None and found[2] == {'kind': 'dict', 'items': 3}
    assert omitted(packed) == ['builtins.object']


@pytest.mark.parametrize('node', [
    dict(kind='os.system', items=['x']), dict(kind='Popen', meta=pack({}), data=pack({})), dict(kind='list'), dict(kind=[]),
    dict(items=[]), ['bare'], dict(kind='BitmapMasks', masks=3, height=1, width=1), dict(kind='PixelData', meta=1, data=2),
    dict(kind='array', tensor='x'), dict(kind='HorizontalBoxes', tensor=torch.ones(3)), {1, 2},
    dict(kind='PixelData', meta=pack({}), data=pack({'__class__': 1}))])
def test_what_was_not_packed_here_is_refused(node):
    with pytest.raises(BadPackage):
        unpack(dict(kind='list', items=[1, node]))


def test_nesting_without_end_is_refused():
    node = 1
    for _ in range(20_000):
        node = dict(kind='list', items=[node])
    with pytest.raises(BadPackage):
        unpack(node)


# -- replays ----------------------------------------------------------------------------------------------------------
def test_replay_repeats_the_loss_bit_by_bit(tiny, tmp_path):
    """With stochastic depth and dropout, whose draws are those of the iteration."""
    Switch.at = 3
    message = stopped(tiny, tmp_path, options=NECK)
    assert message.startswith('iteration 3: the gradients are not finite')
    training = FaultHook.losses[2]
    Switch.at = 0
    found = replay(tiny.cfg(NECK), replay_file(tmp_path), tiny.options(tmp_path))
    for name in ('decode.loss_ce', 'aux.loss_ce'):
        assert found.finding.losses[name] == found.stored['losses'][name] == training[name].item()
    assert found.status == 1 and 'neck (RootNeck) passes back' in str(found) and 'not finite again' in str(found)
    assert found.changed == []
    torch.manual_seed(0)
    other = read(replay_file(tmp_path))
    other['seed'][1] += 1
    torch.save(other, tmp_path / 'other.pth')
    again = replay(tiny.cfg(NECK), tmp_path / 'other.pth', tiny.options(tmp_path))
    assert again.finding.losses['decode.loss_ce'] != training['decode.loss_ce'].item(), 'nothing random was in it'


@pytest.mark.slow
def test_replay_after_a_change_says_what_changed_and_that_it_is_finite(tiny, tmp_path):
    Switch.at = 2
    stopped(tiny, tmp_path, options=NECK)
    Switch.at = None
    found = replay(tiny.cfg({**NECK, 'model.decode_head.dropout_ratio': 0.1}), replay_file(tmp_path), tiny.options(tmp_path))
    assert found.status == 0 and str(found).endswith('finite now')
    assert found.changed == ['model.decode_head.dropout_ratio: 0.3 -> 0.1']
    assert 'changed since: model.decode_head.dropout_ratio: 0.3 -> 0.1' in str(found)


@pytest.mark.slow
def test_replay_runs_in_the_precision_of_the_training(tiny, tmp_path):
    Switch.at = 2
    stopped(tiny, tmp_path, options={'model.neck': dict(type='RootNeck')}, amp='bf16')
    Switch.at = 0
    training = FaultHook.losses[1]
    cfg = {'model.neck': dict(type='RootNeck')}
    found = replay(tiny.cfg(cfg), replay_file(tmp_path), tiny.options(tmp_path))
    assert found.stored['autocast'] == 'bfloat16'
    assert found.finding.losses['decode.loss_ce'] == training['decode.loss_ce'].item()
    full = tiny.cfg(cfg)
    stored = read(replay_file(tmp_path))
    torch.save(stored | dict(autocast=''), tmp_path / 'full.pth')
    other = replay(full, tmp_path / 'full.pth', tiny.options(tmp_path)).finding.losses
    assert other['decode.loss_ce'] != training['decode.loss_ce'].item(), 'the precision makes no difference'


@pytest.mark.slow
def test_detectors_replay_every_term_and_draw_what_they_saw(detector, tmp_path):
    """Proposals are sampled at random, and are the same again."""
    stopped(detector, tmp_path, 3, spoil=dict(weight='roi_head.mask_head.0.conv_logits.weight', before=2))
    training = FaultHook.losses[1]
    found = replay(detector.cfg(), replay_file(tmp_path), detector.options(tmp_path))
    terms = {name: value for name, value in training.items() if isinstance(value, torch.Tensor) and 'loss' in name}
    finite = {name: value.item() for name, value in terms.items() if value.isfinite()}
    assert len(finite) >= 6 and len(finite) < len(terms)
    assert {name: found.finding.losses[name] for name in finite} == finite
    assert found.finding.first.place == 'weight roi_head.mask_head.0.conv_logits.weight (Conv2d)'
    names = [f'{i}_{Path(image).stem}.png' for i, image in enumerate(found.stored['images'])]
    assert sorted(p.name for p in found.pictures.iterdir()) == names
    picture, image = (cv2.imread(str(p)) for p in (found.pictures / names[0], found.stored['images'][0]))
    assert picture.shape == image.shape and 0.02 < (picture != image).any(-1).mean() < 0.98


def test_pictures_show_labels_and_broken_pixels(tiny, tmp_path):
    stopped(tiny, tmp_path, transform=dict(type='PoisonImage', name='demo_train_000002.jpg'))
    found = replay(tiny.cfg(), replay_file(tmp_path), tiny.options(tmp_path))
    pictures = {p.name[2:]: cv2.imread(str(p)) for p in found.pictures.iterdir()}
    broken = [(picture == (255, 0, 255)).all(-1).sum() for name, picture in sorted(pictures.items())]
    assert sorted(broken) == [0, 2]
    assert (pictures['demo_train_000002.png'] == (255, 0, 255)).all(-1).sum() == 2
    text = str(found)
    row = re.search(r'^ +[\d.]+ +6 +3x64x64 +image of .*demo_train_000002.jpg$', text, re.M)
    assert row, text


# -- files and the command --------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def kept(tiny, tmp_path_factory) -> Path:
    """A replay file."""
    Switch.at = None
    work = tmp_path_factory.mktemp('kept')
    stopped(tiny, work, spoil=dict(weight='decode_head.conv_seg.weight', before=1))
    return replay_file(work)


class Exploit:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


SPOILED = {
    'code': lambda f, p: f | dict(batch=Exploit(p)),
    'class outside the table': lambda f, p: f | dict(batch=dict(kind='Popen', meta=[], data=[])),
    'no batch': lambda f, p: {k: v for k, v in f.items() if k != 'batch'},
    'another version': lambda f, p: f | dict(replay=2),
    'seed': lambda f, p: f | dict(seed=['x', 1, 2]),
    'colours': lambda f, p: f | dict(palette=[[1, 2]]),
    'weights': lambda f, p: f | dict(state_dict={'a': 'b'}),
    'a checkpoint': lambda f, p: dict(state_dict=f['state_dict'], meta={}),
}


@pytest.mark.parametrize('kind', SPOILED)
def test_file_that_training_did_not_write_is_refused(kind, tiny, kept, tmp_path):
    proof, path = tmp_path / 'proof', tmp_path / 'strange.pth'
    torch.save(SPOILED[kind](read(kept), proof), path)
    with pytest.raises(UserError) as caught:
        replay(tiny.cfg(), path, tiny.options(tmp_path))
    assert not proof.exists()
    assert str(caught.value).startswith(f'{path}: ')
    assert '--trust-checkpoint' not in str(caught.value)
    if kind in ('code', 'class outside the table', 'a checkpoint'):
        pass


def test_replay_with_another_network_is_refused(tiny, kept, tmp_path):
    with pytest.raises(UserError, match='does not fit this config') as caught:
        replay(tiny.cfg({'model.decode_head.channels': 16}), kept, tiny.options(tmp_path))
    assert '--cfg-options' in str(caught.value)


@pytest.mark.slow
def test_classes_are_those_of_the_run(tiny, tmp_path):
    names = ','.join(f'thing {i}' for i in range(30))
    stopped(tiny, tmp_path, classes=names, spoil=dict(weight='decode_head.conv_seg.weight', before=1))
    found = replay(tiny.cfg(), replay_file(tmp_path), tiny.options(tmp_path))
    assert found.stored['classes'] == names.split(',') and found.changed == []


def test_command_replays_without_data_and_tells_by_its_status(tiny, kept, monkeypatch, capfd):
    assert tool_main('train', tiny.config, '--replay', kept, '--device', 'cpu', monkeypatch=monkeypatch) == 1
    out, error = capfd.readouterr()
    assert 'weight decode_head.conv_seg.weight (Conv2d)' in out and 'not finite again' in out and 'Traceback' not in error
    mended = read(kept)
    mended['state_dict']['decode_head.conv_seg.weight'].nan_to_num_(0, 0, 0)
    torch.save(mended, kept.with_name('mended.pth'))
    assert tool_main('train', tiny.config, '--replay', kept.with_name('mended.pth'), '--device', 'cpu',
                     monkeypatch=monkeypatch) == 0
    assert 'finite now' in capfd.readouterr().out
    assert tool_main('train', tiny.config, '--replay', kept.with_name('gone.pth'), monkeypatch=monkeypatch) == 2
