# mmsegmentation's 80k iterations of SGD, polynomial decay of power 0.9, no warmup.
_base_ = './iters_160k.py'
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=80000)]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
# images per iteration on all GPUs that lr is for
auto_scale_lr = dict(enable=True, base_batch_size=8)
