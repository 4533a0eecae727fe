_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='replk_mm.VAN',
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        # statistics over all GPUs, in the backbone too (CPU runs use plain BatchNorm)
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        out_indices=(0, 1, 2, 3),
    )
)
