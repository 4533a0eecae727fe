"""Outputs of the authors' own code, for weights and an image that can be made anywhere."""

import json
from pathlib import Path

import pytest
import torch
from golden_fill import assert_golden, fill, image

from replk_mm.backbones import (
    MSCAN,
    VAN,
    ConvNeXt,
    InternImage,
    MogaNet,
    RDNet,
    RepLKNet,
    SLaK,
    UniRepLKNet,
    build_backbone,
)
from replk_mm.checkpoints.key_formats import to_official
from replk_mm.deploy.reparameterize import reparameterize

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
DENSE = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
NETWORKS = {
    'replknet31b': lambda: RepLKNet('31B'),
    'convnext_tiny': lambda: ConvNeXt('tiny', **DENSE),
    'convnextv2_atto': lambda: ConvNeXt('atto', use_grn=True, layer_scale_init_value=0.0, **DENSE),
    'unireplknet_a': lambda: UniRepLKNet('atto'),
    'unireplknet_a_odd': lambda: UniRepLKNet('atto'),  # sides that 32 does not divide
    'slak_tiny': SLaK,
    'van_b0': lambda: VAN('b0'),
    'van_b0_odd': lambda: VAN('b0'),
    'mscan_t': lambda: MSCAN('t'),
    'rdnet_tiny': RDNet,
    'moganet_xtiny': lambda: MogaNet('xtiny'),
    'moganet_xtiny_odd': lambda: MogaNet('xtiny'),
    'internimage_t': InternImage,
}


@pytest.mark.parametrize('name', NETWORKS)
def test_outputs_of_the_authors(name):
    golden = json.loads((GOLDEN / f'{name}.json').read_text())
    with torch.device('meta'):  # without the seconds of random weights
        model = NETWORKS[name]().eval()
    model.to_empty(device='cpu')
    # Views of the network's own memory; the values follow from the authors' names and shapes.
    fill(to_official(model.state_dict()), golden.get('after_fill_multiply'))
    merged, changes = reparameterize(model)
    assert bool(changes.merged) == name.startswith(('replknet', 'unireplknet', 'slak'))
    for network in [model, merged] if changes.merged or changes.folded else [model]:
        with torch.no_grad():
            outs = network(image(tuple(golden['input']), golden['image_seed']))
        assert_golden(outs, golden['features'])


def test_features_before_the_norm_of_convnextv2_atto():
    golden = json.loads((GOLDEN / 'convnextv2_atto.json').read_text())
    model = build_backbone('convnextv2-atto').eval()
    fill(to_official(model.state_dict()))
    plain: list = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _module, _args, out: plain.append(out))
    with torch.no_grad():
        outs = model(image(tuple(golden['input']), golden['image_seed']))
    assert_golden(outs, golden['features'])
    assert_golden(plain, golden['features_before_norm'])
