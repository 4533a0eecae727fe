"""Which weights a run starts from and which it tests: the config's, the command line's, or a checkpoint's."""

import shutil
from pathlib import Path

import mmengine.device.utils as devices
import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device
from tiny import tiny, trained  # noqa: F401
from tool_cases import merged  # noqa: F401

from replk_mm.backbones import RepLKNet
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.engine import prepare
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.process import RunOptions, select_device
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow
ADDRESS = 'https://weights.invalid/backbone.pth'


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))


def pretrained(checkpoint=ADDRESS) -> dict:
    return {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(checkpoint))}


def test_weights_to_start_training_from_do_not_enter_a_test(tiny, trained, tmp_path):
    other = tiny.train(tmp_path / 'other', 1, seed=5)
    alone = evaluate(tiny.cfg(), str(trained), tiny.options(tmp_path / 'a'))
    beside = evaluate(tiny.cfg({'load_from': str(other), 'resume': True}), str(trained), tiny.options(tmp_path / 'b'))
    assert beside.per_class == alone.per_class


@pytest.mark.parametrize('iterations', [None, 2])
def test_run_without_its_weights_is_rejected(iterations, tiny, tmp_path, offline):
    with pytest.raises(UserError, match=f'^{ADDRESS}: the checkpoint could not be downloaded') as refused:
        tiny.prepare(tmp_path, iterations, options=pretrained())
    assert '--pretrained none' in str(refused.value)


def test_resumed_run_needs_no_initial_weights(tiny, tmp_path, offline):
    tiny.train(tmp_path / 'run', 2, pretrained(), resume='auto', pretrained='none')  # nothing there yet
    cfg, notes = tiny.prepare(tmp_path / 'run', 4, pretrained(), resume='auto')
    assert cfg.resume and 'init_cfg' not in cfg.model.backbone


def test_two_checkpoints_to_start_from_are_rejected(tiny, trained, tmp_path):
    with pytest.raises(UserError, match='load_from='):
        tiny.prepare(tmp_path, 2, {'load_from': str(trained)}, pretrained=str(trained))


def test_weights_that_a_segmentor_of_mmseg_names_are_replaced(tiny, tmp_path):
    options = {'model.pretrained': ADDRESS, 'model.backbone': dict(type='ResNet', depth=18, _delete_=True)}
    options |= {'model.decode_head.in_channels': [64, 128, 256, 512], 'model.auxiliary_head.in_channels': 256}
    options['optim_wrapper'] = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    tiny.train(tmp_path, 1, options, pretrained='none')


def test_random_weights_on_demand(tiny, tmp_path, offline):
    _, notes = tiny.prepare(tmp_path, None, pretrained(), pretrained='none')
    assert 'weights: random (--pretrained none)' in notes


def test_weights_to_start_from_are_checked_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match='nowhere.pth: no such checkpoint'):
        tiny.prepare(tmp_path, 2, {'load_from': 'nowhere.pth'})


def test_downloaded_weights_to_start_from_run_no_code(tiny, trained, tmp_path, monkeypatch):
    """The file is fetched and read by us; mmengine gets a local path."""
    hub = tmp_path / 'hub'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(hub))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, to, **_: shutil.copy(trained, to))
    cfg, _ = tiny.prepare(tmp_path / 'run', 2, {'load_from': ADDRESS})
    assert Path(cfg.load_from).parent == hub / 'checkpoints' and cfg.load_from.endswith('-backbone.pth')


