# SegNeXt: mmseg's Hamburger head on stages 2 to 4. Inheriting files set the backbone and the channels of the head.
# The head draws its bases at random, in evaluation too: results are repeatable with a seed.
norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
model = dict(
    # mmseg's, without holding logits at image size: same parameters, losses and predictions
    type='replk_mm.EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='replk_mm.MSCAN',
        # statistics over all GPUs (CPU runs use plain BatchNorm)
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(
        type='LightHamHead',
        in_index=[1, 2, 3],
        # steps of the matrix factorization; MD_R is its rank
        ham_kwargs=dict(MD_S=1, MD_R=64, train_steps=6, eval_steps=7, inv_t=100, rand_init=True),
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
