# UperNet with RepLKNet-31B, ImageNet-22K pretraining, ADE20K at 640x640.
#
# Train:     python tools/train.py configs/upernet_replk31b-in22k_ade20k-640.py
# Recipe:    8 GPUs x 4 images (global batch 32), 160k iterations; the authors split it as 64 GPUs x 2 for 40k
# Published: mIoU 51.5 single-scale, 52.3 multi-scale with flips
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# Weights:   the recipe starts from ImageNet-22K weights. The file below was then fine-tuned on ImageNet-1K (224).
#            It is the closest public download; expect a small difference.
_base_ = [
    './_base_/models/upernet_replknet.py',
    './_base_/datasets/ade20k_512_crop640.py',
    './_base_/schedules/replknet_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='31B',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(426, 426)),
)
train_dataloader = dict(batch_size=4)
