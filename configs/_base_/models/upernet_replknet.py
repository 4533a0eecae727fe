_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='replk_mm.RepLKNet',
        # on CPUs: these heads are convolutions, which read channels-last features fastest
        out_memory_format='preserve_format',
        # the training form, which replk_mm.deploy.reparameterize merges for deployment
        small_kernel_merged=False,
        # BatchNorm statistics over all GPUs, in the backbone too (CPU runs use plain BatchNorm)
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        # recompute activations in the backward pass, as the recipe does: less memory, more time
        with_cp=True,
        out_indices=(0, 1, 2, 3)))
