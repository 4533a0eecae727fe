_base_ = 'mmseg::_base_/default_runtime.py'
# mmseg's, without holding the logits of all views at image size
tta_model = dict(type='replk_mm.SegTTAModel')
