# Cascade Mask R-CNN with ConvNeXt-XL, ImageNet-22K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_convnext-xlarge-in22k_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs, fp16 (off in the authors' file of this size)
# Published: AP box 55.2, AP mask 47.7
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
        arch='xlarge',
        drop_path_rate=0.8,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_xlarge_22k_224.pth'
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.7))
train_dataloader = dict(batch_size=2)
