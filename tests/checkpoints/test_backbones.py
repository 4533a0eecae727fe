"""Load a backbone from any nest and under any prefix, also by init_cfg; files that do not fit."""

import collections

import pytest
import torch
from checkpoint_cases import CONV, DENSE, TINY, assert_same, first_line, tiny_backbone, write
from mmengine.registry import MODELS
from torch import nn

from replk_mm.backbones import ConvNeXt, RepLKNet
from replk_mm.checkpoints.key_formats import find_weights, fits
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.errors import UserError

NESTS = {
    'flat': lambda w: w,
    'model': lambda w: {'model': w, 'epoch': 3},
    'state_dict': lambda w: {'state_dict': w, 'meta': {}},
    'module': lambda w: {'module': w},
    'model_ema': lambda w: {'model_ema': w, 'epoch': 3},
    'two levels': lambda w: {'model': {'state_dict': w}},
    'ordered': lambda w: collections.OrderedDict(state_dict=w),
    'DistributedDataParallel': lambda w: {f'module.{k}': v for k, v in w.items()},
    'compiled': lambda w: {'model': {f'_orig_mod.{k}': v for k, v in w.items()}},
    'both wrappers': lambda w: {'model': {f'module._orig_mod.{k}': v for k, v in w.items()}},
    'backbone': lambda w: {'state_dict': {f'backbone.{k}': v for k, v in w.items()}},
    'wrapped backbone': lambda w: {'state_dict': {f'module.backbone.{k}': v for k, v in w.items()}},
    'beside a tensor': lambda w: {'best_accuracy': torch.tensor(83.5), 'model': w},
    'averaged': lambda w: {'model': {'n_averaged': torch.tensor(7), **{f'module.{k}': v for k, v in w.items()}}},
    'whole model': lambda w: {
        'state_dict': {
            **{f'backbone.{k}': v for k, v in w.items()},
            'decode_head.conv_seg.weight': torch.ones(2, 3, 1, 1),
        }
    },
    'parameters': lambda w: {'model': {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()}},
    # Programs and wrappers that others use; the rule does not know their names.
    'Lightning': lambda w: {
        'state_dict': {**{f'model.backbone.{k}': v for k, v in w.items()}, 'model.decode_head.x': torch.ones(1)},
        'optimizer_states': [{}],
    },
    'registered twice': lambda w: {
        'state_dict': {**{f'net.encoder.{k}': v for k, v in w.items()}, **{f'encoder.{k}': v for k, v in w.items()}}
    },
    'MoCo': lambda w: {
        'state_dict': {
            **{f'module.encoder_k.{k}': v + 1 for k, v in w.items()},
            **{f'module.encoder_q.{k}': v for k, v in w.items()},
            'module.queue': torch.ones(2, 3),
        }
    },
    'DINO': lambda w: {
        'student': {f'module.backbone.{k}': v + 1 for k, v in w.items()},
        'teacher': {**{f'backbone.{k}': v for k, v in w.items()}, 'head.mlp.0.weight': torch.ones(2, 2)},
    },
    'FCMAE': lambda w: {
        'model': {
            **{f'encoder.{k}': v for k, v in w.items()},
            'mask_token': torch.ones(1),
            'decoder.0.x': torch.ones(1),
        }
    },
    'mmrazor': lambda w: {
        'state_dict': {
            **{f'architecture.backbone.{k}': v for k, v in w.items()},
            'distiller.teacher.backbone.stem.0.conv.weight': torch.ones(1),
        }
    },
    'FSDP': lambda w: {'model': {k.replace('.blocks.', '._fsdp_wrapped_module.blocks.'): v for k, v in w.items()}},
    'activation checkpointing': lambda w: {
        k.replace('.pw1.', '._checkpoint_wrapped_module.pw1.'): v for k, v in w.items()
    },
    'regional compilation': lambda w: {k.replace('.pw1.', '._orig_mod.pw1.'): v for k, v in w.items()},
    'one DDP per part': lambda w: {'state_dict': {f'backbone.module.{k}': v for k, v in w.items()}},
    'five levels': lambda w: {'a': {'b': {'c': {'d': {'e': w}}}}},
    'unknown program': lambda w: {'run': {'best': {f'vision.tower.{k}': v for k, v in w.items()}}, 'step': 3},
    'beside the optimizer': lambda w: {
        **w,
        'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}, 'stem.0.conv.weight': {'exp_avg': torch.ones(3)}}},
    },
    'a part of a smaller network': lambda w: {
        'teacher': {k: v + 1 for k, v in w.items() if not k.startswith('stages.3.')},
        'student': w,
    },
}


