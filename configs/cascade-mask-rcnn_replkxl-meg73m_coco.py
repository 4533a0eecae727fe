# Cascade Mask R-CNN with RepLKNet-XL, MegData73M pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_replkxl-meg73m_coco.py
# Recipe:    8 GPUs x 4 images (global batch 32), 36 epochs
# Published: AP box 55.5, AP mask 48.0
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# Weights:   the recipe starts from MegData73M weights. The file below was then fine-tuned on ImageNet-1K (320).
#            It is the closest public download; expect a small difference.
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/backbones/replknet.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/replknet_36e.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    # mean and std of the MegData73M pretraining
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        _delete_=True,
        **_base_.replknet,
        arch='XL',
        drop_path_rate=0.5,
        norm_intermediate_features=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
train_dataloader = dict(batch_size=4)
