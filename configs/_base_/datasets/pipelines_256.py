# What ADE20K and Cityscapes (or small sets of photographs in their layouts) have in common at 256x256, for models that a CPU
# trains: images are resized to short side 256 to 512, so that none needs padding, and the loss is taken at the logits' stride
# (see ShrinkLabels). mmengine lets no two bases have a name in common, and mmseg's data sets have these without the number.
crop_size_256 = (256, 256)
train_pipeline_256 = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 256), ratio_range=(1.0, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size_256, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='replk_mm.ShrinkLabels', factor=4),
    dict(type='PackSegInputs')
]
test_pipeline_256 = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 384), keep_ratio=True),
    # after Resize: the metric compares at the annotation's own size
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
# Multi-scale testing by factors of the test scale: see ade20k_512.py.
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
        ])
]