@pytest.mark.parametrize('nest', NESTS)
def test_nests_and_prefixes(nest, tmp_path):
    source = tiny_backbone().state_dict()
    path = write(tmp_path / 'a.pth', NESTS[nest](source))
    model = tiny_backbone(2)
    assert load_pretrained(model, path).matched == {'backbone': len(source)}
    assert_same(model, source)


@pytest.mark.parametrize(
    'nest, prefix',
    [('flat', ''), ('module', ''), ('five levels', 'a.b.c.d.e.'), ('unknown program', 'run.best.vision.tower.')],
)
def test_prefix_is_the_whole_path_without_wrappers(nest, prefix):
    assert find_weights(NESTS[nest](tiny_backbone().state_dict()), tiny_backbone()).prefix == prefix


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'model.backbone.'])
@pytest.mark.parametrize('network', [False, True])
def test_classifiers_are_not_weights_of_the_network(prefix, network):
    """Beside the weights or beside the backbone, under the names of timm, torchvision, mmpretrain and transformers."""
    weights = {f'{prefix}{key}': value for key, value in tiny_backbone().state_dict().items()}
    outer = prefix.replace('backbone.', '')
    names = ('head.weight', 'head.fc.bias', 'fc.weight', 'classifier.2.weight', 'norm.bias')
    weights |= {f'{outer}{name}': torch.ones(2) for name in names}
    found = find_weights(weights, tiny_backbone() if network else None)
    assert found.backbone.keys() == tiny_backbone().state_dict().keys() and found.rest == {}
    assert set(found.unused) == (set() if 'backbone' in prefix else set(names))


@pytest.mark.parametrize(
    'own, theirs, fit',
    [((8, 4, 1, 1), (8, 4), True), ((4,), (1, 1, 4), True), ((8, 4), (4, 8), False), ((4, 4), (16,), False)],
)
def test_shapes_that_fit(own, theirs, fit):
    assert fits(torch.empty(own), torch.empty(theirs)) == fit


@pytest.mark.parametrize('stages', [2, 3, 5])
def test_final_norm_is_that_of_the_last_stage(stages):
    weights = ConvNeXt(dict(depths=[1] * stages, channels=[4] * stages)).state_dict()
    file = {key.replace(f'norm{stages - 1}.', 'norm.'): value for key, value in weights.items()}
    assert 'norm.weight' in file and find_weights(file).backbone.keys() == weights.keys()


@pytest.mark.parametrize('larger', ['rgb', 'depth'])
def test_a_network_and_a_part_of_it_are_two(larger):
    """They share all weights, but loading the larger one reports what the other does not have."""
    source = tiny_backbone().state_dict()
    file = {'rgb': dict(source), 'depth': dict(source)}
    file[larger]['stages.3.blocks.9.pw1.conv.weight'] = torch.ones(1)
    with pytest.raises(UserError, match='several networks fit'):
        find_weights(file, tiny_backbone())


@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel])
def test_networks_with_wrapped_parts(wrap, tmp_path):
    source = tiny_backbone().state_dict()
    path = write(tmp_path / 'a.pth', source)
    model = tiny_backbone(2)
    for stage in model.stages:
        stage.blocks[0] = wrap(stage.blocks[0])
    assert model.state_dict().keys() != source.keys()
    assert load_pretrained(model, path).matched == {'backbone': len(source)}
    assert all(map(torch.equal, model.state_dict().values(), source.values()))


def test_several_networks_that_fit(tmp_path):
    source = tiny_backbone().state_dict()
    other = {k: v + 1 for k, v in source.items()}
    path = write(
        tmp_path / 'a.pth', {'rgb': {f'net.{k}': v for k, v in source.items()}, 'depth': other, 'step': torch.ones(1)}
    )
    for load in (lambda: load_pretrained(tiny_backbone(2), path), lambda: find_weights(torch.load(path), None, path)):
        with pytest.raises(UserError, match=r"'rgb\.net\.', 'depth\.'") as caught:
            load()
    assert first_line(caught).startswith(path) and 'prefix' in str(caught.value)
    for prefix, expected in (('net', source), ('module.rgb.net.', source), ('depth', other)):
        model = tiny_backbone(2)
        load_pretrained(model, path, prefix)
        assert_same(model, expected)
    for prefix in ('backbone.', 'et.', 'rgb'):  # no such prefix; not a whole part of one
        with pytest.raises(UserError, match=prefix):
            load_pretrained(tiny_backbone(2), path, prefix)


