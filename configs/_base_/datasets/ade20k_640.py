# ADE20K, crop 640, short side 640 (ConvNeXt on ImageNet-22K).
_base_ = 'mmseg::_base_/datasets/ade20k_640x640.py'
# Multi-scale test by factors of the test scale; see ade20k_512.py.
img_ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(int(2560 * r), int(640 * r)), keep_ratio=True) for r in img_ratios],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
# mmseg's IoUMetric, plus mIoU_present and the scores of every class
val_evaluator = dict(type='replk_mm.IoUMetric')
test_evaluator = dict(type='replk_mm.IoUMetric')
