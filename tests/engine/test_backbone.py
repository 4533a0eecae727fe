"""``--backbone``: exchanged backbones in configs of ours, of mmseg and of mmdet, and their recipes."""

import copy
import json

import pytest
import torch
from config_cases import CONFIGS, LEAVES, load
from mmengine.config import Config
from tool_cases import tool_main

from replk_mm.backbones import build_backbone, list_backbones
from replk_mm.backbones.catalogue import ADAPTERS, CatalogueEntry, find_backbone, measure_features, weights_by_url
from replk_mm.engine.backbone import describe_recipe, published_result, use_backbone
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError

UPERNET, CASCADE = (
    str(CONFIGS / f'{name}.py') for name in ('upernet_replk-nano_demo', 'cascade-mask-rcnn_replk-nano_coco')
)
SMALLEST = (
    'replknet-nano',
    'convnext-atto',
    'convnextv2-atto',
    'unireplknet-a',
    'slak-tiny',
    'inceptionnext-atto',
    'mscan-t',
    'van-b0',
    'moganet-xtiny',
    'rdnet-tiny',
    'overlock-xt',
)


def need(package: str | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.extras(package)] if package else []


def exchanged(name: str, backbone: str, **options) -> Config:
    cfg = copy.deepcopy(load(name))
    use_backbone(cfg, backbone, **options)
    return cfg


@pytest.mark.parametrize('config', [UPERNET, CASCADE], ids=['upernet', 'cascade'])
@pytest.mark.parametrize(
    'name',
    [
        n if n in SMALLEST else pytest.param(n, marks=[pytest.mark.slow, *need(find_backbone(n)[0].package)])
        for n in list_backbones()
    ],
)
def test_every_backbone_fits_a_segmentor_and_a_detector(name, config):
    """Building on the meta device runs the whole model, so that channels that do not fit are errors."""
    cfg = load_config(config, dict(backbone=name))
    model = build_model(cfg, 'meta')
    features = measure_features(find_backbone(name)[0].config)
    assert [f['num_chs'] for f in features] == list((cfg.model.get('neck') or cfg.model.decode_head).in_channels)
    assert [f['reduction'] for f in features] == [4, 8, 16, 32]
    assert cfg.catalogue.backbone == name and cfg.catalogue.pretraining == 'none'
    assert type(model.backbone).__name__ == cfg.model.backbone.type.rpartition('.')[2]


def channels_of(cfg: Config) -> list[int]:
    found = (cfg.model.get('neck') or cfg.model.decode_head).in_channels
    return [found] if isinstance(found, int) else list(found)  # DeepLabv3+ has that of the last map


@pytest.mark.parametrize('name', LEAVES)
def test_channels_of_the_shipped_configs_are_those_of_the_catalogue(name):
    cfg = load(name)
    entries = [find_backbone(n)[0] for n in list_backbones()]
    backbone = cfg.model.backbone
    named = next(e for e in entries if (e.config['type'], e.config.get('arch')) == (backbone.type, backbone.arch))
    features = [f['num_chs'] for f in measure_features(named.config)]
    assert channels_of(cfg) == features[-len(channels_of(cfg)) :]
    if cfg.model.get('auxiliary_head'):
        assert cfg.model.auxiliary_head.in_channels == features[2]


#: Shipped configs of which one becomes the other.
PAIRS = [
    ('upernet_replk31b_ade20k.py', 'upernet_convnext-tiny_ade20k.py'),
    ('upernet_convnext-tiny_ade20k.py', 'upernet_replk31b_ade20k.py'),
    ('upernet_convnext-xlarge-in22k_ade20k-640.py', 'upernet_replkxl-meg73m_ade20k-640.py'),
    ('cascade-mask-rcnn_replk31l-in22k_coco.py', 'cascade-mask-rcnn_convnext-base-in22k_coco.py'),
    ('cascade-mask-rcnn_convnext-small_coco.py', 'cascade-mask-rcnn_replkxl-meg73m_coco.py'),
    ('cascade-mask-rcnn_replk31b_coco.py', 'cascade-mask-rcnn_convnext-tiny_coco.py'),
]


