# ADE20K, crop 512, short side 512 (ConvNeXt on ImageNet-1K, RepLKNet-31B on ImageNet-1K).
_base_ = 'mmseg::_base_/datasets/ade20k.py'
# mmseg's tta_pipeline resizes by a factor of the image's own size, the published multi-scale numbers by a factor of the
# test scale: not the same wherever the short side is not 512. LoadAnnotations takes reduce_zero_label from the dataset
# (true for ADE20K), which is why the pipeline does not repeat it.
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
        ])
]
# mmseg's, which also reports mIoU_present and the figures of every class
val_evaluator = dict(type='replk_mm.IoUMetric')
test_evaluator = dict(type='replk_mm.IoUMetric')
