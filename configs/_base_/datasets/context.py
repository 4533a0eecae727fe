# Scenes of `tools/make_demo_data.py --scenes context`: a distant cue decides the class of an object. No crops, no scaling.
_base_ = './scenes.py'
crop_size = (96, 96)
num_classes = 5
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
train_pipeline = [*load, dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
test_pipeline = [*load, dict(type='PackSegInputs')]
dataset = dict(
    data_root='context/data',
    metainfo=dict(
        classes=('ground', 'cue_a', 'cue_b', 'object_a', 'object_b'),
        palette=[[125, 150, 75], [190, 40, 40], [40, 60, 190], [245, 130, 110], [120, 170, 245]],
    ),
)
train_dataloader = dict(batch_size=16, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
