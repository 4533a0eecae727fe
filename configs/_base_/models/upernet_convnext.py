_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='replk_mm.ConvNeXt',
        # on CPUs: these heads are convolutions, which read channels-last features fastest
        out_memory_format='preserve_format',
        # the recipe starts its layer scale at 1, not at the 1e-6 of the pretraining (the checkpoint then replaces it)
        layer_scale_init_value=1.0,
        # dense prediction wants feature maps, not pooled vectors
        gap_before_final_norm=False,
        out_indices=[0, 1, 2, 3]))
# The authors' multi-scale figures are of whole images; their single-scale ones of the windows that each config sets.
tta_test_cfg = dict(mode='whole')
