# FCOS with RepLKNet-31B, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/fcos_replk31b_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 24 epochs; the authors: 2 images a GPU, number of GPUs unknown
# Published: AP box 47.0
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# mmdet's FCOS: GroupNorm in the head, centerness in the classification branch, no centre sampling, FPN from stride 8 with extra
# convolutions on its output, gradients clipped at 35, a third of the learning rate in the first 500 iterations.
_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', './_base_/backbones/replknet.py']
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        **_base_.replknet,
        arch='31B',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_3rdparty_in1k_20221118-fd08e268.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomChoiceResize', scales=[(1333, 640), (1333, 800)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(batch_size=2, dataset=dict(type='replk_mm.CocoDataset', pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(dataset=dict(type='replk_mm.CocoDataset'))
val_evaluator = test_evaluator = dict(type='replk_mm.CocoMetric')
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='ConstantLR', factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=24, milestones=[16, 22], gamma=0.1),
]
train_cfg = dict(type='replk_mm.EpochBasedTrainLoop', max_epochs=24)
val_cfg = dict(type='replk_mm.ValLoop')
default_hooks = dict(checkpoint=dict(type='replk_mm.CheckpointHook', max_keep_ckpts=3, save_best='coco/bbox_mAP'))
auto_scale_lr = dict(enable=True, base_batch_size=16)
