# RepLKNet-XL fine-tuned on ImageNet-1K at 320x320 after MegData73M.
#
# Train:     python tools/train.py configs/replkxl-meg73m_imagenet-320.py
# Recipe:    32 GPUs x 16 images (global batch 512), 30 epochs; that of 31L, since XL's is not published
# Published: top-1 accuracy 87.8
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# Weights:   the recipe starts from MegData73M weights. The file below was then fine-tuned on ImageNet-1K (320).
#            It is the closest public download.
_base_ = [
    './_base_/models/classifier_replknet.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_30e_replknet.py',
    './_base_/runtimes/classification.py',
]
crop_size = (320, 320)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=crop_size[0], **_base_.bicubic),
    *_base_.augmentation,
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=365, edge='short', **_base_.bicubic),
    dict(type='CenterCrop', crop_size=crop_size),
    dict(type='PackInputs'),
]
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),  # as in the pretraining
    backbone=dict(
        arch='XL',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    head=dict(in_channels=2048),
)
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
param_scheduler = [_base_.warmup, dict(**_base_.cosine, eta_min_ratio=3e-4 / 4e-4)]
