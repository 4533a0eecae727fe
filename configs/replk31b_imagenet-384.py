# RepLKNet-31B fine-tuned on ImageNet-1K at 384x384 after ImageNet-1K at 224x224.
#
# Train:     python tools/train.py configs/replk31b_imagenet-384.py
# Recipe:    32 GPUs x 32 images (global batch 1024), 30 epochs
# Published: top-1 accuracy 84.8
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
_base_ = [
    './_base_/models/classifier_replknet.py',
    './_base_/datasets/imagenet_384.py',
    './_base_/schedules/imagenet_30e_replknet.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    backbone=dict(
        arch='31B',
        drop_path_rate=0.8,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-31B_3rdparty_in1k_20221118-fd08e268.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    # the authors' head starts from that of the pretraining, ours from random weights
    head=dict(in_channels=1024),
)
train_dataloader = dict(batch_size=32)
auto_scale_lr = dict(base_batch_size=1024)
