# UperNet with ConvNeXt-B, ImageNet-1K pretraining, Cityscapes at 769x769: beside upernet_replk31b_cityscapes.py.
#
# Train:     python tools/train.py configs/upernet_convnext-base_cityscapes.py
# Recipe:    8 GPUs x 2 images (global batch 16), 80k iterations, fp16
# Published: none; neither paper has ConvNeXt on Cityscapes. Data, length and testing are those of RepLKNet's recipe,
#            optimizer, layer decay and drop path those of ConvNeXt's recipe for ADE20K
_base_ = [
    './_base_/models/upernet_convnext.py',
    './_base_/datasets/cityscapes_769.py',
    './_base_/schedules/convnext_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224.pth'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=19, align_corners=True),
    auxiliary_head=dict(in_channels=512, num_classes=19, align_corners=True),
)
train_dataloader = dict(batch_size=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1600),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=80000),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
