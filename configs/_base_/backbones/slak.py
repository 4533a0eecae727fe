# Common to all SLaK recipes; replknet.py shows how a detector uses it.
slak = dict(
    type='replk_mm.SLaK',
    # the recipe sets 1 instead of the 1e-6 of pretraining; a checkpoint replaces both
    layer_scale_init_value=1.0,
    # training form; replk_mm.reparam.reparameterize merges it for deployment
    small_kernel_merged=False,
    # statistics over all GPUs (CPU runs use plain BatchNorm)
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    out_indices=(0, 1, 2, 3),
)
