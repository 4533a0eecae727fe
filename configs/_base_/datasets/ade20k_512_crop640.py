# ADE20K, crop 640, images resized around short side 512, tested at short side 512, as in the authors' configs for 640x640
# (DingXiaoH/RepLKNet-pytorch, segmentation/configs): they enlarge the crop only.
_base_ = 'mmseg::_base_/datasets/ade20k.py'
crop_size = (640, 640)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
# Multi-scale test by factors of the test scale; see ade20k_512.py.
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
