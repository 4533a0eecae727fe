# UperNet with ConvNeXt-T, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_convnext-tiny_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations, fp16
# Published: mIoU 46.0 single-scale (sliding window), 46.7 multi-scale with flips (whole images)
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
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224.pth'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)
# the stages learn at 0.9^6 ... 0.9^3 of lr; those of the larger models, with num_layers=12, at 0.9^12 ... 0.9^9
optim_wrapper = dict(paramwise_cfg=dict(num_layers=6))
train_dataloader = dict(batch_size=2)
