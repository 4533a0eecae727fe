"""Key formats of checkpoints: every published format is detected and loads completely."""

import re
from pathlib import Path

import pytest
import torch
from checkpoint_cases import CONV, DENSE, TINY, assert_same, write
from norms import randomize_norms
from torch import nn

from replk_mm.backbones import ConvNeXt, InternImage, MogaNet, RDNet, RepLKNet, SLaK, UniRepLKNet, build_backbone
from replk_mm.checkpoints.key_formats import find_weights, to_official
from replk_mm.checkpoints.loading import copy_weights, load_pretrained
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError

#: Names and shapes in published files.
FACTS = Path(__file__).parents[1] / 'data' / 'facts'


def empty(build) -> nn.Module:
    """A large network without the seconds of its initialization."""
    with torch.device('meta'):
        model = build()
    model.to_empty(device='cpu')
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(-1)
    return model


def listed(name: str) -> dict[str, torch.Tensor]:
    """A state dict of published keys and shapes. Every weight is constant, its place in the list: a small file."""
    weights = {}
    for number, line in enumerate((FACTS / f'keys_{name}.txt').read_text().splitlines(), 1):
        key, shape = line.split('\t')
        shape = tuple(int(n) for n in shape.strip('()').split(',') if n.strip())
        weights[key] = torch.tensor(float(number)).expand(shape)
    assert len(weights) > 100
    return weights


# Written by hand: what becomes of some keys of each list. '=' is the same name.
PLACES = {
    'replknet31b_official': [
        '=stem.3.bn.running_var',
        '=stages.2.blocks.34.large_kernel.small_conv.conv.weight',
        '=transitions.1.1.bn.bias',
        '=stages.3.blocks.3.preffn_bn.running_mean',
    ],
    'replknet31b_official_merged': ['=stem.3.bn.running_var', '=stages.2.blocks.34.large_kernel.lkb_reparam.weight'],
    'replknetxl_official': ['=stages.0.norm.weight', '=stages.1.blocks.2.large_kernel.lkb_origin.bn.bias'],
    'unireplknet_a_official': [
        '=downsample_layers.0.3.weight',
        '=stages.2.4.dwconv.dil_bn_k7_2.running_mean',
        '=stages.0.1.act.1.beta',
        '=stages.3.1.pwconv2.2.bias',
        '=norm3.bias',
    ],
    'unireplknet_a_official_merged': ['=stages.3.0.dwconv.lk_origin.bias', '=stages.1.1.act.1.gamma'],
    'convnext_tiny_official': [
        'stages.2.8.pwconv1.weight=stages.2.8.pointwise_conv1.weight',
        '=stages.0.1.gamma',
        '=norm3.bias',
        'stages.0.0.dwconv.bias=stages.0.0.depthwise_conv.bias',
        '=downsample_layers.2.1.weight',
    ],
    'convnext_tiny_mmpretrain': [
        'backbone.stages.2.8.pointwise_conv1.weight=stages.2.8.pointwise_conv1.weight',
        'backbone.norm0.bias=norm0.bias',
    ],
    'convnext_tiny_timm': [
        'stem.0.weight=downsample_layers.0.0.weight',
        'stem.1.bias=downsample_layers.0.1.bias',
        'stages.1.downsample.0.weight=downsample_layers.1.0.weight',
        'stages.3.downsample.1.bias=downsample_layers.3.1.bias',
        'stages.2.blocks.8.mlp.fc2.weight=stages.2.8.pointwise_conv2.weight',
        'stages.0.blocks.2.gamma=stages.0.2.gamma',
        'stages.0.blocks.0.conv_dw.weight=stages.0.0.depthwise_conv.weight',
        'head.norm.weight=norm3.weight',
    ],
    'slak_tiny_official': [
        '=stages.2.8.large_kernel.LoRA2.bn.running_var',
        '=stages.0.0.large_kernel.small_conv.conv.weight',
        '=stages.1.2.pwconv2.bias',
        '=norm0.bias',
    ],
    'slak_tiny_k31_undecomposed_official': ['=stages.2.8.large_kernel.lkb_origin.conv.weight', '=stages.3.2.gamma'],
    'moganet_xtiny_official': [
        '=patch_embed1.projection.4.running_var',
        '=blocks3.9.attn.value.DW_conv2.weight',
        '=blocks1.0.layer_scale_1',
        '=norm3.bias',
    ],
    'moganet_xlarge_official': ['=blocks4.3.mlp.sigma.scale', '=norm4.running_mean'],
    'rdnet_tiny_official': ['=stem.stem.1.weight', '=dense_stages.5.2.dense_block2.layers.layers.5.fc.weight'],
    'rdnet_tiny_timm': ['stem.0.weight=stem.stem.0.weight', '=dense_stages.6.1.weight'],
    'slak_base_official': ['=stages.2.26.large_kernel.LoRA1.conv.weight', '=norm3.weight'],
    'internimage_t_official': ['=levels.2.blocks.17.dcn.dw_conv.1.1.bias', '=levels.3.norm.0.weight'],
    'internimage_s_official': ['=levels.0.downsample.norm.1.weight', '=patch_embed.norm2.1.bias'],
}
#: Weights of the published classifiers that are in no backbone.
CLASSIFIERS = {'convnext_tiny_timm': r'head\.fc\.', 'rdnet_tiny_timm': r'head\.'}
BUILD = {
    'replknet31b_official': lambda: RepLKNet('31B'),
    'replknet31b_official_merged': lambda: RepLKNet('31B', small_kernel_merged=True),
    'replknetxl_official': lambda: RepLKNet('XL', norm_intermediate_features=True),
    'unireplknet_a_official': lambda: UniRepLKNet('atto'),
    'unireplknet_a_official_merged': lambda: UniRepLKNet('atto', deploy=True),
    'convnext_tiny_official': lambda: ConvNeXt('tiny', **DENSE),
    'convnext_tiny_mmpretrain': lambda: ConvNeXt('tiny', **DENSE),
    'convnext_tiny_timm': lambda: ConvNeXt('tiny', **DENSE),
    'slak_tiny_official': SLaK,
    'slak_tiny_k31_undecomposed_official': lambda: SLaK(
        dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768]), [31, 29, 27, 13], decomposed=False
    ),
    'moganet_xtiny_official': lambda: MogaNet('xtiny'),
    'moganet_xlarge_official': lambda: MogaNet('xlarge'),
    'rdnet_tiny_official': RDNet,
    'rdnet_tiny_timm': RDNet,
    'slak_base_official': lambda: SLaK('base'),
    'internimage_t_official': InternImage,
    'internimage_s_official': lambda: InternImage('small'),
}


