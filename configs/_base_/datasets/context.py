# Scenes of `tools/make_demo_data.py --scenes context`: what an object is, a cue far away decides. Nothing is cropped or resized.
crop_size = (96, 96)
num_classes = 5
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
train_pipeline = [*load, dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
test_pipeline = [*load, dict(type='PackSegInputs')]
dataset = dict(
    type='BaseSegDataset',
    data_root='context/data',
    metainfo=dict(
        classes=('ground', 'cue_a', 'cue_b', 'object_a', 'object_b'),
        palette=[[125, 150, 75], [190, 40, 40], [40, 60, 190], [245, 130, 110], [120, 170, 245]]),
    reduce_zero_label=True)
train_dataloader = dict(
    batch_size=16, num_workers=2, persistent_workers=True, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, pipeline=train_pipeline,
                 data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
val_dataloader = dict(
    batch_size=1, num_workers=2, persistent_workers=True, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, pipeline=test_pipeline,
                 data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation')))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
