"""Outputs of the authors' own code, for weights and an image that can be made anywhere."""
import importlib.util
import json

import pytest
import torch

from replk_mm.key_formats import to_official
from replk_mm.models import ConvNeXt, RepLKNet
from replk_mm.reparam import reparameterize

NETWORKS = {
    'replknet31b': lambda: RepLKNet('31B'),
    'convnext_tiny': lambda: ConvNeXt('tiny', out_indices=(0, 1, 2, 3), gap_before_final_norm=False),
}


@pytest.fixture(scope='module')
def filler(reference):
    spec = importlib.util.spec_from_file_location('golden_fill', reference / 'golden' / 'fill.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', NETWORKS)
def test_outputs_of_the_authors(name, filler, reference):
    golden = json.loads((reference / 'golden' / f'{name}.json').read_text())
    model = NETWORKS[name]().eval()
    own = model.state_dict()
    # The values follow from the authors' names.
    filled = filler.fill({key: value.clone() for key, value in to_official(own).items()})
    model.load_state_dict(dict(zip(own, filled.values(), strict=True)))
    networks = [model] if name == 'convnext_tiny' else [model, reparameterize(model)[0]]
    image = filler.image(tuple(golden['input']), golden['image_seed'])
    for network in networks:
        with torch.no_grad():
            outs = network(image)
        assert len(outs) == len(golden['features'])
        for out, expected in zip(outs, golden['features'], strict=True):
            found = filler.digest(out)
            assert found['shape'] == expected['shape']
            scale = max(map(abs, expected['samples']))
            assert found['samples'] == pytest.approx(expected['samples'], rel=0, abs=1e-5 * scale)
            assert found['mean'] == pytest.approx(expected['mean'], rel=0, abs=1e-5 * expected['std'])
            assert found['std'] == pytest.approx(expected['std'], rel=1e-5)
