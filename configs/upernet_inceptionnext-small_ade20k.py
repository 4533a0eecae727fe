# UperNet with InceptionNeXt-S, ImageNet-1K pretraining, ADE20K at 512x512.
#
# Train:     python tools/train.py configs/upernet_inceptionnext-small_ade20k.py
# Recipe:    8 GPUs x 2 images (global batch 16), 160k iterations
# Published: mIoU 50.0 multi-scale with flips
#            quoted from arXiv:2303.16900 and sail-sg/inceptionnext, not reproduced here
#            The authors follow Swin's configuration; they released neither theirs nor norms of the feature maps.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k_512.py',
    './_base_/schedules/van_160k.py',  # Swin's too
    './_base_/runtimes/segmentation.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        type='replk_mm.InceptionNeXt',
        arch='small',
        drop_path_rate=0.3,
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_small.pth',
        ),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)
