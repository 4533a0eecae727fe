# RepLKNet's fine-tuning: a larger rate with warm-up, more decay of early layers, tested on averaged weights.
_base_ = './imagenet_30e.py'
optim_wrapper = dict(optimizer=dict(lr=4e-4), paramwise_cfg=dict(decay_rate=0.7))
warmup = dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=1, convert_to_iter_based=True)
cosine = dict(type='CosineAnnealingLR', by_epoch=True, begin=1, end=30, convert_to_iter_based=True)
param_scheduler = [warmup, dict(**cosine, eta_min_ratio=1e-6 / 4e-4)]
custom_hooks = [dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')]
