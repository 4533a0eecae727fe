# Scenes of `tools/make_demo_data.py --scenes shapes`: one object in each, a disc, a square or a star. No crops, no scaling.
crop_size = (64, 64)
load = dict(type='LoadImageFromFile')
train_pipeline = [load, dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
test_pipeline = [load, dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root='data/shapes', metainfo=dict(classes=['disc', 'square', 'star']))
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, data_prefix=dict(img_path='train'), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, data_prefix=dict(img_path='val'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='replk_mm.Accuracy', topk=(1,))
test_evaluator = val_evaluator
