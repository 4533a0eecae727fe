# Training from scratch on one CPU: two epochs of AdamW, short warm-up, a cosine to zero.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
]
train_cfg = dict(type='replk_mm.EpochBasedTrainLoop', max_epochs=2, val_interval=1)
auto_scale_lr = dict(enable=False, base_batch_size=16)
