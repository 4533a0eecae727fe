# A linear classifier on a ConvNeXt of two stages, on scenes where a distant cue decides the class of an object.
#
# Train:     python tools/make_demo_data.py context/data --scenes context --size 96 96 --train 400 --val 80 &&
#            python tools/train.py configs/fcn_convnext-nano_context.py
# Recipe:    1 CPU x 16 images (global batch 16), 200 iterations, from scratch
# Published: none; `python tools/suite.py configs/suites/convnext_kernel.yaml` compares kernel sizes with it
_base_ = [
    './_base_/models/fcn_linear.py',
    './_base_/datasets/context.py',
    './_base_/schedules/context.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    backbone=dict(
        type='replk_mm.ConvNeXt',
        arch=dict(depths=[2, 6], channels=[32, 64]),
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        out_indices=[1],
    ),
    decode_head=dict(in_channels=64, channels=64),
)
