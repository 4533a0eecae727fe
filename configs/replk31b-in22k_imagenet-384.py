# RepLKNet-31B fine-tuned on ImageNet-1K at 384x384 after ImageNet-22K.
#
# Train:     python tools/train.py configs/replk31b-in22k_imagenet-384.py
# Recipe:    32 GPUs x 16 images (global batch 512), 30 epochs
# Published: top-1 accuracy 86.0
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# Weights:   the recipe starts from ImageNet-22K weights. The file below was then fine-tuned on ImageNet-1K (224).
#            It is the closest public download.
_base_ = [
    './_base_/models/classifier_replknet.py',
    './_base_/datasets/imagenet_384.py',
    './_base_/schedules/imagenet_30e_replknet.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    backbone=dict(
        arch='31B',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    head=dict(in_channels=1024),
)
train_dataloader = dict(batch_size=16)
param_scheduler = [_base_.warmup, dict(**_base_.cosine, eta_min_ratio=3e-4 / 4e-4)]
