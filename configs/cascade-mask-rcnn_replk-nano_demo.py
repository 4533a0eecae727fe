# Small Cascade Mask R-CNN with RepLKNet-nano on generated scenes. `make demo-detection` trains it.
#
# Train:     python tools/make_demo_data.py demo/detection/data --format coco
#            python tools/train.py configs/cascade-mask-rcnn_replk-nano_demo.py
# Recipe:    1 CPU x 4 images (global batch 4), 450 iterations, from scratch
# Published: none
_base_ = [
    './_base_/models/cascade-mask-rcnn_nano.py',
    './_base_/datasets/coco_nano.py',
    './_base_/schedules/nano_coco.py',
]
crop_size = (160, 160)
classes = ('disc', 'square', 'star', 'triangle_h', 'triangle_v')
data_root = 'demo/detection/data'
# Whole scenes, no crops or rotations: a cue at the top decides the classes of objects far below it.
resize = dict(type='Resize', scale=crop_size, keep_ratio=False)
train_pipeline = [*_base_.load, resize, dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
test_pipeline = [_base_.load[0], resize, *_base_.test_pipeline[2:]]
dataset = dict(
    data_root=data_root,
    metainfo=dict(
        classes=classes, palette=[(230, 80, 60), (245, 190, 50), (170, 75, 190), (30, 170, 150), (250, 130, 190)]
    ),
)
train_dataloader = dict(dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator
model = dict(
    backbone=dict(type='replk_mm.RepLKNet', arch='nano', norm_cfg=_base_.norm_cfg),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(
        bbox_head=[{**head, 'num_classes': len(classes)} for head in _base_.model.roi_head.bbox_head],
        mask_head=dict(num_classes=len(classes)),
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=450),
]
train_cfg = dict(max_iters=450, val_interval=225)
