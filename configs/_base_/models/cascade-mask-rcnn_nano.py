# A small Cascade Mask R-CNN, trained from scratch on a CPU: three thin stages on few proposals. It uses BatchNorm, since nothing
# is pretrained. At full size the mask heads alone would take most of a step.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
norm_cfg = dict(type='BN', requires_grad=True)
width = 48
num_classes = 80
# Regions up to 56 pixels use the finest level. One sample per bin suffices, since no bin is larger than two cells.
roi_levels = dict(type='SingleRoIExtractor', out_channels=width, featmap_strides=[4, 8, 16, 32], finest_scale=28)
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.0),
    neck=dict(out_channels=width, norm_cfg=norm_cfg),
    # Objects from 16 pixels on: images are a third of the usual size.
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4, 4 * 2**0.5])),
    roi_head=dict(
        bbox_roi_extractor=dict(**roi_levels, roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=1)),
        mask_roi_extractor=dict(**roi_levels, roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=1)),
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=1,
                num_shared_fcs=1,
                in_channels=width,
                conv_out_channels=width,
                fc_out_channels=128,
                norm_cfg=norm_cfg,
                roi_feat_size=7,
                num_classes=num_classes,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
            )
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
        mask_head=dict(
            num_convs=2,
            in_channels=width,
            conv_out_channels=32,
            norm_cfg=norm_cfg,
            num_classes=num_classes,
            # one mask per region for all classes, so that shapes are learned from all objects
            class_agnostic=True,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type='RandomSampler', num=32, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for iou in (0.5, 0.6, 0.7)
        ],
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
