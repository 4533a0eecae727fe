"""InceptionNeXt: the contract of all backbones, the authors' outputs, and sizes."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from checkpoint_cases import write
from golden_fill import assert_golden, fill, image

from replk_mm.analysis.complexity import count_complexity
from replk_mm.backbones import InceptionNeXt
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.deploy.reparameterize import reparameterize

DATA = Path(__file__).parents[1] / 'data'
TINY = dict(depths=[1, 1, 4, 1], channels=[8, 12, 16, 24], band_kernel=5, branch_ratio=0.25)


class TestInceptionNeXt(BackboneContract):
    cls = InceptionNeXt
    tiny = dict(arch=TINY, layer_scale_init_value=0.5)
    channels = TINY['channels']
    sides = staticmethod(lambda side: [side // 4, side // 8, side // 16, side // 32])
    batch_norm = dict(type='BN')
    frozen = {n: ('stem.', *(f'stages.{i}.' for i in range(n))) if n else ('-',) for n in range(5)}
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    bad = [
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(drop_path_rate=1.0),
        dict(layer_scale_init_value=0.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, band_kernel=4)),
        dict(arch=dict(TINY, branch_ratio=0.4)),
        dict(arch=dict(TINY, branch_ratio=0.1)),
    ]
    others = dict(
        arch='atto',
        in_channels=4,
        norm_cfg=dict(type='BN', eps=1e-2),
        drop_path_rate=0.2,
        layer_scale_init_value=0.0,
        out_indices=(0, 3),
        frozen_stages=1,
        with_cp=True,
        norm_eval=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    @pytest.mark.parametrize('argument', inspect.signature(InceptionNeXt).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    def test_every_norm_is_folded(self):
        model = self.build()
        merged, changes = reparameterize(model)
        assert changes.left == [] and len(changes.folded) == 1 + 3 + 7  # stem, downsampling layers, blocks
        self.assert_equal(merged(self.image()), model(self.image()), 1e-5)


def listed(name: str) -> dict[str, torch.Tensor]:
    """Weights under the names and shapes of a published file, with the values of the golden outputs."""
    weights = {}
    for line in (DATA / 'facts' / f'keys_inceptionnext_{name}.txt').read_text().splitlines():
        key, shape = line.split('\t')
        sides = [int(n) for n in shape.strip('()').split(',') if n.strip()]
        weights[key] = torch.zeros(sides, dtype=torch.float32 if sides else torch.int64)  # of counters
    return fill(weights)


@pytest.mark.parametrize(
    'name', ['atto_official', 'atto_official_imagenet', 'atto_timm', 'tiny_official', 'tiny_timm', 'base_official']
)
def test_files_and_outputs_of_the_authors(name, tmp_path):
    arch = name.partition('_')[0]
    weights = listed(name)
    with torch.device('meta'):
        model = InceptionNeXt(arch).eval()
    dense = {key: value for key, value in weights.items() if not key.startswith('head.')}
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in dense.items()]
    if arch == 'base':
        return
    model.to_empty(device='cpu')
    load_pretrained(model, write(tmp_path / 'weights.pth', weights))
    golden = json.loads((DATA / 'golden' / f'inceptionnext_{arch}.json').read_text())
    x = image(tuple(golden['input']), golden['image_seed'])
    with torch.no_grad():
        for network in (model, reparameterize(model)[0]):
            assert_golden(network(x), golden['features'])


#: Millions of parameters and 10^9 multiply-accumulates at 224x224 of the authors' classifiers of 1000 classes, counted
#: from their code.
COUNTED = {'atto': (4.16, 0.50), 'tiny': (28.06, 4.19), 'small': (49.37, 8.36), 'base': (86.67, 14.84)}


@pytest.mark.parametrize('arch', COUNTED)
def test_parameters_and_macs(arch):
    with torch.device('meta'):
        found = count_complexity(InceptionNeXt(arch), (224, 224))
    width = InceptionNeXt.arch_settings[arch]['channels'][-1]
    head = width * 3 * width + 3 * width * 1000  # two linear layers, and a norm between them
    parameters = found.parameters + head + 3 * 3 * width + 1000
    # the facts have two decimals
    assert parameters / 1e6 == pytest.approx(COUNTED[arch][0], rel=1e-3, abs=5.1e-3)
    assert (found.macs + head) / 1e9 == pytest.approx(COUNTED[arch][1], rel=1e-3, abs=5.1e-3)


@pytest.mark.parametrize(('arch', 'length'), [('atto', 9), ('tiny', 11), ('small', 11), ('base', 11)])
def test_strips_have_the_length_of_the_paper(arch, length):
    with torch.device('meta'):
        state = InceptionNeXt(arch).state_dict()
    assert {tuple(v.shape[2:]) for k, v in state.items() if 'dwconv_w.weight' in k} == {(1, length)}
    assert {tuple(v.shape[2:]) for k, v in state.items() if 'dwconv_h.weight' in k} == {(length, 1)}


def test_initial_weights_are_narrow():
    net = InceptionNeXt(TINY)
    net.init_weights()
    weights = torch.cat([m.weight.flatten() for m in net.modules() if type(m) is torch.nn.Conv2d])
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)
