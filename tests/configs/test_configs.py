"""All configs: names, headers, pretrained weights, forward and backward of a small build, and their table."""

import copy
from pathlib import Path

import pytest
import torch
from config_cases import (
    CONFIGS,
    LEAVES,
    NANO,
    PUBLISHED,
    ROOT,
    ROWS,
    batch,
    build,
    dataset_of,
    load,
    meta_model,
    params_m,
)
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from replk_mm.backbones import RepLKNet
from replk_mm.backbones.catalogue import weights_by_url
from replk_mm.commands import list_configs
from replk_mm.data.datasets import datasets_of
from replk_mm.engine.config import fit_to_machine, set_data_root, shorten_schedule
from replk_mm.engine.config_errors import walk_dicts

CLASSES = {'ade20k': 150, 'cityscapes': 19, 'coco': 80}
UNPUBLISHED = [
    'deeplabv3plus_mobilenetv2-k13_cityscapes.py',
    'deeplabv3plus_mobilenetv2_cityscapes.py',
    'upernet_convnext-base_cityscapes.py',
]


# ---- the files


def test_files_and_published_rows_match_one_to_one():
    rows = [row['config'] for task in ('segmentation', 'detection') for row in PUBLISHED[task] if row.get('config')]
    assert len(rows) == len(set(rows)) == 46
    assert sorted([*rows, *NANO, *UNPUBLISHED]) == LEAVES


@pytest.mark.parametrize('name', LEAVES)
def test_header_has_command_recipe_and_source(name):
    text = (CONFIGS / name).read_text()
    header = text[: text.index('_base_')]
    assert f'python tools/train.py configs/{name}' in header
    row = ROWS.get(name)
    if row is None:
        assert 'Published: none' in header and ('CPU' in header) == (name in NANO)
        return
    batch = load(name).train_dataloader.batch_size
    length = f'{row["iters"] // 1000}k iterations' if 'iters' in row else f'{row["epochs"]} epochs'
    assert f'8 GPUs x {batch} images (global batch {8 * batch}), {length}' in header
    assert ('fp16' in header) == (PUBLISHED['recipes'][row['recipe']].get('amp') == 'float16')
    for text, metric in (
        ('mIoU {} single-scale', 'miou_ss'),
        ('{} multi-scale', 'miou_ms'),
        ('AP box {}', 'ap_box'),
        ('AP mask {}', 'ap_mask'),
    ):
        assert (text.format(row.get(metric)) in header) == (row.get(metric) is not None)
    source = PUBLISHED['sources'][row['source']]
    assert source['paper'] in header and source['repository'] in header
    assert 'quoted' in header and 'not reproduced' in header


# ---- weights


@pytest.mark.parametrize('name', ROWS)
def test_pretrained_weights_are_published_for_this_backbone(name):
    init, row = load(name).model.backbone.init_cfg, ROWS[name]
    entry, weights = weights_by_url()[init.checkpoint]
    assert init.type == 'Pretrained' and entry.paper_name == row['backbone']
    assert init.get('prefix') == ('backbone.' if 'mmclassification' in init.checkpoint else None)
    header = (CONFIGS / name).read_text().partition('_base_')[0]
    assert weights.pretraining.startswith(row['pretraining'])
    # Where only weights with one more training are public, the header must say so.
    assert (weights.pretraining == row['pretraining']) != ('fine-tuned on ImageNet-1K' in header)


# ---- builds with small backbones and heads

