# DeepLabv3+ with MobileNetV2, 13x13 depthwise kernels beside 3x3 ones, Cityscapes at 512x1024, stride 8.
#
# Train:     python tools/train.py configs/deeplabv3plus_mobilenetv2-k13_cityscapes.py --pretrained FILE
#            with ImageNet-1K weights of this backbone, which nobody has published; without them, from scratch
# Recipe:    8 GPUs x 1 image (global batch 8), 80k iterations
# Published: none with this recipe. The RepLKNet paper states mIoU 76.60, and 75.67 without the 3x3 kernels
#            (arXiv:2203.06717); which stride, crop and schedule it has is not known here. For its 9x9 kernels (76.30 and
#            76.11) add `--cfg-options model.backbone.kernel_size=9`, without 3x3 `model.backbone.small_kernel=None`.
_base_ = './deeplabv3plus_mobilenetv2_cityscapes.py'
model = dict(backbone=dict(kernel_size=13, small_kernel=3, init_cfg=None))
