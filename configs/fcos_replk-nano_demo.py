# Small FCOS with RepLKNet-nano on generated scenes.
#
# Train:     python tools/make_demo_data.py demo/detection/data --format coco
#            python tools/train.py configs/fcos_replk-nano_demo.py
# Recipe:    1 CPU x 4 images (global batch 4), 1,500 iterations, from scratch
# Published: none. Measured: box AP 17.4 (seed 0)
_base_ = './cascade-mask-rcnn_replk-nano_demo.py'  # data and optimizer
norm_cfg = dict(type='BN', requires_grad=True)
width = 64
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
model = dict(
    _delete_=True,
    type='FCOS',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(type='replk_mm.RepLKNet', arch='nano', norm_cfg=norm_cfg, drop_path_rate=0.0),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4, norm_cfg=norm_cfg),
    bbox_head=dict(
        type='FCOSHead',
        num_classes=len(_base_.classes),
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        # Images are a fifth of the usual size, so strides and ranges are smaller.
        strides=[4, 8, 16, 32],
        regress_ranges=((-1, 24), (24, 48), (48, 96), (96, 1e8)),
        center_sampling=True,
        norm_on_bbox=True,
        centerness_on_reg=True,
        norm_cfg=norm_cfg,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=1.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=1500),
]
train_cfg = dict(max_iters=1500, val_interval=750)
