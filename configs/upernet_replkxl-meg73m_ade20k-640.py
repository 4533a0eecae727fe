# UperNet with RepLKNet-XL, MegData73M pretraining, ADE20K at 640x640.
#
# Train:     python tools/train.py configs/upernet_replkxl-meg73m_ade20k-640.py
# Recipe:    8 GPUs x 4 images (global batch 32), 160k iterations; the authors split it as 16 GPUs x 2
# Published: mIoU 55.2 single-scale, 56.0 multi-scale with flips
#            quoted from arXiv:2203.06717 and DingXiaoH/RepLKNet-pytorch, not reproduced here
# Weights:   the recipe starts from MegData73M weights. The file below was then fine-tuned on ImageNet-1K (320).
#            It is the closest public download; expect a small difference.
_base_ = [
    './_base_/models/upernet_replknet.py',
    './_base_/datasets/ade20k_512_crop640.py',
    './_base_/schedules/replknet_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    # mean and std of the MegData73M pretraining
    data_preprocessor=dict(size=_base_.crop_size, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        arch='XL',
        drop_path_rate=0.5,
        norm_intermediate_features=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/replknet/replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(426, 426)),
)
train_dataloader = dict(batch_size=4)
