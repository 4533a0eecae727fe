_base_ = 'mmseg::_base_/default_runtime.py'
# mmseg's, but for the logits of all views, which are never held at the size of the photograph
tta_model = dict(type='replk_mm.SegTTAModel')