def _averaged_by_torch(weights):
    return {'n_averaged': torch.tensor(7), **{f'module.{k}': v for k, v in weights.items()}}


@pytest.mark.parametrize(
    'file',
    [
        lambda raw, ema: {'model': raw, 'model_ema': ema},
        lambda raw, ema: {'state_dict': raw, 'state_dict_ema': ema},
        lambda raw, ema: {'model': raw, 'ema': _averaged_by_torch(ema)},
        lambda raw, ema: {'net_ema.' + k: v for k, v in ema.items()} | {'net.' + k: v for k, v in raw.items()},
        lambda raw, ema: {'student': raw, 'teacher': {f'module.{k}': v for k, v in ema.items()}},
        # mmengine's hook exchanges both, and counts its steps.
        lambda raw, ema: {'state_dict': ema, 'ema_state_dict': {**_averaged_by_torch(raw), 'steps': torch.tensor(7)}},
    ],
)
def test_averaged_weights(file, tmp_path, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr('replk_mm.checkpoints.key_formats.announce', log.append)
    raw = tiny_backbone().state_dict()
    averaged = {k: v + 1 for k, v in raw.items()}
    path = write(tmp_path / 'a.pth', file(raw, averaged))
    for options, expected in (({}, averaged), (dict(use_ema=True), averaged), (dict(use_ema=False), raw)):
        model = RepLKNet(TINY, init_cfg=dict(type='Pretrained', checkpoint=path, **options))
        model.init_weights()
        assert_same(model, expected)
        assert path in log[-1] and f'use_ema={options.get("use_ema", True)}' in log[-1]
    assert len(log) == 3
    assert_same(model, find_weights(torch.load(path), use_ema=False).backbone)  # without a network
    assert len(log) == 4
    # Averages that lack a weight, or all buffers, are not loaded, which is logged.
    trained = dict(tiny_backbone().named_parameters())
    for part in (dict(list(averaged.items())[1:]), {k: v for k, v in averaged.items() if k in trained}):
        log.clear()
        load_pretrained(tiny_backbone(2), write(tmp_path / 'b.pth', {'model': raw, 'model_ema': part}))
        assert "'model.', not 'model_ema.'" in log[-1]


def test_weights_of_no_part_of_the_network(tmp_path):
    """They are reported; those in a part of the network mean that it is another one."""
    source = tiny_backbone().state_dict()
    found = find_weights({**source, 'logit_scale': torch.ones(1)}, tiny_backbone(2))
    assert found.unused == ['logit_scale'] and 'logit_scale' in found.describe()
    path = write(tmp_path / 'a.pth', {**source, 'stages.3.blocks.9.pw1.conv.weight': torch.ones(1)})
    with pytest.raises(UserError, match='stages.3.blocks.9'):
        load_pretrained(tiny_backbone(2), path)
    with pytest.raises(UserError, match='two different weights for norm3.weight'):
        find_weights({'norm.weight': torch.ones(3), 'norm3.weight': torch.zeros(3)} | ConvNeXt(CONV).state_dict())


@pytest.mark.parametrize('prefix', [None, 'backbone.', 'encoder.'])
def test_init_cfg(prefix, tmp_path):
    source = tiny_backbone().state_dict()
    weights = {f'{prefix or "backbone."}{k}': v for k, v in source.items()}
    path = write(tmp_path / 'a.pth', {'state_dict': {**weights, 'x.y': torch.ones(1)}})
    cfg = dict(type='Pretrained', checkpoint=path, **({'prefix': prefix} if prefix else {}))
    model = MODELS.build(dict(type='replk_mm.RepLKNet', arch=TINY, init_cfg=cfg))
    model.init_weights()
    assert_same(model, source)
    other = tiny_backbone(2).state_dict()
    model.load_state_dict(other)
    model.init_weights()  # of a parent: the file is loaded once
    assert_same(model, other)
    # As part of a larger model, after other initializations; and before them in the list.
    model = MODELS.build(
        dict(type='replk_mm.RepLKNet', arch=TINY, init_cfg=[cfg, dict(type='Constant', layer='Conv2d', val=0.0)])
    )
    model.init_weights()
    assert_same(model, source)


def test_init_cfg_that_does_not_fit(tmp_path):
    path = write(tmp_path / 'a.pth', tiny_backbone().state_dict())
    model = RepLKNet(dict(TINY, channels=[8, 12, 16, 32]), init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(UserError, match='RepLKNet: backbone .*/') as caught:
        model.init_weights()
    assert str(caught.value).startswith(path) and 'another size' in str(caught.value)


@pytest.mark.parametrize('cls, args', [(RepLKNet, dict(arch=TINY)), (ConvNeXt, dict(arch=CONV, **DENSE))])
@pytest.mark.parametrize('channels', [1, 4, 6])
def test_first_convolution_is_adapted_to_other_images(cls, args, channels, tmp_path):
    source = cls(**args).eval()
    path = write(tmp_path / 'rgb.pth', source.state_dict())
    settings = dict(type='Pretrained', checkpoint=path)
    network = cls(**args, in_channels=channels, init_cfg=settings).eval()
    with pytest.raises(UserError, match='number of image channels: .*adapt_input_conv=True'):
        network.init_weights()
    network = cls(**args, in_channels=channels, init_cfg=settings | dict(adapt_input_conv=True)).eval()
    network.init_weights()
    key = next(key for key, value in source.state_dict().items() if value.dim() == 4)
    old, new = source.state_dict()[key], network.state_dict()[key]
    if channels > 1:
        for i in range(channels):
            torch.testing.assert_close(new[:, i], old[:, i % 3] * 3 / channels)
    if channels % 3 != 1 or channels == 1:  # each of red, green and blue as often
        grey = torch.randn(1, 1, 64, 64)
        for a, b in zip(network(grey.expand(1, channels, 64, 64)), source(grey.expand(1, 3, 64, 64)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adapting_three_channels_changes_nothing(tmp_path):
    source = ConvNeXt(arch=CONV)
    path = write(tmp_path / 'rgb.pth', source.state_dict())
    network = ConvNeXt(arch=CONV, init_cfg=dict(type='Pretrained', checkpoint=path, adapt_input_conv=True))
    network.init_weights()
    assert_same(network, source.state_dict())


def test_strict_can_be_switched_off(tmp_path):
    source = tiny_backbone().state_dict()
    partial = {k: v for k, v in source.items() if not k.startswith('stages.3.')}
    path = write(tmp_path / 'a.pth', partial)
    with pytest.raises(UserError, match='missing'):
        load_pretrained(tiny_backbone(2), path)
    model = tiny_backbone(2)
    report = load_pretrained(model, path, strict=False)
    assert report.matched['backbone'] == len(partial) and all(k.startswith('stages.3.') for k in report.missing)
    assert_same(model, partial)
    with pytest.raises(UserError, match='another architecture'):
        load_pretrained(tiny_backbone(2), write(tmp_path / 'b.pth', {'fc1': torch.ones(2)}), strict=False)


def test_norms_of_stages_that_are_not_returned(tmp_path):
    source = ConvNeXt(CONV, **DENSE).state_dict()
    path = write(tmp_path / 'a.pth', source)
    model = ConvNeXt(CONV, out_indices=(1, 2))
    assert load_pretrained(model, path).unexpected == []
    assert_same(model, {k: v for k, v in source.items() if not k.startswith(('norm0', 'norm3'))})
    with pytest.raises(UserError, match='missing: 1'):  # half a norm
        load_pretrained(ConvNeXt(CONV, **DENSE), write(tmp_path / 'c.pth', {**source, 'norm3.bias': None}))
    xl = RepLKNet(TINY, norm_intermediate_features=True).state_dict()
    path = write(tmp_path / 'b.pth', xl)
    load_pretrained(RepLKNet(TINY, norm_intermediate_features=True, out_indices=(3,)), path)
    with pytest.raises(UserError, match='norm_intermediate_features'):  # these would be lost
        load_pretrained(RepLKNet(TINY), path)
