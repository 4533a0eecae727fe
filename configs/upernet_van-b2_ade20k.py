# UperNet with VAN-B2, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_van-b2_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 50.1 multi-scale with flips
#            quoted from arXiv:2202.09741 and Visual-Attention-Network/VAN-Segmentation, not reproduced here
#            The authors also round the sides of test images up to multiples of 32.
_base_ = [
    './_base_/models/upernet_van.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/van_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='b2',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/Visual-Attention-Network/VAN-Base-original/resolve/main/van_base_828.pth.tar',  # noqa: E501
        ),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
train_dataloader = dict(batch_size=2)
