# UperNet with RepLKNet-31B, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_replk31b_ade20k.py
# Recipe:    8 GPUs x 4 images (global batch 32), 160k iterations; the authors split it as 64 GPUs x 2 for 40k
# Published: mIoU 49.9 single-scale, 50.6 multi-scale with flips
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
_base_ = [
    './_base_/models/upernet_replknet.py',
    './_base_/datasets/ade20k_512.py',
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
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
train_dataloader = dict(batch_size=4)
