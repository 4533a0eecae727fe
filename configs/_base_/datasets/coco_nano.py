# COCO (or a small set of photographs in its layout) for training on a CPU: crops of 256x256 from images of short side
# 256 to 448, tested at short side 384.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
crop_size = (256, 256)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
train_pipeline = [
    *load,
    dict(type='RandomResize', scale=(2048, 256), ratio_range=(1.0, 1.75), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, recompute_bbox=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(4, 4)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    load[0],
    dict(type='Resize', scale=(2048, 384), keep_ratio=True),
    load[1],
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True),
    batch_sampler=None,
    # like mmdet's, but they match classes by name and report unrounded scores of every class
    dataset=dict(type='replk_mm.CocoDataset', pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset', pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset', pipeline=test_pipeline))
val_evaluator = dict(type='replk_mm.CocoMetric')
test_evaluator = dict(type='replk_mm.CocoMetric')
