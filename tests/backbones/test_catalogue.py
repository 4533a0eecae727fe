"""The catalogue: names, weights, recipes and sizes against published facts; networks by name."""

import copy
import itertools
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import yaml
from mmengine.config import Config
from mmengine.runner.checkpoint import get_mmcls_models

from replk_mm import published
from replk_mm.analysis.benchmark.case import randomize_constants
from replk_mm.analysis.complexity import count_complexity, reparameterize_on_meta
from replk_mm.backbones import ConvNeXtRoadmap, RepLKNet, build_backbone, list_backbones
from replk_mm.backbones.catalogue import find_backbone, measure_features, recipe_of, weights_by_url
from replk_mm.checkpoints.io import DownloadError
from replk_mm.checkpoints.key_formats import to_official
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError
from replk_mm.registry import MODELS

ROOT = Path(__file__).parents[2]
DATA = ROOT / 'tests' / 'data' / 'facts'
FACTS, MORE = (yaml.safe_load((DATA / f'{name}.yaml').read_text()) for name in ('published', 'published_more'))
COMPUTED = MORE['computed_here']
#: Variants of which the parameters and MACs of a whole classifier are known: side of the image, name in the facts.
COUNTED = [
    *((name, 224, f'ConvNeXtV2-{name.rpartition("-")[2][0].upper()}') for name in list_backbones('convnextv2')),
    *((f'unireplknet-{short}', 224, f'UniRepLKNet-{short.upper()} deploy') for short in 'afpnt'),
    *((f'unireplknet-{short}', 384, f'UniRepLKNet-{short.upper()} deploy') for short in ('s', 'b', 'l', 'xl')),
    ('unireplknet-s', 224, 'UniRepLKNet-S training'),
    *((f'slak-{arch}', 224, f'SLaK-{arch[0].upper()} dense') for arch in ('tiny', 'small', 'base')),
    *((f'mscan-{arch}', 224, f'MSCAN-{arch.upper()} backbone only') for arch in 'tsbl'),
    *((f'van-b{i}', 224, f'VAN-B{i}') for i in range(7)),
    *((name, 224, find_backbone(name)[0].paper_name) for name in list_backbones('moganet') + list_backbones('rdnet')),
]


def test_names():
    assert list_backbones('replknet*') == ['replknet-nano', 'replknet-31b', 'replknet-31l', 'replknet-xl']
    assert list_backbones('unirep*') == [f'unireplknet-{v}' for v in ('a', 'f', 'p', 'n', 't', 's', 'b', 'l', 'xl')]
    assert list_backbones('inceptionnext') == [f'inceptionnext-{v}' for v in ('atto', 'tiny', 'small', 'base')]
    assert list_backbones('mscan') == [f'mscan-{v}' for v in ('t', 's', 'b', 'l')]
    assert list_backbones('van') == [f'van-b{i}' for i in range(7)]
    assert list_backbones('moganet') == [f'moganet-{v}' for v in ('xtiny', 'tiny', 'small', 'base', 'large', 'xlarge')]
    assert list_backbones('rdnet') == [f'rdnet-{v}' for v in ('tiny', 'small', 'base', 'large')]
    assert list_backbones('overlock') == [f'overlock-{v}' for v in ('xt', 't', 's', 'b')]
    assert list_backbones('mobilenetv2') == [f'mobilenetv2-{v}' for v in ('nano', '100', '100-k9', '100-k13')]
    assert list_backbones('slak') == ['slak-tiny', 'slak-small', 'slak-base']
    assert list_backbones('internimage') == [f'internimage-{v}' for v in ('t', 's', 'b', 'l', 'xl')]
    assert list_backbones('roadmap') == [f'roadmap-{a}' for a in ConvNeXtRoadmap.arch_settings if a[:3] != '200']
    v1 = ['atto', 'nano', 'tiny', 'small', 'base', 'large', 'xlarge']
    assert list_backbones('convnext-*') == [f'convnext-{arch}' for arch in v1]
    v2 = ['atto', 'femto', 'pico', 'nano', 'tiny', 'base', 'large', 'huge']
    assert list_backbones('convnextv2') == [f'convnextv2-{arch}' for arch in v2]
    for name, tag in (('convnext-base', 'in22k'), ('convnextv2-base', 'fcmae-in1k'), ('replknet-xl', 'meg73m')):
        entry, weights = find_backbone(f'{name}.{tag}')
        assert entry.full_name(weights) == f'{name}.{tag}' and find_backbone(name) == (entry, None)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('convnext-tinny', 'Did you mean convnext-tiny'),
        ('convnext-tiny.in21k', 'convnext-tiny.in1k'),
        ('convnext-nano.in1k', 'Known weights: none'),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        build_backbone(name)


