# ConvNeXt-XL fine-tuned on ImageNet-1K at 224x224 after ImageNet-22K.
#
# Train:     python tools/train.py configs/convnext-xlarge-in22k_imagenet.py
# Recipe:    32 GPUs x 16 images (global batch 512), 30 epochs
# Published: top-1 accuracy 87.0
#            quoted from arXiv:2201.03545 and facebookresearch/ConvNeXt, not reproduced here
_base_ = [
    './_base_/models/classifier_convnext.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_30e.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    backbone=dict(
        arch='xlarge',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_xlarge_22k_224.pth'
        ),
    ),
    # the recipe scales the initial head by 1e-3
    head=dict(in_channels=2048, init_cfg=dict(std=2e-5)),
)
train_dataloader = dict(batch_size=16)
# tested on averaged weights
custom_hooks = [dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')]
