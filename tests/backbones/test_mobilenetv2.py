"""MobileNetV2: the contract of all backbones, the outputs of other libraries, closed forms, and merging."""

import inspect
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from checkpoint_cases import write
from mmseg.models.backbones import MobileNetV2 as OfMMSeg
from norms import randomize_norms
from torch import nn

from replk_mm.analysis.complexity import count_complexity, count_parameters
from replk_mm.backbones import MobileNetV2
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.deploy.reparameterize import reparameterize

FACTS = Path(__file__).parents[1] / 'data' / 'facts'
TINY = dict(stem_channels=8, depths=[[1, 1], [2], [1, 3], [2]], channels=[[8, 12], [12], [16, 16], [24]])


def halves(side: int) -> list[int]:
    """Sides of the feature maps: every halving rounds up."""
    return [-(-side // stride) for stride in (4, 8, 16, 32)]


class TestMobileNetV2(BackboneContract):
    cls = MobileNetV2
    tiny = dict(arch=TINY, kernel_size=[3, 7, 5, 9], small_kernel=3)
    channels = [12, 12, 16, 24]
    sides = staticmethod(halves)
    batch_norm = dict(type='BN')
    frozen = {
        0: ('-',),
        1: ('conv1.', 'layer1.', 'layer2.'),
        2: ('conv1.', 'layer1.', 'layer2.', 'layer3.'),
        3: tuple(['conv1.'] + [f'layer{i}.' for i in range(1, 6)]),
        4: ('conv1.', 'layer'),
    }
    # Ten blocks; those that change the shape have no shortcut.
    drop_paths = [0.3 * i / 9 for i in (0, 3, 5, 6, 7, 9)]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    bad = [
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(kernel_size=4),
        dict(kernel_size=[3, 9]),
        dict(small_kernel=9),
        dict(small_kernel=2),
        dict(dilation=2),  # would not be merged with the parallel kernel
        dict(dilation=0, small_kernel=None),
        dict(output_stride=4),
        dict(drop_path_rate=1.0),
        dict(drop_path_rate=0.1, shortcut=False),
        dict(arch=None),
        dict(arch=dict(TINY, widths=1)),
    ]
    others = dict(
        arch='nano',
        kernel_size=13,
        small_kernel=None,
        dilation=2,
        shortcut=False,
        output_stride=8,
        last_channels=32,
        in_channels=4,
        norm_cfg=dict(type='BN', eps=1e-2),
        act_cfg=dict(type='SiLU'),
        drop_path_rate=0.2,
        out_indices=(0, 3),
        frozen_stages=1,
        with_cp=True,
        norm_eval=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    def stages(self, model) -> list[nn.Module]:
        return [getattr(model, name) for names in model.layers for name in names]

    @pytest.mark.parametrize('argument', inspect.signature(MobileNetV2).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    @pytest.mark.parametrize('stride', [8, 16, 32])
    def test_merged(self, stride):
        model = self.build(output_stride=stride, last_channels=32).double()
        merged, changes = reparameterize(model)
        names = [name for name, module in model.named_modules() if hasattr(module, 'small_conv')]
        assert changes.merged == names and len(names) == 8 and changes.left == []  # of ten blocks, two are 3x3
        x = self.image(2, 3, 64, 96).double()
        self.assert_equal(merged(x), model(x), 1e-12)
        convolutions = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == 1 + 2 + 9 * 3 + 1  # stem, a block without expansion, the others, the last one
        assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == len(convolutions) + 8

    @pytest.mark.parametrize('stride', [8, 16])
    def test_dilations_keep_the_features(self, stride):
        """The atrous network computes the same features, on a finer grid."""
        strided, atrous = self.build().double(), self.build(output_stride=stride).double()
        x = self.image(2, 3, 128, 96).double()
        assert [info['reduction'] for info in atrous.feature_info] == [min(s, stride) for s in (4, 8, 16, 32)]
        for expected, found, info in zip(strided(x), atrous(x), atrous.feature_info, strict=True):
            assert found.shape[2] == 128 // info['reduction']
            step = found.shape[2] // expected.shape[2]
            torch.testing.assert_close(found[..., ::step, ::step], expected, rtol=0, atol=1e-10)


def of_mmseg() -> tuple[nn.Module, torch.Tensor]:
    """mmsegmentation's network with random weights and statistics, in float64, and an image."""
    torch.manual_seed(0)
    theirs = OfMMSeg()
    theirs.init_weights()
    theirs.eval()  # returns None
    return randomize_norms(theirs).double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)


def assert_outputs(model: nn.Module, theirs: nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = theirs(image), model.double().eval()(image)
    assert len(expected) == len(found) == 4
    for a, b in zip(expected, found, strict=True):
        assert a.std() > 1e-3
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10 * a.abs().max().item())


@pytest.mark.parametrize('shortcut', [True, False])
def test_outputs_of_mmsegmentation(shortcut):
    theirs, image = of_mmseg()
    for module in theirs.modules():
        if hasattr(module, 'use_res_connect'):
            module.use_res_connect &= shortcut
    model = MobileNetV2(shortcut=shortcut)
    model.load_state_dict(theirs.state_dict())
    assert_outputs(model, theirs, image)


@pytest.mark.parametrize(('size', 'dilation'), [(9, 1), (13, 1), (7, 3), (13, 6)])
def test_kernels_of_other_sizes(size, dilation):
    """A large kernel whose taps are zero but for nine computes what a 3x3 kernel does; so does a dilated 3x3 kernel."""
    theirs, image = of_mmseg()
    weights = theirs.state_dict()
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.dilation, module.padding = (dilation, dilation), (dilation, dilation)
    small = MobileNetV2(dilation=dilation)
    small.load_state_dict(weights)
    assert_outputs(small, theirs, image)
    large = MobileNetV2(kernel_size=size)
    for key, value in weights.items():
        if value.dim() == 4 and value.shape[1] == 1:
            middle = size // 2
            taps = slice(middle - dilation, middle + dilation + 1, dilation)
            weights[key] = value.new_zeros(len(value), 1, size, size)
            weights[key][:, :, taps, taps] = value
    large.load_state_dict(weights)
    assert_outputs(large, theirs, image)


#: Side of the output at 224x224 and channels of the depthwise convolutions of the 17 blocks.
DEPTHWISE = (
    [(112, 32), (56, 96), (56, 144), (28, 144), *[(28, 192)] * 2]
    + [(14, 192), *[(14, 384)] * 4, *[(14, 576)] * 2, (7, 576), *[(7, 960)] * 3]
)  # fmt: skip


@pytest.mark.parametrize('kernel', [3, 7, 9, 13])
@pytest.mark.parametrize('last', [False, True])
def test_parameters_and_macs(kernel, last):
    """Of the classifier of 1000 classes: torchvision's 3,504,872 parameters and 0.30 G, and what the kernels add."""
    layers = DEPTHWISE[-4:] if last else DEPTHWISE
    taps = kernel**2 - 9
    parameters = 3_504_872 + taps * sum(width for _, width in layers)
    macs = taps * sum(side**2 * width for side, width in layers)
    with torch.device('meta'):
        model = MobileNetV2(kernel_size=[3, 3, 3, kernel] if last else kernel, last_channels=1280)
    assert count_parameters(model) + 1281 * 1000 == parameters
    standard = 300_774_272  # of all convolutions and the classifier
    assert count_complexity(model, (224, 224)).macs + 1280 * 1000 == standard + macs
    assert round(standard / 1e9, 2) == 0.30 and round(parameters / 1e6, 2) in (
        [3.5, 3.64, 3.75, 4.06] if last else [3.5, 3.79, 4.02, 4.65]
    )


@pytest.mark.parametrize('name', ['mmpretrain', 'torchvision', 'timm'])
def test_key_names(name, tmp_path):
    """The published lists have the same tensors in the same order."""
    lines = (FACTS / f'keys_mobilenetv2_{name}.txt').read_text().splitlines()
    shapes = {key: [int(n) for n in s.strip('()').split(',') if n.strip()] for key, s in (x.split('\t') for x in lines)}
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(shape, generator=generator) if shape else torch.tensor(i)
        for i, (key, shape) in enumerate(shapes.items())
    }
    path = write(tmp_path / 'weights.pth', weights)
    for model in (MobileNetV2(), MobileNetV2(last_channels=1280)):
        report = load_pretrained(model, path)
        assert report.missing == report.unexpected == report.mismatched == []
        for found, expected in zip(model.state_dict().values(), weights.values(), strict=False):
            assert torch.equal(found, expected)
    assert len(model.state_dict()) == len(weights) - 2  # the classifier


@pytest.mark.parametrize(
    'library', [pytest.param(name, marks=pytest.mark.extras(name)) for name in ('mmpretrain', 'torchvision', 'timm')]
)
def test_outputs_of_libraries(library, tmp_path):
    if library == 'mmpretrain':
        from mmpretrain.models import MobileNetV2 as Theirs

        theirs: nn.Module = Theirs()
        features = lambda x: theirs(x)[0]  # noqa: E731
    elif library == 'torchvision':
        from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

        from replk_mm.backbones.catalogue import find_backbone

        theirs = mobilenet_v2(weights=None)
        features = theirs.features
        assert find_backbone('mobilenetv2-100.tv2-in1k')[1].url == MobileNet_V2_Weights.IMAGENET1K_V2.url
    else:
        import timm

        theirs = timm.create_model('mobilenetv2_100', pretrained=False)
        features = theirs.forward_features
    theirs.eval()
    randomize_norms(theirs).double()
    model = MobileNetV2(last_channels=1280, out_indices=(3,)).double()
    report = load_pretrained(model, write(tmp_path / 'weights.pth', theirs.state_dict()))
    assert report.missing == report.unexpected == report.mismatched == []
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected, (found,) = features(image), model.eval()(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
