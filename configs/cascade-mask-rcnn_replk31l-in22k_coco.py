# Cascade Mask R-CNN with RepLKNet-31L, ImageNet-22K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_replk31l-in22k_coco.py
# Recipe:    8 GPUs x 4 images (global batch 32), 36 epochs; the authors: 1 image a GPU, number of GPUs unknown
# Published: AP box 53.9, AP mask 46.5
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# Weights:   the recipe starts from ImageNet-22K weights. The file below was then fine-tuned on ImageNet-1K (384).
#            It is the closest public download; expect a small difference.
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
        arch='31L',
        drop_path_rate=0.7,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
train_dataloader = dict(batch_size=4)
