# UperNet with ConvNeXt-B, ImageNet-22K pretraining, ADE20K at 640x640.
#
# Train:     python tools/train.py configs/upernet_convnext-base-in22k_ade20k-640.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations, fp16
# Published: mIoU 52.6 single-scale (sliding window), 53.1 multi-scale with flips (whole images)
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    './_base_/models/upernet_convnext.py',
    './_base_/datasets/ade20k_640.py',
    './_base_/schedules/convnext_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_224.pth'
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(426, 426)),
)
train_dataloader = dict(batch_size=2)