@pytest.mark.parametrize(('before', 'after'), PAIRS)
def test_exchanging_gives_the_authors_own_config(before, after):
    """The shipped configs were written by hand from the authors' files."""
    want = load(after)
    entry, weights = weights_by_url()[want.model.backbone.init_cfg.checkpoint]
    cfg = exchanged(before, entry.full_name(weights))
    for key in ('optimizer', 'constructor'):
        assert cfg.optim_wrapper.get(key) == want.optim_wrapper.get(key)
    decay = dict(want.optim_wrapper.paramwise_cfg)
    assert {key: cfg.optim_wrapper.paramwise_cfg[key] for key in decay} == decay
    assert cfg.auto_scale_lr == want.auto_scale_lr
    got, expected = cfg.model.backbone, want.model.backbone
    keys = ('type', 'arch', 'drop_path_rate', 'out_indices', 'norm_intermediate_features', 'layer_scale_init_value')
    assert [got.get(key) for key in keys[:3]] == [expected.get(key) for key in keys[:3]]
    assert list(got.out_indices) == list(expected.out_indices)
    assert all(got.get(key, False) == expected.get(key, False) for key in keys[4:])
    assert got.get('norm_cfg', {}).get('type') == expected.get('norm_cfg', {}).get('type')
    assert got.init_cfg.checkpoint == expected.init_cfg.checkpoint
    assert channels_of(cfg) == channels_of(want)
    assert cfg.model.get('auxiliary_head', {}).get('in_channels') == want.model.get('auxiliary_head', {}).get(
        'in_channels'
    )
    assert [list(cfg.model.data_preprocessor[key]) for key in ('mean', 'std')] == [
        list(want.model.data_preprocessor[key]) for key in ('mean', 'std')
    ]
    assert cfg.catalogue.recipe == 'authors' and entry.name in cfg.catalogue.changes
    assert published_result(cfg, before) == published_result(want, after) is not None


