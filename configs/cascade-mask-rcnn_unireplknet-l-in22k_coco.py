# Cascade Mask R-CNN with UniRepLKNet-L, ImageNet-22K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_unireplknet-l-in22k_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 55.8, AP mask 48.4
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
        arch='large',
        drop_path_rate=0.7,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_l_in22k_to_in1k_384_acc87.88.pth',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7, num_layers=12))
train_dataloader = dict(batch_size=2)
