# Common to all UniRepLKNet recipes; replknet.py shows how a detector uses it.
unireplknet = dict(
    type='replk_mm.UniRepLKNet',
    # training form; replk_mm.reparam.reparameterize merges it for deployment
    deploy=False,
    # statistics over all GPUs (CPU runs use plain BatchNorm)
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    out_indices=(0, 1, 2, 3),
)
