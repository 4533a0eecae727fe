# UperNet with ConvNeXt-S, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_convnext-small_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations, fp16
# Published: mIoU 48.7 single-scale (sliding window), 49.6 multi-scale with flips (whole images)
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    './_base_/models/upernet_convnext.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/convnext_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='small',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_small_1k_224.pth'
        ),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
