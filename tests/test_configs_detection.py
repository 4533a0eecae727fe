"""COCO configs follow the published recipes, and so do the images that their pipelines deliver."""
import copy
import json
from pathlib import Path

import config_cases
import numpy as np
import pytest
import torch
from config_cases import (
    CHANNELS,
    RECIPES,
    build,
    check_backbone,
    check_input,
    check_optimization,
    load,
    meta_model,
    params_m,
)
from mmengine.registry import DATASETS, PARAM_SCHEDULERS
from PIL import Image

ROWS = {name: row for name, row in config_cases.ROWS.items() if 'ap_box' in row}
CASCADE = [name for name in ROWS if name.startswith('cascade-')]
CONVNEXT = [name for name in ROWS if 'convnext' in name]
FCOS, MASK = 'fcos_replk31b_coco.py', 'mask-rcnn_convnext-tiny_coco.py'
SHORT_SIDES = list(range(480, 801, 32))


# ---- the recipe, row by row

@pytest.mark.parametrize('name', ROWS)
def test_backbone_and_neck_follow_the_row(name):
    check_backbone(name)
    check_input(name)
    cfg, row = load(name), ROWS[name]
    backbone = cfg.model.backbone
    assert backbone.get('frozen_stages') is None and backbone.get('norm_eval', False) is False
    # Nothing of the ResNet that the base file comes with is left, and all of the network learns.
    assert set(backbone) <= {'type', 'arch', 'drop_path_rate', 'out_indices', 'init_cfg', 'norm_cfg', 'with_cp',
                             'small_kernel_merged', 'norm_intermediate_features', 'layer_scale_init_value',
                             'gap_before_final_norm'}
    assert all(p.requires_grad for p in meta_model(name).parameters())
    neck = cfg.model.neck
    assert (neck.type, neck.in_channels, neck.out_channels, neck.num_outs) == ('FPN', CHANNELS[row['backbone']], 256, 5)
    if name == FCOS:
        assert (neck.start_level, neck.add_extra_convs) == (1, 'on_output')


