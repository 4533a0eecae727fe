# Cascade Mask R-CNN with SLaK-T, ImageNet-1K pretraining of 300 epochs, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_slak-tiny_coco.py --pretrained FILE
#            (the address of the weights is a web page: download them with a browser)
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 51.3, AP mask 44.3
#            quoted from arXiv:2207.03620 and VITA-Group/SLaK, not reproduced here
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/backbones/slak.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/unireplknet_36e.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        **_base_.slak,
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='https://drive.google.com/file/d/1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4'
        ),
    ),
    neck=dict(in_channels=[124, 249, 499, 998]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(decay_rate=0.7, num_layers=6))
train_dataloader = dict(batch_size=2)
# keeps the zeros of the sparse weights
custom_hooks = [dict(type='replk_mm.SparsityHook')]
