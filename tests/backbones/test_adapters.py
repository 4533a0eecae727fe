"""Networks of timm, transformers and OpenMMLab behind the names of the catalogue."""

import dataclasses
import json
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from config_cases import CONFIGS, batch
from safetensors.torch import save_file

from replk_mm.backbones import adapters, build_backbone
from replk_mm.backbones.catalogue import ADAPTERS, find_backbone, measure_features
from replk_mm.commands.backbones import describe
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError

TIMM, HF = pytest.mark.extras('timm'), pytest.mark.extras('transformers')
VIT = dict(depth=4, embed_dim=24, num_heads=2)
DINOV2 = dict(num_hidden_layers=4, hidden_size=24, num_attention_heads=2, mlp_ratio=1, image_size=56)
CONVNEXT = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 12, 16, 24])
#: One small network of each kind, its arguments, and the parameters that no feature map needs.
NETWORKS = {
    'timm/resnet10t': ({}, []),
    'timm/swin_tiny_patch4_window7_224': (dict(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)), []),
    'timm/hrnet_w18_small': ({}, []),
    'timm/efficientnet_lite0': ({}, []),
    'timm/maxvit_rmlp_pico_rw_256': (dict(img_size=64, depths=(1, 1, 1, 1)), []),
    'timm/vit_tiny_patch16_224': (VIT, []),
    'timm/eva02_tiny_patch14_224': (VIT, []),
    'timm/mobilenetv4_conv_small': ({}, []),
    'timm/convnext_atto': (dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)), []),
    'timm/regnetx_002': ({}, []),
    'hf/convnext': (CONVNEXT, []),
    'hf/swin': (
        dict(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4]),
        ['swin.layernorm.weight', 'swin.layernorm.bias'],
    ),
    'hf/dinov2': (DINOV2, ['embeddings.mask_token']),
}
CASES = [pytest.param(n, marks=TIMM if n.startswith('timm/') else HF, id=n.partition('_')[0]) for n in NETWORKS]


@pytest.fixture(scope='module', autouse=True)
def _imported():
    """Importing them takes seconds, which no test should be charged with."""
    for name in ('timm', 'transformers', 'mmseg', 'mmdet'):
        if find_spec(name):
            import_module(f'{name}.models')


@pytest.fixture
def tiny(monkeypatch):
    """Let the names give the small networks."""
    for library in ('timm', 'hf'):
        entry_of = ADAPTERS[library]

        def small(name, entry_of=entry_of):
            entry = entry_of(name)
            return dataclasses.replace(entry, config={**entry.config, **NETWORKS[name][0]})

        monkeypatch.setitem(ADAPTERS, library, small)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.slow
