# Training from scratch on one CPU: short warm-up, decay to zero, validation halfway and at the end.
_base_ = './iters_160k.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=1300),
]
train_cfg = dict(max_iters=1300, val_interval=650)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=650, max_keep_ckpts=2))
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
