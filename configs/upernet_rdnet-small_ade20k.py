# UperNet with RDNet-S, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_rdnet-small_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations, fp16
# Published: mIoU 48.7 single-scale, 49.8 multi-scale with flips
#            quoted from arXiv:2403.19588 and naver-ai/rdnet, not reproduced here
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/iters_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.RDNet',
        arch='small',
        drop_path_rate=0.2,
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='hf-hub:naver-ai/rdnet_small.nv_in1k'),
    ),
    decode_head=dict(in_channels=[264, 512, 760, 1264]),
    auxiliary_head=dict(in_channels=760),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=8e-5, betas=(0.9, 0.999), weight_decay=0.03),
    # one learning rate per dense stage; no weight decay for biases, norms and layer scales
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    # The authors' code counts 7 dense stages, as RDNet-T has: the last of the 11 learns at 0.9^-4 of lr, and the heads,
    # which it counts as two later, at 0.9^-2.
    paramwise_cfg=dict(
        decay_type='stage_wise',
        decay_rate=0.9,
        custom_keys=dict(backbone=dict(lr_mult=1.5241579), head=dict(lr_mult=1.2345679)),
    ),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=6e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]
train_dataloader = dict(batch_size=2)
