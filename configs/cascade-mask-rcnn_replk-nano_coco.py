# Small Cascade Mask R-CNN with RepLKNet-nano, from scratch, COCO layout at 256x256: trains on a CPU.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_replk-nano_coco.py
# Recipe:    1 CPU x 4 images (global batch 4), 800 iterations
# Published: none; a model of this project, for first steps and for checks of the whole chain
_base_ = [
    './_base_/models/cascade-mask-rcnn_nano.py',
    './_base_/datasets/coco_nano.py',
    './_base_/schedules/nano_coco.py',
]
model = dict(
    backbone=dict(type='replk_mm.RepLKNet', arch='nano', norm_cfg=_base_.norm_cfg),
    neck=dict(in_channels=[32, 64, 128, 256]),
)
