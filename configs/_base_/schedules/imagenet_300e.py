# 300 epochs of AdamW from scratch: linear warm-up, then a cosine to 1e-6. Both papers average the weights with a decay of
# 0.9999 and test the average.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # biases, norms and layer scales have one dimension
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 4e-3,
        by_epoch=True,
        begin=20,
        end=300,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type='replk_mm.EpochBasedTrainLoop', max_epochs=300, val_interval=1)
custom_hooks = [dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')]
# Mixup or CutMix, each for half of the batches; the train_cfg of a model
mixup = dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])
auto_scale_lr = dict(enable=True, base_batch_size=4096)
