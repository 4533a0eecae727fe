# UperNet with OverLoCK-S, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_overlock-s_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 51.3 single-scale
#            quoted from arXiv:2502.20087 and LMMMEng/OverLoCK, not reproduced here
#            The authors also round the sides of test images up to multiples of 32. They warn of NaN in mixed
#            precision.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/van_160k.py',  # the same
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.OverLoCK',
        arch='small',
        drop_path_rate=0.3,
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        # statistics over all GPUs, in the backbone too (CPU runs use plain BatchNorm)
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_s_in1k_224.pth',
        ),
    ),
    decode_head=dict(in_channels=[64, 128, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
train_dataloader = dict(batch_size=2)
