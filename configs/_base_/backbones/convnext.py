# Common to all ConvNeXt recipes; replknet.py shows how a detector uses it.
convnext = dict(
    type='replk_mm.ConvNeXt',
    # the recipe sets 1 instead of the 1e-6 of pretraining; a checkpoint replaces both
    layer_scale_init_value=1.0,
    # dense prediction needs feature maps, not pooled vectors
    gap_before_final_norm=False,
    out_indices=[0, 1, 2, 3],
)
