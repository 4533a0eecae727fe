# ConvNeXt-atto as a classifier of the shapes of tools/make_demo_data.py.
#
# Train:     python tools/make_demo_data.py data/shapes --scenes shapes --train 1600 --val 150 --size 64 64
#            python tools/train.py configs/convnext-atto_shapes.py
# Recipe:    1 CPU x 16 images (global batch 16), 2 epochs, from scratch
# Published: none
_base_ = [
    './_base_/models/classifier_convnext.py',
    './_base_/datasets/shapes.py',
    './_base_/schedules/shapes.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    data_preprocessor=dict(num_classes=3),
    # A small initial scale, and the recipe's small weights, are for trainings of many epochs.
    backbone=dict(arch='atto', layer_scale_init_value=1.0, init_cfg=dict(type='Xavier', layer=['Conv2d', 'Linear'])),
    head=dict(in_channels=320, num_classes=3),
)