@pytest.mark.parametrize('name', CASCADE)
def test_cascade_heads_follow_the_recipe(name):
    model = load(name).model
    assert model.type == 'CascadeRCNN' and model.roi_head.num_stages == 3
    heads = model.roi_head.bbox_head
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('ConvFCBBoxHead', 4, 1)
        assert (head.conv_out_channels, head.fc_out_channels, head.roi_feat_size) == (256, 1024, 7)
        assert head.norm_cfg.type == 'SyncBN'
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ('GIoULoss', 10.0)
        assert head.reg_class_agnostic is False and head.reg_decoded_bbox is True
        assert head.loss_cls == {'type': 'CrossEntropyLoss', 'use_sigmoid': False, 'loss_weight': 1.0}
    assert [head.bbox_coder.target_stds for head in heads] == [
        [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert model.roi_head.stage_loss_weights == [1, 0.5, 0.25]
    assert [stage.assigner.pos_iou_thr for stage in model.train_cfg.rcnn] == [0.5, 0.6, 0.7]
    assert (model.roi_head.mask_head.type, model.roi_head.mask_head.num_convs) == ('FCNMaskHead', 4)
    for head in meta_model(name).roi_head.bbox_head:  # one regression for each class
        assert head.fc_reg.out_features == 4 * 80 and len(head.shared_convs) == 4


def test_mask_rcnn_is_the_usual_one():
    model = load(MASK).model
    assert model.type == 'MaskRCNN'
    head = model.roi_head.bbox_head
    assert (head.type, head.loss_bbox.type, head.reg_class_agnostic) == ('Shared2FCBBoxHead', 'L1Loss', False)


def test_fcos_is_the_plain_one():
    model = load(FCOS).model
    assert model.type == 'FCOS' and model.bbox_head.strides == [8, 16, 32, 64, 128]
    head = meta_model(FCOS).bbox_head
    assert not (head.norm_on_bbox or head.centerness_on_reg or head.center_sampling)
    assert head.loss_bbox.__class__.__name__ == 'IoULoss'
    norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 8 and {m.num_groups for m in norms} == {32}


@pytest.mark.parametrize('name', ROWS)
def test_testing_follows_the_authors(name):
    cfg = load(name)
    test = cfg.model.test_cfg if name == FCOS else cfg.model.test_cfg.rcnn
    assert (test.score_thr, test.nms, test.max_per_img) == (0.05, {'type': 'nms', 'iou_threshold': 0.5}, 100)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        resize = {t.type: t for t in loader.dataset.pipeline}['Resize']
        assert (resize.scale, resize.keep_ratio) == ((1333, 800), True)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        metrics = evaluator.metric if isinstance(evaluator.metric, list) else [evaluator.metric]
        assert metrics == (['bbox'] if name == FCOS else ['bbox', 'segm'])


@pytest.mark.parametrize('name', ROWS)
def test_training_data_follow_the_recipe(name):
    cfg, row = load(name), ROWS[name]
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == 'replk_mm.CocoDataset' and dataset.data_root == 'data/coco/'
    assert dataset.filter_cfg == {'filter_empty_gt': True, 'min_size': 32}
    steps = {t.type: t for t in dataset.pipeline}
    assert steps['RandomFlip'].prob == 0.5 and steps['LoadAnnotations'].get('with_mask', False) is (name != FCOS)
    if name == FCOS:
        assert steps['RandomChoiceResize'].scales == [(1333, 640), (1333, 800)]
        return
    assert RECIPES[row['recipe']]['augmentation'] == 'DETR / Sparse R-CNN multi-scale 480-800 with random crops'
    (once,), (first, crop, again) = steps['RandomChoice'].transforms
    for resize in (once, again):
        assert resize.scales == [(short, 1333) for short in SHORT_SIDES] and resize.keep_ratio is True
    assert first.scales == [(short, 1333) for short in (400, 500, 600)]
    assert (crop.crop_type, crop.crop_size, crop.allow_negative_crop) == ('absolute_range', (384, 600), True)


@pytest.mark.parametrize('name', ROWS)
def test_optimization_and_schedule_follow_the_row(name):
    check_optimization(name)
    cfg, row = load(name), ROWS[name]
    assert cfg.train_cfg.type == 'replk_mm.EpochBasedTrainLoop' and cfg.train_cfg.val_interval == 1
    assert cfg.train_cfg.max_epochs == row['epochs'] == RECIPES[row['recipe']]['schedule']['epochs']
    hook = cfg.default_hooks.checkpoint
    assert (hook.interval, hook.max_keep_ckpts, hook.save_best) == (1, 3, 'coco/bbox_mAP')


@pytest.mark.parametrize('name', [FCOS, MASK, CASCADE[0]])
def test_learning_rate_warms_up_and_falls_by_steps(name):
    recipe = RECIPES[ROWS[name]['recipe']]
    warmup, schedule = recipe['warmup'], recipe['schedule']
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    by_iter, by_epoch = (PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in load(name).param_scheduler)
    assert (by_iter.by_epoch, by_epoch.by_epoch) == (False, True)
    per_epoch, seen = 600, {}
    for epoch in range(schedule['epochs']):
        for i in range(per_epoch):
            seen[epoch, i] = optimizer.param_groups[0]['lr']
            optimizer.step()
            by_iter.step()
        by_epoch.step()
    start, length = warmup['start'], warmup['iters']
    for i in range(length - 1):  # mmengine's warmups are over one iteration early
        grown = start if warmup['policy'] == 'constant' else start + (1 - start) * i / (length - 1)
        assert seen[0, i] == pytest.approx(grown, abs=1e-6)
    assert seen[0, 0] == pytest.approx(start) and seen[0, length] == pytest.approx(1.0)
    first, second = schedule['milestones']
    for epoch in range(1, schedule['epochs']):
        assert seen[epoch, 0] == pytest.approx(0.1 ** ((epoch >= first) + (epoch >= second)))


# ---- what they build

@pytest.mark.parametrize('name', ROWS)
def test_parameters_are_within_1_percent_of_the_published(name):
    assert params_m(meta_model(name)) == pytest.approx(ROWS[name]['params_m'], rel=0.01)


@pytest.mark.parametrize('name', [n for n in ROWS if 'replk' in n])
def test_the_deployed_model_rounds_to_the_published_parameters(name):
    cfg = copy.deepcopy(load(name))
    cfg.model.backbone.small_kernel_merged = True
    deployed, published = params_m(build(cfg)), ROWS[name]['params_m']
    assert round(deployed) == published
    # Of the training form, merging takes the small kernels and all but a bias of the two normalizations after them.
    assert 0 < params_m(meta_model(name)) - deployed < 0.6


# ---- the data pipelines, on a photograph of 480x360 with one object

@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (360, 480, 3), dtype=np.uint8)
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        Image.fromarray(pixels).save(root / split / 'a.jpg')
        polygon = [120, 90, 360, 90, 360, 270, 120, 270]
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(dict(
            info={}, licenses=[], images=[dict(id=1, file_name='a.jpg', width=480, height=360)],
            categories=[dict(id=1, name='person')],
            annotations=[dict(id=1, image_id=1, category_id=1, bbox=[120, 90, 240, 180], area=43200, iscrowd=0,
                              segmentation=[polygon])])))
    return root


def samples(name: str, loader: str, root: Path, count: int) -> list:
    dataset = copy.deepcopy(load(name)[loader].dataset)
    dataset.update(data_root=str(root), serialize_data=False)  # which would collect garbage first
    with DATASETS.switch_scope_and_registry('mmdet') as registry:
        built = registry.build(dataset)
        return [built[0] for _ in range(count)]


@pytest.mark.parametrize('name', [CASCADE[0], FCOS])
def test_test_pipeline_fits_1333_by_800(name, coco):
    sample = samples(name, 'val_dataloader', coco, 1)[0]
    assert sample['inputs'].shape == (3, 800, 1067)  # by the short side, 800 / 360
    assert sample['data_samples'].ori_shape == (360, 480)


def test_training_pipeline_resizes_and_crops_with_boxes_and_masks(coco):
    np.random.seed(0)
    whole = 0
    for sample in samples(CASCADE[0], 'train_dataloader', coco, 16):
        height, width = sample['inputs'].shape[1:]
        assert min(height, width) in SHORT_SIDES or max(height, width) == 1333
        found = sample['data_samples'].gt_instances
        whole += abs(width / height - 4 / 3) < 0.01
        for box, mask in zip(found.bboxes.tensor, found.masks.to_tensor(torch.bool, 'cpu'), strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            drawn = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (drawn - box).abs().max() < 4  # a few pixels of rounding at each resizing
    assert 0 < whole < 16