def published_urls() -> set[str]:
    """The addresses in the facts, with their lists in braces written out."""
    urls = set()
    for entry in (*FACTS['weights'], *MORE['weights']):
        links = entry['url'] if isinstance(entry['url'], list) else [entry['url']]
        if 'files' in entry:
            links = [f'{links[0].replace("/tree/", "/resolve/")}/{file}' for file in entry['files']]
        for text in (part for link in links for part in re.split(r', (?=https|\w+_)| and ', link)):
            parts = [part.split(',') for part in re.split(r'[{}]', text)]
            folder = '' if text.startswith('https:') else f'{links[0].rpartition("/")[0]}/'
            urls |= {folder + ''.join(choice) for choice in itertools.product(*parts)}
    return urls | {url.replace('https://huggingface.co/', 'hf-hub:') for url in urls if '/resolve/' not in url}


def test_weights_are_those_of_the_authors():
    known = published_urls()
    libraries = {get_mmcls_models()['mobilenet_v2'], 'https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth'}
    for url, (_, weights) in weights_by_url().items():
        assert url is None or url in known | libraries or url.startswith('package:efficientnet')
        digits = re.search(r'-([0-9a-f]{8})\.pth$', url or '')
        assert weights.sha256 == (digits and digits[1])
    families = (
        'mmclass.*replknet',
        '/convnext/convnext_',
        'main/unireplknet_',
        'in1k-weights/moganet_',
        'hf-hub:.*/rdnet_.*nv_',
    )
    theirs = {url for url in known if re.search('|'.join(families), url)}
    assert len(theirs) == 12 + 14 + 6 + 5 and theirs <= set(weights_by_url())


def test_entries_are_consistent():
    for name in list_backbones():
        entry, _ = find_backbone(name)
        tags = [weights.tag for weights in entry.weights]
        assert len(set(tags)) == len(tags) and entry.source.startswith('arXiv:')
        for weights in entry.weights:
            for row in entry.published('segmentation', weights):
                assert row.backbone == entry.paper_name


@pytest.mark.parametrize(
    ('name', 'task', 'recipe', 'variant'),
    [
        ('convnext-xlarge.in22k', 'segmentation', 'convnext_upernet_ade20k', 'XL'),
        ('replknet-31l.in22k-in1k-384', 'detection', 'replknet_cascade_mask_rcnn_coco', '31L'),
        ('convnext-base.in22k', 'detection', 'convnext_cascade_mask_rcnn_coco', 'B-22K'),
        ('replknet-xl.meg73m', 'segmentation', 'replknet_upernet_ade20k', 'XL'),
        ('unireplknet-t.in1k', 'segmentation', 'unireplknet_upernet_ade20k', 'T'),
        ('unireplknet-l.in22k-in1k-384', 'segmentation', 'unireplknet_upernet_ade20k', 'L'),
        ('unireplknet-xl.in22k-in1k-384', 'detection', 'unireplknet_cascade_mask_rcnn_coco', 'XL'),
    ],
)
def test_recipes_are_those_of_the_authors(name, task, recipe, variant):
    entry, weights = find_backbone(name)
    (row,) = entry.published(task, weights)
    found, theirs = recipe_of(row), {**FACTS['recipes'], **MORE['recipes']}[recipe]
    assert found.lr == (theirs['lr'][variant] if isinstance(theirs['lr'], dict) else theirs['lr'])
    assert found.drop_path == theirs['drop_path'][variant] and found.weight_decay == theirs['weight_decay']
    decay = theirs.get('layer_decay')
    rate = None if decay is None else decay[variant] if isinstance(decay, dict) else float(decay.split()[-1])
    assert found.paramwise_cfg.get('decay_rate') == rate