#: Networks of the lists: name in the catalogue and arguments, by the beginning of the list's name.
NETWORKS = {
    'replknet31b_official_merged': ('replknet-31b', dict(small_kernel_merged=True)),
    'replknet31b': ('replknet-31b', {}),
    'replknetxl': ('replknet-xl', {}),
    'unireplknet_a_official_merged': ('unireplknet-a', dict(deploy=True)),
    'unireplknet_t_official_merged': ('unireplknet-t', dict(deploy=True)),
    'slak_tiny_k31': (
        'slak-tiny',
        dict(decomposed=False, kernel_size=[31, 29, 27, 13], arch=ConvNeXt.arch_settings['tiny']),
    ),
    'slak_tiny_merged': ('slak-tiny', dict(decomposed=False, small_kernel_merged=True)),  # one dense kernel
    'upernet_convnext_tiny': ('convnext-tiny', {}),
    **{
        f'{name}_{size}': (f'{name}-{size}', {})
        for name, size in (
            ('convnext', 'tiny'),
            ('convnextv2', 'atto'),
            ('convnextv2', 'base'),
            ('slak', 'tiny'),
            ('slak', 'base'),
            ('unireplknet', 'a'),
            ('unireplknet', 't'),
            ('unireplknet', 'xl'),
        )
    },
}
FAMILIES = ('convnext', 'replknet', 'slak', 'unireplknet', 'upernet_convnext')
LISTS = [path.stem.removeprefix('keys_') for path in sorted(FACTS.glob('keys_*.txt'))]
#: Linear layers of classifiers, and heads.
HEADS = re.compile(r'head\.(fc\.|weight|bias)|classifier\.(2\.|weight|bias)|(decode|auxiliary)_head\.')


@pytest.mark.parametrize('name', [name for name in LISTS if name.startswith(FAMILIES)])
def test_every_key_of_every_list_is_used(name):
    """Names and shapes only: the network has no values."""
    backbone, arguments = next(network for start, network in NETWORKS.items() if name.startswith(start))
    with torch.device('meta'):
        model = build_backbone(backbone, **arguments)
    weights = {key: torch.zeros(()).expand(value.shape) for key, value in listed(name).items()}
    found = find_weights(weights, model)
    report = copy_weights(model, found.backbone, parts=False)
    assert report.unexpected == report.mismatched == []
    assert [key for key in report.missing if not re.match(r'norm\d\.', key)] == []  # which classifiers lack
    assert all(HEADS.match(key) for key in (*found.rest, *found.unused))
    used = [key for key in weights if not HEADS.match(key)]
    # DINOv3 stores its last norm twice.
    assert report.matched['backbone'] == len(used) - 2 * name.endswith('dinov3_official') > 100