def test_load_from_finds_weights_under_other_names(tiny, trained, tmp_path):
    """Also for the averages of EMAHook, which starts from the loaded weights."""
    source = {k: v for k, v in torch.load(trained)['state_dict'].items() if v.is_floating_point()}
    torch.save({'state_dict': {f'_orig_mod.{key}': value for key, value in source.items()}}, tmp_path / 'compiled.pth')
    options = {
        'load_from': str(tmp_path / 'compiled.pth'),
        'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=0.0, weight_decay=0.0),
        'model.backbone.norm_eval': True,
        'custom_hooks': [dict(type='EMAHook')],
    }
    saved = torch.load(tiny.train(tmp_path / 'run', 1, options))
    for key, value in source.items():
        if key.startswith('backbone.') or 'running_' not in key:
            torch.testing.assert_close(saved['state_dict'][key], value)
            torch.testing.assert_close(saved['ema_state_dict'][f'module.{key}'], value)


def test_load_from_that_does_not_fit_ends_the_training(tiny, merged, tmp_path):
    weights = {f'x.{key}': value for key, value in torch.load(merged)['state_dict'].items() if 'bias' in key}
    torch.save({'state_dict': weights}, tmp_path / 'other.pth')
    for path, message in ((tmp_path / 'other.pth', 'does not fit'), (merged, 'folded BatchNorm')):
        with pytest.raises(UserError, match=f'{path.name}: .*{message}'):
            tiny.train(tmp_path / 'run', 1, {'load_from': str(path)})


def test_folded_weights_cannot_start_a_training(merged, tiny):
    backbone = RepLKNet(tiny.cfg().model.backbone.arch)
    with pytest.raises(UserError, match='folded BatchNorm'):
        load_pretrained(backbone, merged)


@pytest.mark.parametrize('key', ['train_dataloader', 'train_cfg', 'optim_wrapper'])
def test_config_without_training_is_named(tiny, tmp_path, key):
    with pytest.raises(UserError, match=f"no '{key}'"):
        tiny.prepare(tmp_path, 2, {key: None})


def test_heads_must_agree_on_the_classes(tiny, tmp_path):
    with pytest.raises(UserError, match='model.decode_head.num_classes=8, model.auxiliary_head.num_classes=3'):
        tiny.prepare(tmp_path, 2, {'model.auxiliary_head.num_classes': 3})


def test_chosen_device_is_the_one_mmengine_uses(monkeypatch):
    monkeypatch.setattr(devices, 'DEVICE', 'cuda')  # as on a machine with a GPU, after the import
    assert select_device('cpu') == 'cpu' and get_device() == 'cpu'


def test_kernels_are_resized_where_the_config_says_so(tiny, trained, tmp_path):
    larger = {'model.backbone.arch.large_kernel_sizes': [9, 9, 9, 9]}
    with pytest.raises(UserError, match='--resize-kernels pad'):
        evaluate(tiny.cfg(larger), str(trained), tiny.options(tmp_path / 'a'))
    same = evaluate(tiny.cfg(), str(trained), tiny.options(tmp_path / 'b'))
    padded = evaluate(tiny.cfg({**larger, 'resize_kernels': 'pad'}), str(trained), tiny.options(tmp_path / 'c'))
    assert padded.metrics == pytest.approx(same.metrics) and '4 kernels 7x7 to 9x9 (pad)' in padded.load
    for name, start in (('d', dict(pretrained=str(trained))), ('e', {})):
        options = {**larger, 'resize_kernels': 'pad', **({} if start else {'load_from': str(trained)})}
        path = tiny.train(tmp_path / name, 1, options, **start)
        assert torch.load(path)['state_dict']['backbone.stages.0.blocks.0.large_kernel.lkb_origin.conv.weight'].shape[
            2:
        ] == (9, 9)
    with pytest.raises(UserError, match='--resize-kernels pad: the training starts from random weights'):
        tiny.prepare(tmp_path / 'f', 1, {'resize_kernels': 'pad'}, pretrained='none')
    foreign = Config(dict(model=dict(backbone=dict(type='mmseg.MSCAN')), resize_kernels='pad'))
    with pytest.raises(UserError, match='--resize-kernels pad: is not for mmseg.MSCAN'):
        prepare.weights_to_start_from(foreign, RunOptions(pretrained='x'))
