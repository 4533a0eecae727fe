# A linear classifier on a small MobileNetV2 of three stages, on scenes where a distant cue decides the class of an object.
#
# Train:     python tools/make_demo_data.py context/data --scenes context --size 112 112 --train 400 --val 80 &&
#            python tools/train.py configs/fcn_mobilenetv2-nano_context.py
# Recipe:    1 CPU x 16 images (global batch 16), 200 iterations, from scratch
# Published: none; `python tools/suite.py configs/suites/mobilenetv2_kernel.yaml` compares depthwise kernels with it
_base_ = [
    './_base_/models/fcn_linear.py',
    './_base_/datasets/context.py',
    './_base_/schedules/context.py',
    './_base_/runtimes/segmentation.py',
]
crop_size = (112, 112)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='replk_mm.MobileNetV2',
        # The last stage has maps of 7x7 pixels, as that of the whole network at 224x224.
        arch=dict(stem_channels=8, depths=[[1, 1], [3], [3]], channels=[[8, 12], [16], [24]], expand_ratio=4),
        out_indices=[1, 2],
        norm_cfg=_base_.norm_cfg,
    ),
    # The objects are too small for stride 16 alone.
    decode_head=dict(in_channels=[16, 24], channels=40, in_index=[0, 1], input_transform='resize_concat'),
)
