# COCO with boxes and masks, tested at 1333x800. Augmentation as in DETR and Sparse R-CNN: flip, then either resize the short
# side to 480 to 800, or resize, crop and resize.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
multi_scale = dict(type='RandomChoiceResize', scales=[(short, 1333) for short in range(480, 801, 32)], keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [multi_scale],
            [
                dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                # crops without objects are background images
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
                multi_scale,
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]
# like mmdet's, but they match classes by name and report unrounded scores of every class
train_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset'))
test_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset'))
val_evaluator = dict(type='replk_mm.CocoMetric')
test_evaluator = dict(type='replk_mm.CocoMetric')
