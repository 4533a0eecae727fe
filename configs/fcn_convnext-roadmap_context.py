# Pointwise layers on all stages of a small ConvNeXt, on scenes where a distant cue decides the class of an object.
#
# Train:     python tools/make_demo_data.py context/data --scenes context --size 96 96 --train 400 --val 80 &&
#            python tools/train.py configs/fcn_convnext-roadmap_context.py
# Recipe:    1 CPU x 8 images (global batch 8), 150 iterations, from scratch
# Published: none; `python tools/suite.py configs/suites/convnext_roadmap.yaml` compares the steps from ResNet with it
_base_ = [
    './_base_/models/fcn_linear.py',
    './_base_/datasets/context.py',
    './_base_/schedules/context.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    backbone=dict(type='replk_mm.ConvNeXtRoadmap', arch='nano-separate-downsampling'),
    decode_head=dict(
        in_channels=[24, 48, 96, 192],
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=64,
        num_convs=1,
        kernel_size=1,
        norm_cfg=_base_.norm_cfg,
    ),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=150),
]
train_cfg = dict(max_iters=150, val_interval=75)
default_hooks = dict(checkpoint=dict(interval=75))
auto_scale_lr = dict(base_batch_size=8)
