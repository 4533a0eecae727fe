# From scratch on one CPU: a short warmup, a decay to zero, a validation halfway and at the end.
_base_ = 'mmdet::_base_/default_runtime.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=800),
]
train_cfg = dict(type='replk_mm.IterBasedTrainLoop', max_iters=800, val_interval=400)
val_cfg = dict(type='replk_mm.ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(type='replk_mm.CheckpointHook', by_epoch=False, interval=400, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        # these layers have thousands of inputs and no norm, and need a lower rate than convolutions with BatchNorm
        custom_keys={'shared_fcs': dict(lr_mult=0.1)},
    ),
    clip_grad=dict(max_norm=10.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
