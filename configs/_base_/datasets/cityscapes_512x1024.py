# Cityscapes, crop 512x1024, tested whole at 1024x2048.
_base_ = 'mmseg::_base_/datasets/cityscapes.py'
# mmseg's IoUMetric, plus mIoU_present and the scores of every class
val_evaluator = dict(type='replk_mm.IoUMetric')
test_evaluator = dict(type='replk_mm.IoUMetric')
