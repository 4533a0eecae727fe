# Cascade Mask R-CNN with UniRepLKNet-XL, ImageNet-22K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_unireplknet-xl-in22k_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 56.4, AP mask 49.0
#            quoted from arXiv:2410.08049 and AILab-CVC/UniRepLKNet, not reproduced here
# Weights:   ImageNet-22K pretraining, fine-tuned on ImageNet-1K at 384x384, as in the authors' configs
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/backbones/unireplknet.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/unireplknet_36e.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.unireplknet,
        arch='xlarge',
        drop_path_rate=0.7,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_xl_in22k_to_in1k_384_acc87.96.pth',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7, num_layers=12))
train_dataloader = dict(batch_size=2)
# as in the authors' recipe, for this variant only
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
