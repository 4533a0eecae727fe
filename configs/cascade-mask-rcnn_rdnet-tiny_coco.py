# Cascade Mask R-CNN with RDNet-T, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/cascade-mask-rcnn_rdnet-tiny_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs, fp16
# Published: AP box 51.6, AP mask 44.6
#            quoted from arXiv:2403.19588 and naver-ai/rdnet, not reproduced here
_base_ = [
    './_base_/models/cascade-mask-rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/epochs_36.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='replk_mm.RDNet',
        arch='tiny',
        drop_path_rate=0.4,
        # the authors normalize the features for detectors only
        feature_norm_cfg=dict(type='GN', num_groups=1),
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:naver-ai/rdnet_tiny.nv_in1k'),
    ),
    neck=dict(in_channels=[256, 440, 744, 1040]),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale=dict(init_scale=512.0),
    optimizer=dict(type='AdamW', lr=8e-5, betas=(0.9, 0.999), weight_decay=0.05),
    # one learning rate per dense stage; no weight decay for biases, norms and layer scales
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='stage_wise', decay_rate=0.8),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_dataloader = dict(batch_size=2)
