# Common to all RepLKNet recipes. mmdet's model files contain a ResNet; a detector's config replaces it with
# backbone=dict(_delete_=True, **_base_.replknet, arch=...).
replknet = dict(
    type='replk_mm.RepLKNet',
    # training form; replk_mm.reparam.reparameterize merges it for deployment
    small_kernel_merged=False,
    # statistics over all GPUs (CPU runs use plain BatchNorm); nothing is frozen
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    # recompute activations in the backward pass, as the recipe does: less memory, more time
    with_cp=True,
    out_indices=(0, 1, 2, 3),
)
