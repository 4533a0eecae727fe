# Mask R-CNN with ConvNeXt-T, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/mask-rcnn_convnext-tiny_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs, fp16
# Published: AP box 46.2, AP mask 41.7
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './_base_/backbones/convnext.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/convnext_36e.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.convnext,
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
train_dataloader = dict(batch_size=2)
