# ConvNeXt-B trained on ImageNet-1K at 224x224.
#
# Train:     python tools/train.py configs/convnext-base_imagenet.py
# Recipe:    32 GPUs x 128 images (global batch 4096), 300 epochs
# Published: top-1 accuracy 83.8
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    './_base_/models/classifier_convnext.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_300e.py',
    './_base_/runtimes/classification.py',
]
model = dict(train_cfg=_base_.mixup, backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=1024))
