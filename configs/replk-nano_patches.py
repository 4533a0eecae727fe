# RepLKNet-nano as a classifier of the patches of tools/make_demo_data.py.
#
# Train:     python tools/make_demo_data.py data/patches --format imagenet --train 3200 --val 480 --size 64 64
#            python tools/train.py configs/replk-nano_patches.py
# Recipe:    1 CPU x 16 images (global batch 16), 3 epochs, from scratch
# Published: none
_base_ = [
    './_base_/models/classifier_replknet.py',
    './_base_/datasets/patches.py',
    './_base_/schedules/patches.py',
    './_base_/runtimes/classification.py',
]
model = dict(
    data_preprocessor=dict(num_classes=16), backbone=dict(arch='nano'), head=dict(in_channels=256, num_classes=16)
)