def test_a_row_belongs_to_the_weights_that_the_authors_fine_tuned():
    """Those of the shipped config of the row; every row belongs to one file."""
    for row in published.results():
        entry = next((e for name in list_backbones() if (e := find_backbone(name)[0]).paper_name == row.backbone), None)
        if entry is None:
            continue
        owners = [weights for weights in entry.weights if row in entry.published(row.task, weights)]
        assert len(owners) <= 1
        if row.config:
            cfg = Config.fromfile(ROOT / 'configs' / row.config)
            initial = cfg.model.backbone.get('init_cfg')  # classifiers may train from scratch
            assert [weights.url for weights in owners] == ([initial.checkpoint] if initial else [])


def test_where_authors_published_only_ranges_there_is_no_recipe():
    entry, weights = find_backbone('convnextv2-base.fcmae-in1k')
    assert [recipe_of(row) for task in ('segmentation', 'detection') for row in entry.published(task, weights)] == [
        None,
        None,
    ]


@pytest.mark.parametrize(
    ('name', 'side', 'known'),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[2] >= 'UniRepLKNet-S' or case[1] == 384 else [])
        for case in COUNTED
    ],
)
def test_parameters_and_macs_are_those_of_the_authors_code(name, side, known):
    """A classifier has one output norm and a linear layer; some backbones have a norm for each stage."""
    with torch.device('meta'):
        model = build_backbone(name)
    *others, last = [f['num_chs'] for f in model.feature_info]
    if known.endswith('deploy'):
        model, _ = reparameterize_on_meta(model)
    found = count_complexity(model, (side, side))
    parameters, macs = COMPUTED[f'classification_{side}'][known]
    # the facts have two decimals
    classes = 0 if known.endswith('backbone only') else 1000
    classifier = found.parameters - 2 * sum(others) * hasattr(model, 'norm0') + classes * (last + 1)
    assert classifier == pytest.approx(parameters * 1e6, rel=1e-3, abs=5.1e3)
    assert found.macs + classes * last == pytest.approx(macs * 1e9, rel=1e-3, abs=5.1e6)


