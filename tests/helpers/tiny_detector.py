"""A network of seconds: a tiny Cascade Mask R-CNN with RepLKNet on a few drawn rectangles."""

import copy
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import mmengine.config.config
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from PIL import Image

from replk_mm.engine.config import load_config
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions
from replk_mm.engine.train import train

#: Three of COCO's 80 classes, in another order than COCO has them.
CLASSES = ('car', 'person', 'dog')
COCO_CLASSES = CocoDataset.METAINFO['classes']
SIZE = 96
_BN = "dict(type='SyncBN', requires_grad=True)"
CONFIG = f"""
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
          'mmdet::_base_/default_runtime.py']
norm = {_BN}
box = dict(type='Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8, fc_out_channels=16, roi_feat_size=7,
           num_classes=80, norm_cfg=norm, reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
           loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
           bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.] * 4, target_stds=[.1, .1, .2, .2]))
model = dict(
    backbone=dict(_delete_=True, type='replk_mm.RepLKNet', norm_cfg=norm, arch=dict(
        layers=[1, 1, 1, 1], channels=[8, 16, 16, 16], large_kernel_sizes=[7, 7, 7, 7], small_kernel=3, dw_ratio=1)),
    neck=dict(in_channels=[8, 16, 16, 16], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=8), mask_roi_extractor=dict(out_channels=8), bbox_head=[box] * 3,
                  mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=[dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=t, neg_iou_thr=t, min_pos_iou=t, match_low_quality=False,
                      ignore_iof_thr=-1),
        sampler=dict(type='RandomSampler', num=16, pos_fraction=.25, neg_pos_ub=-1, add_gt_as_proposals=True),
        mask_size=28, pos_weight=-1, debug=False) for t in (.5, .6, .7)]),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=20)))
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='Resize', scale=({SIZE}, {SIZE}), keep_ratio=True)]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, batch_sampler=None,
                        sampler=dict(type='InfiniteSampler'), dataset=dict(
    type='replk_mm.CocoDataset', filter_cfg=dict(min_size=1), metainfo=dict(classes={COCO_CLASSES!r}),
    pipeline=[*load, dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]))
test = [load[0], load[2], load[1], dict(type='PackDetInputs', meta_keys=(
    'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(type='replk_mm.CocoDataset', pipeline=test))
test_dataloader = val_dataloader
val_evaluator = dict(type='replk_mm.CocoMetric')
test_evaluator = dict(type='replk_mm.CocoMetric')
train_cfg = dict(type='replk_mm.IterBasedTrainLoop', max_iters=100, val_interval=100)
val_cfg = dict(type='replk_mm.ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3))
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(type='replk_mm.CheckpointHook', by_epoch=False, interval=100))
log_processor = dict(by_epoch=False)
"""
_count = itertools.count()


@dataclass
class TinyDetector:
    """Where the data set and the config lie."""

    data: Path
    config: Path

    def cfg(self, options: dict | None = None) -> Config:
        cfg = copy.deepcopy(load_config(str(self.config)))
        cfg.merge_from_dict(options or {})
        cfg.experiment_name = f'detector{os.getpid()}_{next(_count)}'
        return cfg

    def options(self, work_dir: Path, **changes) -> RunOptions:
        return RunOptions(**{'data_root': str(self.data), 'work_dir': str(work_dir), 'device': 'cpu', **changes})

    def train(self, work_dir: Path, iterations: int = 2, options: dict | None = None, **changes) -> Path:
        cfg = self.cfg(options)
        notes = prepare_training(cfg, self.options(work_dir, max_iters=iterations, **changes))
        return train(cfg, notes, preflight=False)


def write_coco(root: Path, train: int = 4, val: int = 3, classes: tuple[str, ...] = CLASSES) -> Path:
    """Filled rectangles on noise, two to an image, in COCO's layout; ids with gaps, as COCO's."""
    rng = np.random.default_rng(0)
    for split, count in (('train2017', train), ('val2017', val)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            picture = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            images.append(dict(id=10 * i + 5, file_name=f'{i:03}.png', height=SIZE, width=SIZE))
            for j in range(2):
                kind = int(rng.integers(len(classes)))
                left, top = 4 + 48 * j, int(rng.integers(0, 40))
                width, height = int(rng.integers(20, 40)), int(rng.integers(20, 50))
                picture[top : top + height, left : left + width] = 0
                picture[top : top + height, left : left + width, kind] = 220
                right, bottom = left + width, top + height
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=10 * i + 5,
                        category_id=7 * kind + 3,
                        bbox=[left, top, width, height],
                        area=width * height,
                        iscrowd=0,
                        segmentation=[[left, top, right, top, right, bottom, left, bottom]],
                    )
                )
            Image.fromarray(picture).save(root / split / f'{i:03}.png')
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(
                dict(
                    info={},
                    licenses=[],
                    images=images,
                    annotations=annotations,
                    categories=[dict(id=7 * i + 3, name=name) for i, name in enumerate(classes)],
                )
            )
        )
    return root


@pytest.fixture(scope='session')
def detector(tmp_path_factory) -> TinyDetector:
    folder = tmp_path_factory.mktemp('detector')
    # mmengine lays out the whole config anew, nicely and slowly, for its log and for each checkpoint.
    mmengine.config.config.FormatCode = lambda text, **options: (text, True)
    (folder / 'tiny.py').write_text(CONFIG)
    return TinyDetector(write_coco(folder / 'data'), folder / 'tiny.py')


@pytest.fixture(scope='session')
def trained_detector(detector, tmp_path_factory) -> Path:
    return detector.train(tmp_path_factory.mktemp('trained_detector'), 25, seed=0)
