# Cascade Mask R-CNN with ConvNeXt-B, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_convnext-base_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs, fp16
# Published: AP box 52.7, AP mask 45.6
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/backbones/convnext.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/convnext_36e.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.convnext,
        arch='base',
        drop_path_rate=0.7,
        init_cfg=dict(type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(decay_rate=0.8))
train_dataloader = dict(batch_size=2)