def test_a_plain_module():
    model = build_backbone('replknet-nano', drop_path_rate=0.1).eval()
    assert isinstance(model, RepLKNet)
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64))
    info = [(f['num_chs'], f['reduction']) for f in model.feature_info]
    assert [(x.shape[1], 64 // x.shape[2]) for x in maps] == info == [(32, 4), (64, 8), (128, 16), (256, 32)]


def test_building_prints_nothing(capfd):
    build_backbone('convnext-atto')
    assert capfd.readouterr() == ('', '')


def authors_file(folder: Path, name: str) -> tuple[Path, nn.Module]:
    """A file of the authors' key names, without the output norms, and the network it is of."""
    torch.manual_seed(1)
    model = build_backbone(name)
    weights = to_official(model.state_dict())
    path = folder / 'weights.pth'
    torch.save(dict(model={key: value for key, value in weights.items() if not re.match(r'norm\d', key)}), path)
    return path, model


def test_weights_of_the_authors_are_loaded_whole_or_rejected(tmp_path):
    path, model = authors_file(tmp_path, 'convnext-atto')
    loaded = build_backbone('convnext-atto', pretrained=path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    with pytest.raises(UserError, match='does not fit'):
        build_backbone('convnextv2-atto', pretrained=path)


def test_pretrained_weights_are_downloaded(tmp_path, monkeypatch):
    path, model = authors_file(tmp_path, 'convnextv2-atto')
    asked = []

    def download(url, to, **_):
        asked.append(url)
        shutil.copy(path, to)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    loaded = build_backbone('convnextv2-atto', pretrained=True)
    assert torch.equal(loaded.stages[0][0].pointwise_conv1.weight, model.stages[0][0].pointwise_conv1.weight)
    assert asked == ['https://dl.fbaipublicfiles.com/convnext/convnextv2/im1k/convnextv2_atto_1k_224_ema.pt']
    with pytest.raises(UserError, match='convnext-nano: there are no pretrained weights'):
        build_backbone('convnext-nano', pretrained=True)


def test_without_a_network_the_error_says_what_to_download_and_where_to(tmp_path, monkeypatch):
    def refuse(*_args, **_):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(DownloadError, match='convnextv2_atto_1k_224_ema.pt') as caught:
        build_backbone('convnextv2-atto.fcmae-in1k', pretrained=True)
    assert f'copy the file to {tmp_path}' in str(caught.value)


#: The first variant of each family, which is the smallest.
FIRST = {name.partition('-')[0]: name for name in reversed(list_backbones())}.values()
SMALLEST = [
    pytest.param(name, marks=[pytest.mark.extras('timm')] if 'Timm' in find_backbone(name)[0].config['type'] else [])
    for name in FIRST
]


@cache
def smallest(name: str) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, ...]]:
    """A network, an image and the feature maps."""
    torch.manual_seed(0)
    model = build_backbone(name)
    with torch.no_grad():
        randomize_constants(model)
        image = torch.randn(2, 3, 64, 64)
        return model, image, model.eval()(image)


def difference(found, expected) -> float:
    """Largest norm of the difference of two feature maps, relative."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize('name', SMALLEST)
def test_a_training_step(name):
    model, image, expected = smallest(name)
    model.train()
    sum(x.square().mean() for x in model(image)).backward()
    missing = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    model.zero_grad()
    assert missing == [] and all(x.std() > 1e-3 for x in expected)
    assert [x.shape[1] for x in expected] == [f['num_chs'] for f in model.feature_info]


@pytest.mark.parametrize('name', SMALLEST)
def test_merged(name):
    model, image, _ = smallest(name)
    merged, _ = reparameterize(model.eval())
    with torch.no_grad():  # again, since training changes statistics of BatchNorm
        assert difference(merged(image), model(image)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALLEST)
def test_merged_and_exported(name):
    model, image, _ = smallest(name)
    merged, _ = reparameterize(model.eval())
    with torch.no_grad():
        exported = torch.export.export(merged, (image,), strict=False).module()
        assert difference(exported(image), merged(image)) < 1e-4


@pytest.mark.parametrize('name', SMALLEST)
def test_bfloat16(name):
    """Differences are those of rounding: rounded weights alone change a network nearly as much."""
    model, image, _ = smallest(name)
    rounded = copy.deepcopy(model.eval())
    with torch.no_grad():
        for value in rounded.parameters():
            value.copy_(value.bfloat16())
        expected = model(image)
        rounding = difference(rounded(image), expected)
        with torch.autocast('cpu', torch.bfloat16):
            found = model(image)
    assert all(x.isfinite().all() for x in found)
    assert 0 < difference(found, expected) < 3 * rounding < 1


class ReadsValues(nn.Module):
    """Looks at the values of its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4, 1)

    def forward(self, x):
        return (self.conv(x),) if x.sum().item() == 0 else None


def test_a_backbone_that_reads_values_is_measured_on_a_small_image(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, 'ReadsValues', ReadsValues)
    assert measure_features(dict(type='replk_mm.ReadsValues')) == [dict(num_chs=8, reduction=4)]


def test_pooled_features_are_rejected():
    with pytest.raises(UserError, match='something else than feature maps'):
        measure_features(dict(type='replk_mm.ConvNeXt', arch='atto'))


def test_arguments_that_a_network_rejects_are_a_user_error():
    with pytest.raises(UserError, match='replk_mm.ConvNeXt: .*kernel_size=4'):
        measure_features(dict(type='replk_mm.ConvNeXt', arch='atto', kernel_size=4))
