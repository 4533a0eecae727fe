# Small UperNet with ConvNeXt-nano, from scratch, ADE20K layout at 256x256: trains on a CPU.
#
# Train:     python tools/train.py configs/upernet_convnext-nano_ade20k.py
# Recipe:    1 CPU x 4 images (global batch 4), 800 iterations
# Published: none; a model of this project, for first steps and for checks of the whole chain
_base_ = [
    './_base_/models/upernet_nano.py',
    './_base_/datasets/ade20k_256.py',
    './_base_/schedules/nano.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.ConvNeXt',
        arch='nano',
        # 1.0 instead of the default 1e-6, which suits long pretraining: blocks contribute from the first iteration
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        out_indices=[0, 1, 2, 3],
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
train_dataloader = dict(batch_size=4)
# A step takes twice as long as RepLKNet-nano's, hence fewer iterations; layer norms need a lower rate.
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=62),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=800),
]
train_cfg = dict(max_iters=800, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
