# What every recipe of RepLKNet has in common. mmdet's model files come with a ResNet; a detector's config replaces it by
# backbone=dict(_delete_=True, **_base_.replknet, arch=...).
replknet = dict(
    type='replk_mm.RepLKNet',
    # the training form, which replk_mm.deploy.reparameterize merges for deployment
    small_kernel_merged=False,
    # BatchNorm statistics over all GPUs, trained like the rest (CPU runs use plain BatchNorm); nothing is frozen
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    # recompute activations in the backward pass, as the recipe does: less memory, more time
    with_cp=True,
    out_indices=(0, 1, 2, 3))
