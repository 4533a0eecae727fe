# UperNet with UniRepLKNet-B, ImageNet-22K pretraining, ADE20K at 640x640.
#
# Train:     python tools/train.py configs/upernet_unireplknet-b-in22k_ade20k-640.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 53.5 single-scale, 53.9 multi-scale with flips
#            quoted from arXiv:2410.08049 and AILab-CVC/UniRepLKNet, not reproduced here
# Weights:   ImageNet-22K pretraining, fine-tuned on ImageNet-1K at 384x384, as in the authors' configs
#            The authors also round the sides of test images up to multiples of 32.
_base_ = [
    './_base_/models/upernet_unireplknet.py',
    './_base_/datasets/ade20k_640.py',
    './_base_/schedules/unireplknet_160k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        with_cp=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_b_in22k_to_in1k_384_acc87.40.pth',  # noqa: E501
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9, num_layers=12))
train_dataloader = dict(batch_size=2)
