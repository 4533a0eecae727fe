# ConvNeXt-L fine-tuned on ImageNet-1K at 384x384 after ImageNet-22K.
#
# Train:     python tools/train.py configs/convnext-large-in22k_imagenet-384.py
# Recipe:    32 GPUs x 16 images (global batch 512), 30 epochs
# Published: top-1 accuracy 87.5
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    './_base_/models/classifier_convnext.py',
    './_base_/datasets/imagenet_384.py',
    './_base_/schedules/imagenet_30e.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_large_22k_224.pth'
        ),
    ),
    # the recipe scales the initial head by 1e-3
    head=dict(in_channels=1536, init_cfg=dict(std=2e-5)),
)
train_dataloader = dict(batch_size=16)
