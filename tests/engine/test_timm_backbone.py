"""A timm network in the UperNet config, through mmpretrain's adapter."""

import pytest
import torch
from tiny import tiny  # noqa: F401

# ruff: noqa: F811 (fixtures that come from another file)
CHANNELS = [24, 32, 48, 64]  # of timm's test_convnext
MODEL = {
    'model.backbone': dict(
        _delete_=True, type='mmpretrain.TIMMBackbone', model_name='test_convnext', features_only=True
    ),
    'model.decode_head.in_channels': CHANNELS,
    'model.auxiliary_head.in_channels': CHANNELS[2],
    'param_scheduler': [dict(type='ConstantLR', factor=1.0, by_epoch=False)],
}


@pytest.mark.slow
@pytest.mark.extras('mmpretrain', 'timm')
def test_trains(tiny, tmp_path):
    weights = []
    for iterations in (1, 2):
        path = tiny.train(tmp_path / str(iterations), iterations, MODEL, seed=0)
        weights.append(torch.load(path, weights_only=False)['state_dict'])
    before, after = ({k: v for k, v in part.items() if k.startswith('backbone.timm_model.')} for part in weights)
    assert before.keys() == after.keys() and len(after) > 50
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(before['backbone.timm_model.stem_0.weight'], after['backbone.timm_model.stem_0.weight'])
