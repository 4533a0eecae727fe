# Small UperNet with RepLKNet-nano on the generated scenes of tools/make_demo_data.py. `make demo` trains it.
#
# Train:     python tools/make_demo_data.py demo/data && python tools/train.py configs/upernet_replk-nano_demo.py
# Recipe:    1 CPU x 8 images (global batch 8), 600 iterations, from scratch
# Published: none. Measured with 500 iterations: 65.3 and 69.3 mIoU (seeds 0 and 1); with 600: 78.9 (seed 1)
_base_ = [
    './_base_/models/upernet_nano.py',
    './_base_/datasets/scenes.py',
    './_base_/schedules/nano.py',
    './_base_/runtimes/segmentation.py',
]
crop_size = (128, 128)
num_classes = 8
# Objects cover a sixth of the pixels; the Dice loss weighs all classes equally.
loss = [dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0), dict(type='DiceLoss', loss_weight=1.0)]
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
# Whole scenes, no crops or rotations: a cue at the top decides the classes of objects far below it.
resize = dict(type='Resize', scale=crop_size, keep_ratio=False)
train_pipeline = [*load, resize, dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
test_pipeline = [load[0], resize, load[1], dict(type='PackSegInputs')]
metainfo = dict(
    classes=('sky', 'ground', 'water', 'disc', 'square', 'star', 'triangle_h', 'triangle_v'),
    palette=[
        [135, 190, 235],
        [125, 150, 75],
        [40, 85, 165],
        [230, 80, 60],
        [245, 190, 50],
        [170, 75, 190],
        [30, 170, 150],
        [250, 130, 190],
    ],
)
dataset = dict(data_root='demo/data', metainfo=metainfo)
train_dataloader = dict(batch_size=8, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(type='replk_mm.RepLKNet', arch='nano', norm_cfg=_base_.norm_cfg),
    decode_head=dict(in_channels=[32, 64, 128, 256], num_classes=num_classes, loss_decode=loss),
    auxiliary_head=dict(in_channels=128, num_classes=num_classes),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=600),
]
train_cfg = dict(max_iters=600, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=200))
optim_wrapper = dict(optimizer=dict(lr=4e-3))
auto_scale_lr = dict(base_batch_size=8)
