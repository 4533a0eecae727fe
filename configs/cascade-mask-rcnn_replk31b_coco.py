# Cascade Mask R-CNN with RepLKNet-31B, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_replk31b_coco.py
# Recipe:    8 GPUs x 4 images (global batch 32), 36 epochs; the authors: 1 image a GPU, number of GPUs unknown
# Published: AP box 52.2, AP mask 45.2
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/backbones/replknet.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/replknet_36e.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.replknet,
        arch='31B',
        drop_path_rate=0.6,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_3rdparty_in1k_20221118-fd08e268.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
train_dataloader = dict(batch_size=4)
