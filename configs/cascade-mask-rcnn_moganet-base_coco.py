# Cascade Mask R-CNN with MogaNet-B, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_moganet-base_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 52.6, AP mask 46.0
#            quoted from arXiv:2211.03295 and Westlake-AI/MogaNet, not reproduced here
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/epochs_36.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='replk_mm.MogaNet',
        arch='base',
        drop_path_rate=0.2,
        # statistics of each GPU, as in the authors' backbone
        norm_cfg=dict(type='BN', requires_grad=True),
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/Westlake-AI/MogaNet/releases/download/moganet-in1k-weights/moganet_base_sz224_8xbs128_ep300.pth.tar',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[64, 160, 320, 512]),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # one learning rate per layer; no weight decay for biases and norms
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.8, num_layers=12),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_dataloader = dict(batch_size=2)
