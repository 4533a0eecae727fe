# SegNeXt with MSCAN-T, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/segnext_mscan-t_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 41.1 single-scale, 42.2 multi-scale with flips
#            quoted from arXiv:2209.08575 and Visual-Attention-Network/SegNeXt, not reproduced here
#            The authors also round the sides of test images up to multiples of 32.
_base_ = [
    './_base_/models/segnext.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/segnext_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='t',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segnext/mscan_t_20230227-119e8c9f.pth',
        ),
    ),
    decode_head=dict(in_channels=[64, 160, 256], channels=256, ham_channels=256, ham_kwargs=dict(MD_R=16)),
)
train_dataloader = dict(batch_size=2)
