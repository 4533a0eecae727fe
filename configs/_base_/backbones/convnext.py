# What every recipe of ConvNeXt has in common; see replknet.py for how a detector takes it.
convnext = dict(
    type='replk_mm.ConvNeXt',
    # the recipe starts its layer scale at 1, not at the 1e-6 of the pretraining (the checkpoint then replaces it)
    layer_scale_init_value=1.0,
    # dense prediction wants feature maps, not pooled vectors
    gap_before_final_norm=False,
    out_indices=[0, 1, 2, 3])
