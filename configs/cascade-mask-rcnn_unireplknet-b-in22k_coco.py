# Cascade Mask R-CNN with UniRepLKNet-B, ImageNet-22K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_unireplknet-b-in22k_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 54.8, AP mask 47.4
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
        arch='base',
        drop_path_rate=0.6,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_b_in22k_to_in1k_384_acc87.40.pth',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
train_dataloader = dict(batch_size=2)
