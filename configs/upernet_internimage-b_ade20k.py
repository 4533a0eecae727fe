# UperNet with InternImage-B, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_internimage-b_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 50.8 single-scale, 51.3 multi-scale with flips
#            quoted from arXiv:2211.05778 and OpenGVLab/InternImage, not reproduced here
#            The authors also round the sides of test images up to multiples of 32.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/iters_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.InternImage',
        arch='base',
        drop_path_rate=0.4,
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_b_1k_224.pth',
        ),
    ),
    decode_head=dict(in_channels=[112, 224, 448, 896]),
    auxiliary_head=dict(in_channels=448),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.05),
    # no weight decay for biases, norms and layer scales; no layer-wise decay for this variant
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=1.0, num_layers=33),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
train_dataloader = dict(batch_size=2)
