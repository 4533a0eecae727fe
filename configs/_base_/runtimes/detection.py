_base_ = 'mmdet::_base_/default_runtime.py'
# of the checkpoint of each epoch, with its optimizer gigabytes for the large models, keep the last three and the best
default_hooks = dict(checkpoint=dict(type='replk_mm.CheckpointHook', max_keep_ckpts=3, save_best='coco/bbox_mAP'))
