# 36 epochs ("3x"): linear warmup, then a tenth of the learning rate after 27 epochs and a hundredth after 33. The papers
# do not state the warmup; this is mmdet 2's 1x schedule, which the authors' configs inherit.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
# replk_mm's loops: a run can stop at any iteration and resumes exactly.
train_cfg = dict(type='replk_mm.EpochBasedTrainLoop', max_epochs=36, val_interval=1)
val_cfg = dict(type='replk_mm.ValLoop')
test_cfg = dict(type='TestLoop')
