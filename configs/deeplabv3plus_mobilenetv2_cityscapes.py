# DeepLabv3+ with MobileNetV2, ImageNet-1K pretraining, Cityscapes at 512x1024, stride 8.
#
# Train:     python tools/train.py configs/deeplabv3plus_mobilenetv2_cityscapes.py
# Recipe:    8 GPUs x 1 image (global batch 8), 80k iterations
# Published: none of this network. Head, data and schedule are mmsegmentation's (mobilenet-v2-d8_deeplabv3plus_4xb2-80k):
#            its backbone dilates only the first block of each layer, this one all blocks. The RepLKNet paper states mIoU
#            72.31 with 3x3 kernels (arXiv:2203.06717); which stride, crop and schedule it has is not known here.
_base_ = [
    './_base_/models/deeplabv3plus.py',
    './_base_/datasets/cityscapes_512x1024.py',
    './_base_/schedules/sgd_80k.py',
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.MobileNetV2',
        arch='100',
        output_stride=8,
        # statistics over all GPUs (CPU runs use plain BatchNorm)
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        out_memory_format='preserve_format',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    decode_head=dict(in_channels=320, c1_in_channels=24),
    auxiliary_head=dict(in_channels=96),
)
train_dataloader = dict(batch_size=1)
