# Small Cascade Mask R-CNN with ConvNeXt-nano, from scratch, COCO layout at 256x256: trains on a CPU.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_convnext-nano_coco.py
# Recipe:    1 CPU x 4 images (global batch 4), 800 iterations
# Published: none; a model of this project, for first steps and for checks of the whole chain
_base_ = [
    './_base_/models/cascade-mask-rcnn_nano.py',
    './_base_/datasets/coco_nano.py',
    './_base_/schedules/nano_coco.py',
]
model = dict(
    backbone=dict(
        type='replk_mm.ConvNeXt',
        arch='nano',
        # 1.0 instead of the default 1e-6, which suits long pretraining: blocks contribute from the first iteration
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        out_indices=[0, 1, 2, 3],
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
