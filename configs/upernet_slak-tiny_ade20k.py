# UperNet with SLaK-T, ImageNet-1K pretraining of 300 epochs, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_slak-tiny_ade20k.py --pretrained FILE
#            (the address of the weights is a web page: download them with a browser)
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 47.6 single-scale (sliding window)
#            quoted from arXiv:2207.03620 and VITA-Group/SLaK, not reproduced here
_base_ = [
    './_base_/models/upernet.py',
    './_base_/backbones/slak.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/unireplknet_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        **_base_.slak,
        arch='tiny',
        drop_path_rate=0.4,
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        init_cfg=dict(
            type='Pretrained', checkpoint='https://drive.google.com/file/d/1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4'
        ),
    ),
    decode_head=dict(in_channels=[124, 249, 499, 998]),
    auxiliary_head=dict(in_channels=499),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)),
)
# the stages learn at 0.9^6 ... 0.9^3 of lr
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6))
train_dataloader = dict(batch_size=2)
# keeps the zeros of the sparse weights
custom_hooks = [dict(type='replk_mm.SparsityHook')]
