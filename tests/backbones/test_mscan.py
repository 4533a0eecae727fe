"""MSCAN: its contract, keys of the authors, and outputs of mmsegmentation's."""

import pytest
import torch
from norms import randomize_norms
from van_contract import VANContract, assert_keys

from replk_mm.backbones import MSCAN


class TestMSCAN(VANContract):
    cls = MSCAN


@pytest.mark.parametrize('arch', ['t', 'l'])
def test_keys_and_shapes_of_the_authors(arch):
    assert_keys(MSCAN, arch, f'mscan_{arch}')


@pytest.mark.parametrize('height, width', [(64, 96), (61, 37)])
def test_outputs_are_those_of_mmsegmentation(height, width):
    from mmseg.models import MSCAN as Theirs

    torch.manual_seed(0)
    theirs = Theirs(embed_dims=[8, 12, 16, 24], mlp_ratios=[8, 8, 4, 4], depths=[1, 2, 1, 1], norm_cfg=dict(type='BN'))
    theirs.eval()  # theirs returns None
    with torch.no_grad():
        for name, value in randomize_norms(theirs).named_parameters():
            if 'layer_scale' in name:
                value.fill_(0.5)  # the initial one would hide the blocks
    ours = MSCAN(dict(depths=[1, 2, 1, 1], channels=[8, 12, 16, 24])).eval()
    weights = {key.replace('.mlp.dwconv.', '.mlp.dwconv.dwconv.'): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    image = torch.randn(2, 3, height, width)
    with torch.no_grad():
        for found, expected in zip(ours(image), theirs(image), strict=True):
            assert expected.std() > 1e-2
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
