_base_ = './epochs_36.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # one learning rate per layer; no weight decay for biases, norms and layer scales
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='layer_wise'),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
