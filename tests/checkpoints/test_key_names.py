"""Key names of other libraries: published lists and maps, and outputs of the authors' code after loading."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_cases import DENSE
from golden_fill import assert_golden, fill, image
from torch import nn

from replk_mm.backbones import MSCAN, VAN, ConvNeXt, RDNet
from replk_mm.checkpoints.key_formats import to_official
from replk_mm.checkpoints.loading import load_pretrained

DATA = Path(__file__).parents[1] / 'data'
MAPS = yaml.safe_load((DATA / 'facts' / 'key_maps.yaml').read_text())
NETWORKS = {
    'convnext_tiny': lambda: ConvNeXt('tiny', **DENSE),
    'convnextv2_atto': lambda: ConvNeXt('atto', use_grn=True, layer_scale_init_value=0.0, **DENSE),
    'van_b0': lambda: VAN('b0'),
    'mscan_t': lambda: MSCAN('t'),
    'rdnet_tiny': RDNet,
}
V1, V2 = MAPS['convnext_v1'], MAPS['convnext_v2']
# Maps of the authors' ImageNet names; None where the authors' names stay.
LIBRARIES = {
    'convnext_tiny_torchvision': V1['torchvision'],
    'convnext_tiny_timm': V2['timm'],
    'convnext_tiny_transformers': V1['transformers'],
    'convnext_tiny_transformers_backbone': [
        ['^norm3\\.', 'hidden_states_norms.stage4.'],
        *([f'^norm{i}\\.', f'hidden_states_norms.stage{i + 1}.'] for i in range(3)),
        *V1['transformers'],
        ['^convnext\\.', ''],
    ],
    'convnext_tiny_dinov3_transformers': V1['dinov3_transformers'],
    'convnext_tiny_dinov3_official': [],
    'convnextv2_atto_official': [],
    'convnextv2_atto_official_imagenet': [],
    'convnextv2_atto_timm': V2['timm'],
    'convnextv2_atto_mmpretrain': V2['mmpretrain'],
    'convnextv2_atto_transformers': V2['transformers'],
    'convnextv2_atto_transformers_backbone': [
        *([f'^norm{i}\\.', f'hidden_states_norms.stage{i + 1}.'] for i in range(4)),
        *V2['transformers'],
        ['^convnextv2\\.', ''],
    ],
    'van_b0_official': [],
    'van_b0_mmpretrain': MAPS['van']['mmpretrain'],
    'van_b0_transformers': MAPS['van']['transformers'],
    'mscan_t_official': [],
    'mscan_t_mmseg': MAPS['mscan']['mmsegmentation'],
    'rdnet_tiny_official_imagenet': [],
    'rdnet_tiny_timm': MAPS['rdnet']['timm'],
}


def golden(network: str) -> dict:
    return json.loads((DATA / 'golden' / f'{network}.json').read_text())


@cache
def filled(network: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The network, and weights that follow from the authors' names and shapes, under those names."""
    with torch.device('meta'):
        model = NETWORKS[network]().eval()
    model.to_empty(device='cpu')
    weights = fill(to_official(model.state_dict()), golden(network).get('after_fill_multiply'))
    return model, {key: value.clone() for key, value in weights.items()}


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    lines = (DATA / 'facts' / f'keys_{name}.txt').read_text().splitlines()
    return {key: tuple(map(int, re.findall(r'\d+', shape))) for key, shape in (line.split('\t') for line in lines)}


@pytest.mark.parametrize('name', LIBRARIES)
def test_outputs_after_loading(name, monkeypatch):
    network = '_'.join(name.split('_')[:2])
    model, official = filled(network)
    shapes, file = published_shapes(name), {}
    for key, value in official.items():
        if network.startswith('convnext') and not name.endswith(('backbone', 'atto_official')):  # of classifiers
            key = re.sub(r'^norm3\.', 'norm.', key)
        for pattern, replacement in LIBRARIES[name]:
            key = re.sub(pattern, replacement, key)
        if key in shapes:
            file[key] = value.reshape(shapes[key])
    if 'dinov3_official' in name:
        file |= {f'norms.3.{end}': file[f'norm.{end}'] for end in ('weight', 'bias')}
    classifier = {
        key: torch.zeros(shapes[key]) for key in shapes if re.match(r'head\.|classifier\.|van\.layernorm', key)
    }
    file = {**classifier, **file}  # the norm of some classifiers is one of both
    assert file.keys() == shapes.keys(), 'the test renames as the library does'

    monkeypatch.setattr('replk_mm.checkpoints.loading.read_checkpoint', lambda _: file)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            # Files of classifiers have no norms of the first three stages.
            given = re.match('norm[012]', key) and network.startswith('convnext')
            value.copy_(official[key]) if given else value.fill_(torch.nan if value.is_floating_point() else -1)
        load_pretrained(model, 'file')
        expected = golden(network)
        outs = model(image(tuple(expected['input']), expected['image_seed']))
    assert_golden(outs, expected['features'])
