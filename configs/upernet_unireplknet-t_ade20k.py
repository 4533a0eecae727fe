# UperNet with UniRepLKNet-T, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_unireplknet-t_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 48.6 single-scale, 49.1 multi-scale with flips
#            quoted from arXiv:2410.08049 and AILab-CVC/UniRepLKNet, not reproduced here
#            The authors also round the sides of test images up to multiples of 32.
_base_ = [
    './_base_/models/upernet_unireplknet.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/unireplknet_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_t_in1k_224_acc83.21.pth',  # noqa: E501
        ),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
# the authors use no layer-wise decay for this variant
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0, num_layers=9))
train_dataloader = dict(batch_size=2)
