# 30 epochs of fine-tuning: AdamW with layer-wise learning-rate decay, a cosine to 1e-6, no Mixup or CutMix.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-5, betas=(0.9, 0.999), weight_decay=1e-8),
    constructor='replk_mm.LayerDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_rate=0.8, decay_type='layer_wise', num_layers=12),
)
param_scheduler = [
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-6 / 5e-5, by_epoch=True, begin=0, end=30, convert_to_iter_based=True
    )
]
train_cfg = dict(type='replk_mm.EpochBasedTrainLoop', max_epochs=30, val_interval=1)
auto_scale_lr = dict(enable=True, base_batch_size=512)
