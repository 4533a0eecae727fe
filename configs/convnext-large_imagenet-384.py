# ConvNeXt-L fine-tuned on ImageNet-1K at 384x384 after ImageNet-1K at 224x224.
#
# Train:     python tools/train.py configs/convnext-large_imagenet-384.py
# Recipe:    16 GPUs x 32 images (global batch 512), 30 epochs
# Published: top-1 accuracy 85.5
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
# Weights:   the recipe starts from weights trained on ImageNet-1K at 224x224; name yours with --pretrained FILE
_base_ = [
    './_base_/models/classifier_convnext.py',
    './_base_/datasets/imagenet_384.py',
    './_base_/schedules/imagenet_30e.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    backbone=dict(arch='large', drop_path_rate=0.95),
    # the authors' head starts from that of the pretraining, ours from random weights
    head=dict(in_channels=1536),
)
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
