# RepLKNet as a classifier: BatchNorm of the last map, global average pooling, a linear layer with torch's initialization.
_base_ = './classifier_convnext.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='replk_mm.RepLKNet',
        # training form; replk_mm.reparam.reparameterize merges it for deployment
        small_kernel_merged=False,
        norm_cfg=dict(type='BN'),
        # the norm before the pooling
        norm_intermediate_features=True,
        out_indices=(3,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(init_cfg=None),
)
