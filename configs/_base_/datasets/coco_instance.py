# COCO with boxes and masks, tested at 1333x800. Training images are augmented as in DETR and Sparse R-CNN: flipped, then
# either resized to a short side of 480 to 800, or resized, cropped and resized so.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
multi_scale = dict(
    type='RandomChoiceResize', scales=[(short, 1333) for short in range(480, 801, 32)], keep_ratio=True)
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
                # crops may hold no object: they are images of background then
                dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
                multi_scale,
            ],
        ]),
    dict(type='PackDetInputs')
]
# mmdet's, which match classes by name and report the figures of every class, unrounded
train_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset'))
test_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset'))
val_evaluator = dict(type='replk_mm.CocoMetric')
test_evaluator = dict(type='replk_mm.CocoMetric')
