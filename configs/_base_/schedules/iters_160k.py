# 160k iterations: linear warmup over 1500, polynomial decay of power 1 to zero. The decay runs from iteration 0, under
# the warmup, as in the code behind the published results.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]
# replk_mm's loops and hook: a run can stop at any iteration and resumes exactly.
train_cfg = dict(type='replk_mm.IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='replk_mm.ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='replk_mm.CheckpointHook', by_epoch=False, interval=16000, max_keep_ckpts=3, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