@pytest.mark.parametrize('name', PLACES)
def test_published_formats_load_whole(name, tmp_path):
    weights = listed(name)
    path = write(tmp_path / 'weights.pth', {'model': weights})
    large = name in (
        'replknetxl_official',
        'slak_base_official',
        'moganet_xlarge_official',
    )  # 1.3 GB: names and shapes only
    with torch.device('meta' if large else 'cpu'):
        model = BUILD[name]() if large else empty(BUILD[name])
    report = load_pretrained(model, path)
    assert report.unexpected == report.missing == report.mismatched == []
    own = model.state_dict()
    classifier = {key for key in weights if re.match(CLASSIFIERS.get(name, '-'), key)}
    assert bool(classifier) == (name in CLASSIFIERS)
    assert report.matched == {'backbone': len(weights) - len(classifier)}
    if large:
        assert set(PLACES[name]) <= {f'={key}' for key in own.keys() & weights.keys()}
        return
    # Every weight of the file is in the network once: their constants are all different.
    values = {value.flatten()[0].item() for value in own.values()}
    assert all((value == value.flatten()[0]).all() for key, value in own.items() if value.numel() < 1e6)
    unset = {'convnext_tiny_timm': {f'norm{i}.{end}' for i in range(3) for end in ('weight', 'bias')}}.get(name, set())
    assert {key for key, value in own.items() if value.flatten()[0] == -1} == unset
    assert values - {-1.0} == {value.flatten()[0].item() for key, value in weights.items() if key not in classifier}
    for place in PLACES[name]:
        theirs, ours = place.split('=')
        assert own[ours].flatten()[0] == weights[theirs or ours].flatten()[0], place


def test_classifier_is_reported():
    found = find_weights(listed('convnext_tiny_timm'))
    assert found.unused == ['head.fc.weight', 'head.fc.bias']
    assert found.describe() == 'ConvNeXt, timm key names, not used: head.fc.weight, head.fc.bias'
    imagenet = {
        **listed('replknet31b_official'),
        'norm.weight': torch.ones(1024),
        'head.weight': torch.ones(1),
        'head.bias': torch.ones(1),
    }
    found = find_weights(imagenet)
    assert sorted(found.unused) == ['head.bias', 'head.weight', 'norm.weight'] and found.format == 'official'


@pytest.mark.parametrize(
    'name, family, form, merged',
    [
        ('replknet31b_official', 'RepLKNet', 'official', False),
        ('replknet31b_official_merged', 'RepLKNet', 'official', True),
        ('unireplknet_a_official', 'UniRepLKNet', 'official', False),
        ('unireplknet_a_official_merged', 'UniRepLKNet', 'official', True),
        ('convnext_tiny_official', 'ConvNeXt', 'official', False),
        ('convnext_tiny_timm', 'ConvNeXt', 'timm', False),
        ('convnext_tiny_mmpretrain', 'ConvNeXt', 'mmpretrain', False),
        ('slak_tiny_official', 'SLaK', 'official', False),
        ('rdnet_tiny_official', 'RDNet', 'official', False),
        ('rdnet_tiny_timm', 'RDNet', 'timm', False),
        ('moganet_xtiny_official', 'MogaNet', 'official', False),
        ('slak_tiny_k31_undecomposed_official', 'SLaK', 'official', False),
        ('van_b0_official', 'VAN', 'official', False),
        ('van_b0_mmpretrain', 'VAN', 'mmpretrain', False),
        ('van_b0_transformers', 'VAN', 'transformers', False),
        ('mscan_t_official', 'MSCAN', 'official', False),
        ('mscan_t_mmseg', 'MSCAN', 'mmsegmentation', False),
    ],
)
def test_formats_are_detected(name, family, form, merged):
    weights = listed(name)
    for file in (weights, dict(reversed(weights.items()))):
        found = find_weights(file)
        assert (found.family, found.format, found.merged) == (family, form, merged)
    assert found.prefix == {'mmpretrain': 'backbone.', 'transformers': 'van.'}.get(form, '')


def test_classifiers_of_unireplknet(tmp_path):
    """The final norm is one of the classifier: those of the features start as the identity, as in the authors' code."""
    theirs = listed('unireplknet_a_official')
    theirs = {key: value for key, value in theirs.items() if not key.startswith('norm')}
    classifier = dict.fromkeys(('norm.weight', 'norm.bias', 'head.weight', 'head.bias'), torch.zeros(320))
    model = UniRepLKNet('atto')
    report = load_pretrained(model, write(tmp_path / 'a.pth', {'model': {**theirs, **classifier}}))
    assert report.matched == {'backbone': len(theirs)} and (model.norm3.weight == 1).all()
    with pytest.raises(UserError, match='(?s)missing.*Compare arch.* deploy'):  # a merged file, another form
        load_pretrained(model, write(tmp_path / 'b.pth', listed('unireplknet_a_official_merged')))


