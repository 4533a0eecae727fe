# Small UperNet with RepLKNet-nano, from scratch, Cityscapes layout at 256x256: trains on a CPU.
#
# Train:     python tools/train.py configs/upernet_replk-nano_cityscapes.py
# Recipe:    1 CPU x 4 images (global batch 4), 1300 iterations
# Published: none; a model of this project, for first steps and for checks of the whole chain
_base_ = [
    './_base_/models/upernet_nano.py',
    './_base_/datasets/cityscapes_256.py',
    './_base_/schedules/nano.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.RepLKNet',
        arch='nano',
        norm_cfg=_base_.norm_cfg,
        small_kernel_merged=False,
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], num_classes=19),
    auxiliary_head=dict(in_channels=128, num_classes=19),
)
train_dataloader = dict(batch_size=4)
