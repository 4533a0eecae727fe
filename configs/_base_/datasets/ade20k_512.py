# ADE20K, crop 512, short side 512 (ConvNeXt on ImageNet-1K, RepLKNet-31B on ImageNet-1K).
_base_ = 'mmseg::_base_/datasets/ade20k.py'
# The published multi-scale results scale the test scale; mmseg's tta_pipeline scales the image's own size, which differs
# unless the short side is 512. LoadAnnotations takes reduce_zero_label from the data set (True for ADE20K).
img_ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(int(2048 * r), int(512 * r)), keep_ratio=True) for r in img_ratios],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
# mmseg's IoUMetric, plus mIoU_present and the scores of every class
val_evaluator = dict(type='replk_mm.IoUMetric')
test_evaluator = dict(type='replk_mm.IoUMetric')