TINY = {
    'replk_mm.RepLKNet': dict(
        layers=[1, 1, 1, 1], channels=[8, 16, 24, 40], large_kernel_sizes=[7, 7, 7, 5], dw_ratio=1
    ),
    'replk_mm.ConvNeXt': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40]),
    'replk_mm.SLaK': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40]),
    'replk_mm.UniRepLKNet': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40], kernel_sizes=[3, 7, 5, 7]),
    'replk_mm.InternImage': dict(
        depths=[1, 1, 1, 1], channels=[8, 16, 24, 40], groups=[1, 2, 3, 5], offset_scale=1.0, post_norm=True
    ),
    'replk_mm.MogaNet': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40]),
    'replk_mm.VAN': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40]),
    'replk_mm.MSCAN': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40]),
    'replk_mm.InceptionNeXt': dict(depths=[1] * 4, channels=[8, 16, 24, 40], band_kernel=5, branch_ratio=0.125),
    'replk_mm.OverLoCK': dict(
        depths=[1] * 4, focus_depths=[1, 1], channels=[8, 16, 24, 40], heads=[2, 4], kernel_sizes=[7] * 4
    ),
    'replk_mm.MobileNetV2': dict(
        stem_channels=8, depths=[[1, 1], [1], [1, 1], [1]], channels=[[8, 8], [16], [24, 24], [40]]
    ),
    'replk_mm.RDNet': dict(stem_channels=16, growth_rates=[[8], [12], [8], [24]]),
}
#: Smaller values for all settings with these keys.
SMALLER = {
    'channels': 8,
    'ham_channels': 8,
    'num_groups': 4,
    'fc_out_channels': 16,
    'max_per_img': 8,
    'nms_pre': 50,
    'num': 16,
    'num_convs': 1,
    'score_thr': 0.0,
}


def channels_of(backbone: Config, arch: str | dict) -> list[int]:
    """Channels of the feature maps of a config's backbone in another architecture."""
    with torch.device('meta'):
        model = MODELS.build(dict(type=backbone.type, arch=arch, out_indices=(0, 1, 2, 3)))
    return [info['num_chs'] for info in model.feature_info]


def tiny_on_cpu(name: str) -> Config:
    """The config as it runs on a CPU, with a small backbone and small heads.

    ``in_channels`` are translated from the real widths to the small ones, so that a head or neck whose channels do not
    match the backbone raises a KeyError.
    """
    cfg = copy.deepcopy(load(name))
    fit_to_machine(cfg, None, 'cpu', 1)
    model = cfg.model
    arch = model.backbone.arch
    model.backbone.pop('init_cfg', None)
    small = dict(TINY[model.backbone.type])
    if model.backbone.type == 'replk_mm.RepLKNet':
        small['small_kernel'] = RepLKNet.arch_settings[arch]['small_kernel'] and 3
    model.backbone.arch = small
    width = dict(zip(*(channels_of(model.backbone, a) for a in (arch, small)), strict=True))
    if 'neck' in model:
        model.neck.in_channels = [width[c] for c in model.neck.in_channels]
        inner = model.neck.out_channels
        for part in ('neck', 'rpn_head', 'roi_head', 'bbox_head', 'train_cfg', 'test_cfg'):
            _shrink(model.get(part), {inner: 32})
    else:
        model.data_preprocessor.size = (64, 64)
        head = model.decode_head
        several = isinstance(head.in_channels, list)
        head.in_channels = [width[c] for c in head.in_channels] if several else width[head.in_channels]
        if 'c1_in_channels' in head:
            head.c1_in_channels = width[head.c1_in_channels]
        if 'auxiliary_head' in model:
            model.auxiliary_head.in_channels = width[model.auxiliary_head.in_channels]
        for head in ('decode_head', 'auxiliary_head'):
            _shrink(model.get(head), {})
    return cfg


def _shrink(node, width: dict[int, int]) -> None:
    if isinstance(node, (list, tuple)):
        for part in node:
            _shrink(part, width)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in SMALLER and isinstance(value, (int, float)):
                node[key] = SMALLER[key]
            elif key.endswith(('in_channels', 'out_channels', 'feat_channels')) and isinstance(value, int):
                node[key] = width.get(value, value)
            else:
                _shrink(value, width)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', LEAVES)
def test_loss_gradients_and_predictions_on_a_cpu(name, one_thread):
    cfg = tiny_on_cpu(name)
    assert 'SyncBN' not in str(cfg.model) and cfg.optim_wrapper.type == 'OptimWrapper'
    model, classes = build(cfg, 'cpu').train(), CLASSES[dataset_of(name)]
    data = batch(cfg, classes)
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    assert loss.isfinite() and loss > 0
    loss.backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), parameter
    model.eval()
    with torch.no_grad():
        predicted = model(**model.data_preprocessor(batch(cfg, classes), False), mode='predict')
    assert len(predicted) == 2
    for sample in predicted:
        if cfg.default_scope == 'mmseg':
            assert sample.pred_sem_seg.shape == (64, 64) and int(sample.pred_sem_seg.data.max()) < classes
        else:
            found = sample.pred_instances
            assert len(found) > 0 and found.bboxes.shape == (len(found), 4) and int(found.labels.max()) < classes
            assert ('masks' in found) == (cfg.model.type != 'FCOS')