def test_maps_and_gradients(name, tiny):
    """Stride 4 to 32 for images of any size, and a gradient for each parameter that is trained."""
    model = build_backbone(name)
    with torch.no_grad():
        for value in model.parameters():  # a scale of zero would hide the layers before it
            value.add_(torch.randn_like(value), alpha=0.01)
    images = torch.randn(2, 3, 100, 76)
    maps = model(images)
    assert [f['reduction'] for f in model.feature_info] == [4, 8, 16, 32]
    for x, info in zip(maps, model.feature_info, strict=True):
        floor, ceil = ([n // info['reduction'] + up for n in (100, 76)] for up in (0, 1))
        assert x.shape[:2] == (2, info['num_chs']) and x.is_contiguous()
        assert all(a <= n <= b for a, n, b in zip(floor, x.shape[2:], ceil, strict=True)), x.shape
    assert measure_features(find_backbone(name)[0].config) == model.feature_info
    sum(x.square().mean() for x in maps).backward()
    assert model.unused == NETWORKS[name][1]
    for key, value in model.named_parameters():
        if key.removeprefix('net.') in model.unused:
            assert not value.requires_grad
        else:
            assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0, key


@pytest.mark.parametrize('config', ['upernet_replk-nano_demo', 'cascade-mask-rcnn_replk-nano_coco'])
@pytest.mark.parametrize('name', CASES)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.slow
def test_two_iterations(name, config, tiny, one_thread):
    cfg = load_config(str(CONFIGS / f'{config}.py'), dict(backbone=name))
    cfg.model.data_preprocessor.size = (64, 64) if cfg.default_scope == 'mmseg' else None
    if cfg.default_scope == 'mmdet':
        cfg.model.data_preprocessor.pop('size')
    model = build_model(cfg, 'cpu').train()
    model.init_weights()
    before = {key: value.detach().clone() for key, value in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        loss, _ = model.parse_losses(model(**model.data_preprocessor(batch(cfg, 8), True), mode='loss'))
        assert loss.isfinite() and loss > 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {key: value for key, value in model.backbone.named_parameters() if value.requires_grad}
    assert all(value.grad.isfinite().all() for value in trained.values())
    assert any((value != before[key]).any() for key, value in trained.items())


@pytest.mark.parametrize('name', [n for n in NETWORKS if n.startswith('timm/') and not n.startswith('timm/maxvit')])
@TIMM
@pytest.mark.slow
def test_outputs_channels_and_strides_are_those_of_timm(name, tiny):
    import timm

    model = build_backbone(name).eval()
    options = NETWORKS[name][0]
    indices = [i for i, f in enumerate(timm.create_model(name[5:], **options).feature_info) if f['reduction'] > 2]
    theirs = timm.create_model(name[5:], features_only=True, out_indices=indices, **options).eval()
    theirs.load_state_dict(model.net.state_dict())
    channels = theirs.feature_info.channels()
    assert [f['num_chs'] for f in model.feature_info] == channels
    side = theirs.default_cfg['input_size'][-1]
    with torch.no_grad():
        x = torch.randn(1, 3, side, side)
        for level, (a, b) in enumerate(zip(model(x), theirs(x), strict=True)):
            b = b if b.shape[1] == channels[level] else b.permute(0, 3, 1, 2)
            if len(set(theirs.feature_info.reduction())) == 1:
                b = model.neck[level](b)
            else:
                assert theirs.feature_info.reduction()[level] == model.feature_info[level]['reduction']
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(('stride', 'target'), [(14, 16), (12, 16), (20, 16)])
def test_rescale_keeps_positions(stride, target):
    """A map of the centres of its cells, in pixels, becomes that of the cells of another stride."""
    centres = (torch.arange(24.0) + 0.5) * stride
    found = adapters.Rescale(1, stride, target)(centres.expand(1, 1, 24, 24))[0, 0, 2]
    want = (torch.arange(float(24 * stride // target)) + 0.5) * target
    torch.testing.assert_close(found[1:-2], want[1:-2])


@pytest.mark.parametrize(
    ('strides', 'want'),
    [
        ([4, 8, 16, 32], [0, 1, 2, 3]),
        ([2, 4, 8, 16, 32], [1, 2, 3, 4]),
        ([16] * 12, [2, 5, 8, 11]),
        ([14] * 24, [5, 11, 17, 23]),
        ([32] * 2, [0, 0, 0, 1]),
        ([8, 16, 16, 16], [0, 0, 3, 3]),
        ([16, 32, 64], [0, 0, 0, 1]),
        ([4, 4, 8, 16, 32], [1, 2, 3, 4]),
    ],
)
def test_the_maps_that_are_used(strides, want):
    assert adapters.choose_maps(strides) == want


@TIMM
def test_out_indices_layer_depths_and_normalization():
    model = build_backbone('timm/vit_tiny_patch16_224', out_indices=(1, -1), in_channels=5, **VIT)
    assert [f['reduction'] for f in model.feature_info] == [8, 32]
    assert [x.shape[-1] for x in model(torch.zeros(1, 5, 64, 64))] == [8, 2]

    def depth(key):
        return model.get_layer_depth(f'backbone.{key}', 'backbone.')

    blocks = [depth(f'net.model.blocks.{i}.attn.qkv.weight') for i in range(4)]
    assert blocks == [(i, 6) for i in (1, 2, 3, 4)]  # ids: stem, four blocks, everything else
    assert depth('net.model.pos_embed') == depth('net.model.patch_embed.proj.bias') == (0, 6)
    assert depth('neck.0.0.weight') == model.get_layer_depth('decode_head.weight', 'backbone.') == (5, 6)
    with pytest.raises(ValueError, match='no parameter'):
        depth('net.model.elsewhere')
    assert next(describe(find_backbone('timm/resnet10t')[0]))['channels'] == [64, 128, 256, 512]
    entry, weights = find_backbone('timm/tf_efficientnet_lite0.in1k')
    assert entry.mean == entry.std == (127.5, 127.5, 127.5) and weights.tag == 'in1k'
    assert find_backbone('timm/tf_efficientnet_lite0')[1] is None and entry.full_name(weights).endswith('lite0.in1k')


@pytest.mark.parametrize(
    ('name', 'kept'),
    [
        pytest.param('timm/resnet10t', True, marks=TIMM),
        pytest.param('timm/hrnet_w18_small', False, marks=TIMM),
        pytest.param('hf/convnext', True, marks=HF),
        pytest.param('hf/resnet', False, marks=HF),
        ('mmseg.MixVisionTransformer', True),
        ('mmdet.ResNet(depth=18)', False),
    ],
)
def test_drop_path_is_that_of_the_config(name, kept):
    cfg = load_config(str(CONFIGS / 'upernet_replk31b_ade20k.py'), dict(backbone=name))
    assert cfg.model.backbone.get('drop_path_rate') == (0.5 if kept else None)
    model = build_model(cfg, 'meta').backbone
    rates = [m.drop_prob for m in model.modules() if hasattr(m, 'drop_prob')]
    assert max(rates, default=0) == (0.5 if kept else 0)


@pytest.mark.parametrize('kind', ['torch', 'safetensors'])
@TIMM
def test_files_of_timm(kind, tmp_path):
    import timm

    name, options = 'vit_tiny_patch16_224', dict(VIT, img_size=32)
    theirs = timm.create_model(name, **options).eval()
    torch.nn.init.normal_(theirs.pos_embed)
    state, path = theirs.state_dict(), tmp_path / f'weights.{kind}'
    save = save_file if kind == 'safetensors' else torch.save
    save(state, path)
    model = build_backbone(f'timm/{name}', pretrained=path, **options).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = theirs.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        torch.testing.assert_close(model(x)[2], want)
        assert len(model(torch.randn(1, 3, 64, 48))) == 4  # position embeddings are interpolated
    del state['blocks.3.attn.qkv.weight']
    save(state, path)
    with pytest.raises(UserError, match='does not fit TimmBackbone'):
        build_backbone(f'timm/{name}', pretrained=path, **options)


@TIMM
def test_own_strides_have_no_layers_of_ours_and_interpolated_position_embeddings():
    import timm

    name = 'vit_tiny_patch16_224'
    model: Any = build_backbone(f'timm/{name}', rescale=False, **VIT).eval()
    torch.nn.init.normal_(model.net.model.pos_embed)
    assert not [*model.neck.parameters()] and [info['reduction'] for info in model.feature_info] == [16] * 4
    theirs = timm.create_model(name, img_size=(64, 96), **VIT).eval()
    state = {key.removeprefix('model.'): value for key, value in model.net.state_dict().items()}
    fitted = timm.models.vision_transformer.checkpoint_filter_fn({**theirs.state_dict(), **state}, theirs)
    theirs.load_state_dict(fitted)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, want = model(x), theirs.forward_intermediates(x, norm=False, intermediates_only=True)
    torch.testing.assert_close([*maps], [*want])


@HF
@pytest.mark.slow
def test_folders_and_files_of_transformers(tmp_path):
    import transformers

    config = transformers.Dinov2Config(**DINOV2)
    theirs = transformers.Dinov2ForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    processor = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5], do_flip_channel_order=True)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(processor))
    name, file = f'hf/{tmp_path}', tmp_path / 'model.safetensors'
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        tokens = theirs.dinov2(x).last_hidden_state[:, 1:]  # after the last norm, as AutoBackbone's maps
        want = tokens.transpose(1, 2).reshape(1, 24, 4, 4)
        for source in (dict(pretrained=True), dict(pretrained=file)):
            model = build_backbone(name, **source).eval()
            torch.testing.assert_close(adapters._feature_maps(model.net, x)[3], want)
    cfg = load_config(str(CONFIGS / 'upernet_replk-nano_demo.py'), dict(backbone=name))
    preprocessor = cfg.model.data_preprocessor
    torch.testing.assert_close(torch.tensor(preprocessor.mean), torch.tensor([25.5, 51.0, 76.5]))
    assert list(preprocessor.std) == [127.5] * 3 and not preprocessor.bgr_to_rgb
    with pytest.raises(UserError, match='does not fit HFBackbone'):  # position embeddings of another size
        build_backbone('hf/dinov2', pretrained=file, **{**DINOV2, 'image_size': 112})
    state = theirs.state_dict()
    key = next(key for key in state if 'layer.3' in key)
    del state[key]
    save_file(state, file)
    for source in (True, file):
        with pytest.raises(UserError, match='missing, unexpected'):
            build_backbone(name, pretrained=source)


@TIMM
def test_networks_for_one_image_size():
    model = build_backbone('timm/beit_base_patch16_224', img_size=64, **VIT)
    assert [x.shape[-1] for x in model(torch.zeros(1, 3, 48, 48))] == [12, 6, 3, 2]
    with pytest.raises(UserError, match=r'64x64 images, not for 64x96\nSet img_size=\(64, 96\)'):
        model(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize(('name', 'extra'), [('timm/resnet18', 'timm'), ('hf/dinov2', 'transformers')])
def test_absent_libraries(name, extra, monkeypatch):
    monkeypatch.setattr(adapters, 'find_spec', lambda package: None)
    for build in (find_backbone, build_backbone):
        with pytest.raises(UserError, match=rf'not installed\n.*EXTRAS={extra}'):
            build(name)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        pytest.param('timm/resnet180', {}, 'no such network\nDid you mean', marks=TIMM),
        pytest.param('timm/resnet18.a0', {}, 'a0', marks=TIMM),
        pytest.param('timm/resnet18', dict(depht=3), 'depht', marks=TIMM),
        pytest.param('timm/resnet18', dict(out_indices=(4,)), 'out_indices', marks=TIMM),
        pytest.param('hf/resnett', {}, 'Did you mean resnet', marks=HF),
        pytest.param('hf/bert', {}, 'HFBackbone bert', marks=HF),
        ('mmseg.MixVisionTransfomer', {}, 'no such backbone'),
        ('mmdet.ResNet', {}, r'needs depth\n'),
        ('mmdet.ResNet(18)', {}, r'needs depth\n'),
        ('mmdet.ResNet(depth=', {}, 'argument=value'),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_names_and_arguments_that_do_not_fit(name, options, message):
    with pytest.raises(UserError, match=message):
        build_backbone(name, **options)


@pytest.mark.parametrize(
    ('name', 'channels'),
    [('mmseg.MixVisionTransformer', [64, 128, 256, 512]), ('mmdet.ResNet(depth=18)', [64, 128, 256, 512])],
)
def test_backbones_of_openmmlab(name, channels):
    cfg = load_config(str(CONFIGS / 'upernet_replk-nano_demo.py'), dict(backbone=name))
    build_model(cfg, 'meta')
    assert next(describe(find_backbone(name)[0]))['channels'] == channels
    assert list(cfg.model.decode_head.in_channels) == channels and cfg.catalogue.backbone == name
