# Common to ADE20K and Cityscapes at 256x256, for training on a CPU. Images are resized to short side 256 to 512, so that none
# needs padding; the loss is computed at the stride of the logits (ShrinkLabels). The names end in a number, because mmengine
# does not allow two bases to share a name.
crop_size_256 = (256, 256)
train_pipeline_256 = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 256), ratio_range=(1.0, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size_256, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='replk_mm.ShrinkLabels', factor=4),
    dict(type='PackSegInputs'),
]
test_pipeline_256 = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 384), keep_ratio=True),
    # after Resize: the metric compares at the size of the annotation
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# Multi-scale test by factors of the test scale; see ade20k_512.py.
img_ratios_256 = [0.75, 1.0, 1.25]
tta_pipeline_256 = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(int(2048 * r), int(384 * r)), keep_ratio=True) for r in img_ratios_256],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
