# Small DeepLabv3+ with a MobileNetV2 of three stages at stride 8, on scenes where a distant cue decides the class of an object.
#
# Train:     python tools/make_demo_data.py context/data --scenes context --size 112 112 --train 400 --val 80 &&
#            python tools/train.py configs/deeplabv3plus_mobilenetv2-nano_context.py
# Recipe:    1 CPU x 16 images (global batch 16), 600 iterations, from scratch; after 200 it finds the ground only
# Published: none; `python tools/suite.py configs/suites/mobilenetv2_deeplab.yaml` compares depthwise kernels with it
_base_ = './fcn_mobilenetv2-nano_context.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=600),
]
train_cfg = dict(max_iters=600, val_interval=200)
model = dict(
    backbone=dict(output_stride=8, out_indices=[0, 1, 2]),
    decode_head=dict(
        _delete_=True,
        type='DepthwiseSeparableASPPHead',
        in_channels=24,
        in_index=2,
        channels=32,
        # a sixth, a third and half of the map, as those of Cityscapes' recipe to the height of its crop
        dilations=(1, 2, 4, 7),
        c1_in_channels=12,
        c1_channels=8,
        dropout_ratio=0.0,
        num_classes=5,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0, class_weight=[0.3, 1.0, 1.0, 2.0, 2.0]),
    ),
)
