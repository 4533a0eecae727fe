# Cascade Mask R-CNN with UniRepLKNet-T, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_unireplknet-t_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 51.7, AP mask 44.9
#            quoted from arXiv:2410.08049 and AILab-CVC/UniRepLKNet, not reproduced here
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
        arch='tiny',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_t_in1k_224_acc83.21.pth',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
# the authors count 12 layers; the network has 9, and those before the last stage learn three steps more slowly
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
train_dataloader = dict(batch_size=2)
