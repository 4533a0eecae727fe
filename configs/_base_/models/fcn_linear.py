# A linear classifier on features of stride 8: all context comes from the backbone.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(96, 96),
    ),
    # on CPUs the head, a convolution, is fastest with channels-last features
    backbone=dict(out_memory_format='preserve_format'),
    decode_head=dict(
        type='FCNHead',
        num_convs=0,
        concat_input=False,
        in_index=0,
        dropout_ratio=0.0,
        num_classes=5,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0, class_weight=[0.3, 1.0, 1.0, 2.0, 2.0]),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
