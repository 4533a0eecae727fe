# ADE20K (or a small set of photographs in its layout) at 256x256, for training on a CPU; see pipelines_256.py.
_base_ = ['mmseg::_base_/datasets/ade20k.py', './pipelines_256.py']
# Rename the base's variables to mmseg's names.
crop_size = _base_.pop('crop_size_256')
train_pipeline = _base_.pop('train_pipeline_256')
test_pipeline = _base_.pop('test_pipeline_256')
img_ratios = _base_.pop('img_ratios_256')
tta_pipeline = _base_.pop('tta_pipeline_256')
train_dataloader = dict(num_workers=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(num_workers=2, dataset=dict(pipeline=test_pipeline))
# mmseg's IoUMetric, plus mIoU_present and the scores of every class
val_evaluator = dict(type='replk_mm.IoUMetric')
test_evaluator = dict(type='replk_mm.IoUMetric')
