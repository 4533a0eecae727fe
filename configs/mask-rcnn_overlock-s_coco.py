# Mask R-CNN with OverLoCK-S, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/mask-rcnn_overlock-s_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 51.0, AP mask 45.0
#            quoted from arXiv:2502.20087 and LMMMEng/OverLoCK, not reproduced here
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/epochs_36.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='replk_mm.OverLoCK',
        arch='small',
        # adds the overview to the last feature map
        detection=True,
        drop_path_rate=0.4,
        norm_cfg=dict(type='BN', requires_grad=True),
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_s_in1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # parameters with these parts in their names
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
train_dataloader = dict(batch_size=2)
