# Each config sets its own learning rate and decay, since they differ between variants.
_base_ = './epochs_36.py'
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
    # one learning rate per layer; no weight decay for biases, norms and layer scales
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_type='layer_wise', num_layers=12),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
