# A linear classifier on RepLKNet-nano's first two stages, on scenes where a distant cue decides the class of an object.
#
# Train:     python tools/make_demo_data.py context/data --scenes context --size 96 96 --train 400 --val 80 &&
#            python tools/train.py configs/fcn_replk-nano_context.py
# Recipe:    1 CPU x 16 images (global batch 16), 200 iterations, from scratch
# Published: none; `python tools/suite.py configs/suites/kernel_size.yaml` compares kernel sizes with it
_base_ = [
    './_base_/models/fcn_linear.py',
    './_base_/datasets/context.py',
    './_base_/schedules/context.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    backbone=dict(
        type='replk_mm.RepLKNet',
        # Six pairs of blocks at stride 8, so that even 3x3 kernels could reach the cues, 36 to 64 pixels away.
        arch=dict(large_kernel_sizes=[31, 31], small_kernel=5, layers=[2, 6], channels=[32, 64], dw_ratio=1),
        out_indices=[1],
        norm_cfg=_base_.norm_cfg,
    ),
    decode_head=dict(in_channels=64, channels=64),
)
