"""The same outputs as mmpretrain's ConvNeXt and RepLKNet, with the same arguments and weights."""

import pytest
import torch
from norms import randomize_norms

from replk_mm.backbones import ConvNeXt, RepLKNet

pytestmark = pytest.mark.extras('mmpretrain')
CONVNEXT = dict(depths=[1, 1, 3, 1], channels=[8, 12, 16, 24])
REPLKNET = dict(
    large_kernel_sizes=[13, 11, 9, 7], small_kernel=5, layers=[1, 1, 2, 1], channels=[8, 12, 16, 24], dw_ratio=1
)


def assert_equal_outputs(ours, name: str, **arguments) -> None:
    import mmpretrain.models

    theirs = getattr(mmpretrain.models, name)(**arguments)
    theirs.eval()  # theirs returns None
    with torch.no_grad():
        for value in theirs.parameters():  # the initial layer scale would hide the blocks
            value.normal_(0.1, 0.5)
    randomize_norms(theirs)
    model = ours(**arguments)
    model.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = theirs(image), model.eval()(image)
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        assert a.std() > 1e-3
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize(
    'options',
    [
        dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False),
        dict(),  # a classifier's: the last stage, averaged over the map
        dict(out_indices=(1, 3), gap_before_final_norm=False, linear_pw_conv=False),
        dict(out_indices=(2,), gap_before_final_norm=False, use_grn=True, layer_scale_init_value=0.0),
        dict(out_indices=(3,), gap_before_final_norm=False, norm_cfg=dict(type='LN2d', eps=1e-2)),
        dict(out_indices=(3,), gap_before_final_norm=False, stem_patch_size=2),
    ],
)
def test_convnext(options):
    assert_equal_outputs(ConvNeXt, 'ConvNeXt', arch=CONVNEXT, **options)


@pytest.mark.parametrize(
    'options',
    [dict(out_indices=(0, 1, 2, 3)), dict(out_indices=(1, 2)), dict(out_indices=(3,), small_kernel_merged=True)],
)
def test_replknet(options):
    """Theirs normalizes the outputs, whatever ``norm_intermediate_features`` is."""
    assert_equal_outputs(RepLKNet, 'RepLKNet', arch=REPLKNET, norm_intermediate_features=True, **options)
