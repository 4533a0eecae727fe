# UperNet with RepLKNet-31B, ImageNet-1K pretraining, Cityscapes at 769x769.
#
# Train:     python tools/train.py configs/upernet_replk31b_cityscapes.py
# Recipe:    8 GPUs x 2 images (global batch 16), 80k iterations; the authors split it as 32 GPUs x 2 for 20k
# Published: mIoU 83.1 single-scale (whole images), 83.5 multi-scale with flips
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
_base_ = [
    './_base_/models/upernet_replknet.py',
    './_base_/datasets/cityscapes_769.py',
    './_base_/schedules/replknet_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='31B',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_3rdparty_in1k_20221118-fd08e268.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=19, align_corners=True),
    auxiliary_head=dict(in_channels=512, num_classes=19, align_corners=True),
)
train_dataloader = dict(batch_size=2)
param_scheduler = [
    # as many images as in the authors' warmup of 400 iterations with batch 64
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1600),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=80000),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
auto_scale_lr = dict(base_batch_size=16)
