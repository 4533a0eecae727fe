# Mask R-CNN with InternImage-B, ImageNet-1K pretraining, COCO.
#
# Train:     python tools/train.py configs/mask-rcnn_internimage-b_coco.py
# Recipe:    8 GPUs x 2 images (global batch 16), 36 epochs
# Published: AP box 50.3, AP mask 44.8
#            quoted from arXiv:2211.05778 and OpenGVLab/InternImage, not reproduced here
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/epochs_36.py',
    './_base_/runtimes/detection.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='replk_mm.InternImage',
        arch='base',
        drop_path_rate=0.4,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_b_1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[112, 224, 448, 896]),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # no weight decay for biases, norms and layer scales; no layer-wise decay
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=1.0),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
train_dataloader = dict(batch_size=2)