@pytest.mark.parametrize('family', ['replknet31b', 'unireplknet_a', 'convnext_tiny', 'slak_tiny'])
def test_to_official_round_trip(family):
    theirs = listed(f'{family}_official')
    ours = find_weights(theirs).backbone
    back = to_official(ours)
    assert list(back) == list(theirs) and all(back[key] is theirs[key] for key in theirs)
    again = find_weights(back).backbone
    assert list(again) == list(ours) and all(again[key] is ours[key] for key in ours)


def test_linear_and_convolution(tmp_path):
    linear = ConvNeXt(CONV, **DENSE)
    conv = ConvNeXt(CONV, linear_pw_conv=False, **DENSE)
    for source, target in ((linear, conv), (conv, linear)):
        for value in source.parameters():
            nn.init.normal_(value)
        load_pretrained(target, write(tmp_path / 'a.pth', to_official(source.state_dict())))
        assert all(torch.equal(v.flatten(), source.state_dict()[k].flatten()) for k, v in target.state_dict().items())


def test_strips_of_the_other_direction_do_not_fit(tmp_path):
    weights = build_backbone('mscan-t').state_dict()
    key = 'block1.0.attn.spatial_gating_unit.conv0_1.weight'
    weights[key] = weights[key].transpose(2, 3)
    with pytest.raises(UserError, match=r'model \(32, 1, 1, 7\), checkpoint \(32, 1, 7, 1\)'):
        build_backbone('mscan-t', pretrained=write(tmp_path / 'a.pth', weights))


def test_a_file_of_another_family_does_not_fit_a_network_of_another_library(tmp_path):
    path = write(tmp_path / 'a.pth', ConvNeXt(CONV, **DENSE).state_dict())
    with pytest.raises(UserError, match='does not fit MSCAN'):
        build_backbone('mmseg.MSCAN', pretrained=path)


def test_version_2_of_the_authors(tmp_path):
    """Global response norm as (1, 1, 1, C), no layer scale, classifier with its norm."""
    source = ConvNeXt(CONV, use_grn=True, layer_scale_init_value=0.0)
    for value in source.parameters():
        nn.init.normal_(value)
    ours = source.state_dict()
    theirs = {k: v.view(1, 1, 1, -1) if '.grn.' in k else v for k, v in to_official(ours).items()}
    theirs = {k.replace('norm3.', 'norm.') if k.startswith('norm3.') else k: v for k, v in theirs.items()}
    theirs |= {'head.weight': torch.ones(10, 24), 'head.bias': torch.ones(10)}
    model = ConvNeXt(CONV, use_grn=True, layer_scale_init_value=0.0)
    report = load_pretrained(model, write(tmp_path / 'a.pth', {'model': theirs}))
    assert report.matched['backbone'] == len(ours)
    assert_same(model, ours)


SLAK = dict(arch=CONV, kernel_size=[13, 11, 9, 7], layer_scale_init_value=1.0)


@pytest.mark.parametrize(
    'cls, kwargs',
    [
        (RepLKNet, dict(arch=TINY)),
        (RepLKNet, dict(arch=TINY, norm_cfg=dict(type='BN', eps=1e-2))),
        (RepLKNet, dict(arch=dict(TINY, small_kernel=None))),
        (SLaK, SLAK),
        (SLaK, dict(SLAK, decomposed=False)),
    ],
    ids=str,
)
def test_merged_file_into_either_form(cls, kwargs, tmp_path):
    merged, _ = reparameterize(randomize_norms(cls(**kwargs)), fold=False)
    weights = merged.state_dict()
    assert find_weights(weights).family == cls.__name__
    path = write(tmp_path / 'merged.pth', {'model': weights})
    x = torch.randn(2, 3, 64, 64)
    expected = merged(x)
    for seed, form in ((3, True), (4, False)):
        model = randomize_norms(cls(**kwargs, small_kernel_merged=form), seed)
        report = load_pretrained(model, path)
        assert report.missing == report.unexpected == report.mismatched == []
        for a, b in zip(model.eval()(x), expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert not any('lkb_reparam' in name for name in model.state_dict())
    sum(o.mean() for o in model.train()(x)).backward()  # and it trains


def test_imagenet_file_of_slak(tmp_path):
    """The final norm of a classifier is that of the last stage; its head is not used."""
    source = SLaK(**SLAK).state_dict()
    file = {key.replace('norm3.', 'norm.'): value for key, value in source.items() if key[:5] not in ('norm0', 'norm1')}
    file |= {'head.weight': torch.ones(10, 24), 'head.bias': torch.ones(10)}
    model = SLaK(**SLAK)
    report = load_pretrained(model, write(tmp_path / 'a.pth', {'model': file}))
    assert report.missing == report.unexpected == [] and report.matched['backbone'] == len(source) - 4
    assert_same(model, source)