@pytest.mark.parametrize('name', LEAVES)
def test_data_root_and_number_of_iterations(name):
    cfg = copy.deepcopy(load(name))
    set_data_root(cfg, 'elsewhere')
    shorten_schedule(cfg, 40)
    assert {dataset.data_root for dataset in datasets_of(cfg)} == {'elsewhere'}
    if cfg.default_scope == 'mmdet':
        assert {cfg[key].ann_file for key in ('val_evaluator', 'test_evaluator')} == {
            'elsewhere/annotations/instances_val2017.json'
        }
    assert cfg.train_cfg == {'type': 'replk_mm.IterBasedTrainLoop', 'max_iters': 40, 'val_interval': 40}
    assert max(schedule.end for schedule in cfg.param_scheduler) == 40


@pytest.mark.parametrize('name', LEAVES)
def test_configs_use_our_types(name):
    """Types are not replaced when a run is prepared."""
    types = {part['type'] for _, part in walk_dicts(load(name)._cfg_dict) if isinstance(part.get('type'), str)}
    replaced = {
        'IoUMetric',
        'CocoMetric',
        'CocoDataset',
        'SegTTAModel',
        'CheckpointHook',
        'IterBasedTrainLoop',
        'EpochBasedTrainLoop',
        'ValLoop',
    }
    assert not types & replaced
    assert {'replk_mm.CheckpointHook', 'replk_mm.ValLoop'} <= types


@pytest.mark.parametrize(
    'name',
    [
        'upernet_replk31b_ade20k.py',
        'upernet_replk-nano_ade20k.py',
        'fcos_replk31b_coco.py',
        'cascade-mask-rcnn_replk-nano_coco.py',
    ],
)
def test_only_norms_have_no_weight_decay(name):
    model, norms = meta_model(name), (_BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm)
    of_norms = {f'{n}.{p}' for n, m in model.named_modules() if isinstance(m, norms) for p, _ in m.named_parameters()}
    with MODELS.switch_scope_and_registry(load(name).default_scope):
        groups = build_optim_wrapper(model, copy.deepcopy(load(name).optim_wrapper)).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for parameter, value in model.named_parameters():
        assert decay[id(value)] == (0 if parameter in of_norms else 0.05), parameter
    assert any(parameter.startswith('backbone.') for parameter in of_norms)


# ---- the page of the command list_configs


PAGE = (ROOT / 'docs' / 'configs.md').read_text()


def test_page_has_every_config_with_its_published_figures():
    lines = {line.split('](')[0].lstrip('| ['): line for line in PAGE.splitlines()}
    assert {Path(name).stem for name in LEAVES} <= set(lines)
    for name, row in ROWS.items():
        figures = [row.get(m) for m in (('ap_box', 'ap_mask') if 'ap_box' in row else ('miou_ss', 'miou_ms'))]
        figures = ' / '.join('–' if figure is None else f'{figure}' for figure in figures)
        line = lines[Path(name).stem]
        assert f'| {figures} | {row["params_m"] or "–"} |' in line
        assert f'batch {PUBLISHED["recipes"][row["recipe"]]["global_batch"]} |' in line
        variant = row.get('crop', row.get('method'))
        assert f'| {row["backbone"]} | {row["pretraining"]} | {row["dataset"]} | {variant} |' in line


@pytest.mark.slow
def test_page_is_up_to_date():
    """Builds every model to count its parameters."""
    assert list_configs.render_page(list_configs.read_configs(CONFIGS)) == PAGE, list_configs.COMMAND


@pytest.mark.parametrize(
    ('name', 'cells'),
    [
        ('upernet_convnext-base_cityscapes.py', ('ConvNeXt-B', 'ImageNet-1K', 'Cityscapes', '769')),
        ('cascade-mask-rcnn_convnext-nano_coco.py', ('ConvNeXt-nano', 'none', 'COCO', 'Cascade Mask R-CNN')),
    ],
)
def test_row_of_a_config_without_a_published_result(name, cells):
    row = list_configs.read_config(CONFIGS / name)
    assert (row.backbone, row.pretraining, row.data, row.variant) == cells
    assert row.params_m == pytest.approx(params_m(meta_model(name)))
