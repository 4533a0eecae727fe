# Small heads and plain BatchNorm: a model that one CPU trains from scratch.
_base_ = './upernet.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        drop_path_rate=0.0,
    ),
    decode_head=dict(channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(channels=32, norm_cfg=norm_cfg),
)
