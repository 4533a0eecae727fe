_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='replk_mm.ConvNeXt',
        # on CPUs these heads, all convolutions, are fastest with channels-last features
        out_memory_format='preserve_format',
        # the recipe sets 1 instead of the 1e-6 of pretraining; a checkpoint replaces both
        layer_scale_init_value=1.0,
        # dense prediction needs feature maps, not pooled vectors
        gap_before_final_norm=False,
        out_indices=[0, 1, 2, 3],
    )
)
# The authors test multi-scale on whole images, single-scale on the windows that each config sets.
tta_test_cfg = dict(mode='whole')
