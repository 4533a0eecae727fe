_base_ = './epochs_36.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
# Images per iteration on all GPUs that lr is for. The authors do not state it: their files have 1 image per GPU for 31B and
# 31L, 4 for XL, and no number of GPUs. 32 is 4 on the usual 8 GPUs, and agrees with the 2e-4 of their FCOS (2 per GPU, 8
# GPUs).
auto_scale_lr = dict(enable=True, base_batch_size=32)