@pytest.mark.parametrize(
    'config',
    [
        'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
        'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    ],
)
def test_configs_of_other_libraries(config):
    cfg = load_config(config, dict(backbone='convnext-tiny'))
    build_model(cfg, 'meta')
    assert cfg.model.backbone.type == 'replk_mm.ConvNeXt' and 'pretrained' not in cfg.model
    preprocessor = cfg.model.data_preprocessor  # that of YOLOX has no mean of its own
    assert list(preprocessor.mean) == [123.675, 116.28, 103.53] and preprocessor.bgr_to_rgb


def test_a_config_from_scratch_stays_from_scratch_with_its_own_optimizer():
    cfg = exchanged('upernet_replk-nano_ade20k.py', 'convnextv2-atto')
    own = load('upernet_replk-nano_ade20k.py')
    assert cfg.work_dir == 'work_dirs/upernet_replk-nano_ade20k-convnextv2-atto'
    assert 'init_cfg' not in cfg.model.backbone and cfg.optim_wrapper == own.optim_wrapper
    assert cfg.model.backbone.drop_path_rate == 0.0
    assert (cfg.catalogue.recipe, cfg.catalogue.pretraining) == ('common', 'none')


def test_a_tag_chooses_weights_and_a_ranges_only_recipe_is_the_common_one():
    cfg = exchanged('upernet_replk-nano_ade20k.py', 'convnextv2-base.fcmae-in1k')
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('im1k/convnextv2_base_1k_224_ema.pt')
    assert (cfg.catalogue.backbone, cfg.catalogue.recipe) == ('convnextv2-base.fcmae-in1k', 'common')
    common = exchanged('upernet_convnext-base_ade20k.py', 'convnextv2-base')
    assert common.catalogue.backbone == 'convnextv2-base.fcmae-in1k'  # the config starts from pretrained weights
    paramwise = common.optim_wrapper.paramwise_cfg
    assert paramwise.decay_rate == 0.9 and 'num_layers' not in paramwise


def test_the_kind_of_recipe_can_be_chosen():
    own = load('upernet_replk31b_ade20k.py')
    cfg = exchanged('upernet_replk31b_ade20k.py', 'convnext-tiny', recipe='common')
    assert cfg.optim_wrapper == own.optim_wrapper and cfg.catalogue.recipe == 'common'
    assert cfg.model.backbone.drop_path_rate == own.model.backbone.drop_path_rate


@pytest.mark.parametrize(
    ('name', 'key', 'shipped'),
    [
        ('overlock-xt', 'detection', 'mask-rcnn_overlock-s_coco.py'),
        ('rdnet-tiny', 'feature_norm_cfg', 'cascade-mask-rcnn_rdnet-tiny_coco.py'),
    ],
)
def test_a_detector_gets_the_form_for_detection(name, key, shipped):
    expected = load_config(str(CONFIGS / shipped)).model.backbone[key]
    detector, segmentor = (
        load_config(str(CONFIGS / config), {'backbone': name}).model.backbone
        for config in ('mask-rcnn_convnext-tiny_coco.py', 'upernet_convnext-nano_ade20k.py')
    )
    assert detector[key] == expected and key not in segmentor


def test_the_authors_recipe_needs_pretrained_weights_and_published_values():
    with pytest.raises(UserError, match='random weights'):
        exchanged('upernet_replk-nano_ade20k.py', 'convnext-tiny', recipe='authors')
    with pytest.raises(UserError, match='no published recipe'):
        exchanged('upernet_replk31b_ade20k.py', 'convnextv2-base', recipe='authors')
    with pytest.raises(UserError, match='recipe=tries: is unknown'):
        exchanged('upernet_replk31b_ade20k.py', 'convnext-tiny', recipe='tries')


def test_overrides_win_and_change_the_kind_of_recipe():
    path = str(CONFIGS / 'upernet_replk31b_ade20k.py')
    options = {'backbone': 'convnext-tiny', 'model.backbone.drop_path_rate': 0.25, 'optim_wrapper.optimizer.lr': 7e-5}
    cfg = load_config(path, options)
    assert (cfg.model.backbone.drop_path_rate, cfg.optim_wrapper.optimizer.lr) == (0.25, 7e-5)
    assert cfg.catalogue.recipe == 'common' and 'backbone' not in cfg
    assert options['backbone'] == 'convnext-tiny'  # the caller's dict stays
    for name in ('convnext-titan', ''):
        with pytest.raises(UserError, match='no such backbone'):
            load_config(path, dict(backbone=name))


def test_a_saved_config_is_plain(tmp_path):
    cfg = load_config(UPERNET, dict(backbone='convnext-atto'))
    cfg.dump(tmp_path / 'saved.py')
    again = load_config(str(tmp_path / 'saved.py'))
    assert again.to_dict() == cfg.to_dict() and again.catalogue.backbone == 'convnext-atto'


def test_heads_and_necks_that_do_not_fit(monkeypatch):
    config = dict(type='replk_mm.ConvNeXt', arch='atto', gap_before_final_norm=False, out_indices=(3,))

    def adapter(name):
        return CatalogueEntry(name, config, 'arXiv:0', None)

    monkeypatch.setitem(ADAPTERS, 'one', adapter)
    monkeypatch.setattr('replk_mm.engine.backbone._KEPT', ())
    with pytest.raises(UserError, match=r'model.decode_head: takes 4 feature maps; one/level returns 1 feature map\n'):
        use_backbone(load_config(UPERNET), 'one/level')
    with pytest.raises(UserError, match=r'model.neck: takes 4 feature maps; one/level returns 1 feature map\n'):
        use_backbone(load_config(CASCADE), 'one/level')
    config['stem_patch_size'], config['out_indices'] = 8, (0, 1, 2, 3)
    with pytest.raises(UserError, match=r'strides \[8, 16, 32, 64\]'):
        use_backbone(load_config(CASCADE), 'one/level')
    with pytest.raises(UserError, match='no model.backbone'):
        use_backbone(Config(dict(model=dict(type='replk_mm.ConvNeXt'))), 'convnext-tiny')


def test_recipes_of_rows():
    """Two learning rates from scratch are two recipes; the authors' own are one kind."""
    kinds = {}
    for name in ('upernet_replk-nano_ade20k.py', 'upernet_convnext-nano_ade20k.py', 'upernet_replk31b_ade20k.py'):
        kinds[name] = describe_recipe(load(name), name, {}, images=8)
    replk, convnext, published = kinds.values()
    assert (replk['origin'], replk['lr'], convnext['lr']) == ('common', 3e-3, 1e-3)
    assert (published['origin'], published['lr']) == ('authors', 2e-4 * 8 / 32)
    assert describe_recipe(load('upernet_replk31b_ade20k.py'), 'configs/upernet_replk31b_ade20k.py', {}, 8) == published
    changed = describe_recipe(load('upernet_replk31b_ade20k.py'), 'x.py', {'optim_wrapper.optimizer.lr': 1}, 8)
    assert changed['origin'] == 'common'


def test_commands_take_the_option(monkeypatch, capsys):
    config = str(CONFIGS / 'upernet_replk-nano_demo.py')
    args = (config, '--cfg-options', 'model.backbone.frozen_stages=1', '--backbone', 'convnext-atto', '--json')
    assert tool_main('complexity', *args, monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    backbone = next(part for part in found['training']['parts'] if part['name'] == 'backbone')
    with torch.device('meta'):
        assert backbone['parameters'] == sum(p.numel() for p in build_backbone('convnext-atto').parameters())
    assert found['config'] == f'{config} --backbone convnext-atto'
