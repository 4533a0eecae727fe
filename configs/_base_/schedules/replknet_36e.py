_base_ = './epochs_36.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=None)
# lr belongs to this many images an iteration, all GPUs together. The authors do not state it: their files have 1 image a
# GPU for 31B and 31L, 4 for XL, and no number of GPUs. 32 is 4 on the usual 8, and in proportion to the 2e-4 of their FCOS
# (2 images a GPU, 16 on 8).
auto_scale_lr = dict(enable=True, base_batch_size=32)
