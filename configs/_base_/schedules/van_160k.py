_base_ = './iters_160k.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # parameters with these parts in their names
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=16)
