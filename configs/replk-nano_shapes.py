# RepLKNet-nano as a classifier of the shapes of tools/make_demo_data.py.
#
# Train:     python tools/make_demo_data.py data/shapes --scenes shapes --train 1600 --val 150 --size 64 64
#            python tools/train.py configs/replk-nano_shapes.py
# Recipe:    1 CPU x 16 images (global batch 16), 2 epochs, from scratch
# Published: none
_base_ = [
    './_base_/models/classifier_replknet.py',
    './_base_/datasets/shapes.py',
    './_base_/schedules/shapes.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    data_preprocessor=dict(num_classes=3), backbone=dict(arch='nano'), head=dict(in_channels=256, num_classes=3)
)
