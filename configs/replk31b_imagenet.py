# RepLKNet-31B trained on ImageNet-1K at 224x224.
#
# Train:     python tools/train.py configs/replk31b_imagenet.py
# Recipe:    32 GPUs x 64 images (global batch 2048), 300 epochs
# Published: top-1 accuracy 83.5
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
_base_ = [
    './_base_/models/classifier_replknet.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/runtimes/classification.py',
]
model = dict(train_cfg=_base_.mixup, backbone=dict(arch='31B', drop_path_rate=0.5), head=dict(in_channels=1024))
train_dataloader = dict(batch_size=64)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 4e-3,
        by_epoch=True,
        begin=10,
        end=300,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=2048)
