"""Loading whole models: every part is counted, and misfits are explained."""

import collections
import copy

import pytest
import torch
from checkpoint_cases import CONV, DENSE, TINY, assert_same, first_line, tiny_backbone, write
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from norms import randomize_norms

from replk_mm.checkpoints.key_formats import FoundWeights
from replk_mm.checkpoints.loading import LoadReport, guess_cause
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.inference import load_model
from replk_mm.errors import UserError


def head(classes=4, channels=None, name='FCNHead', **kwargs):
    return dict(
        type=name,
        in_channels=(channels or CONV['channels'])[2],
        in_index=2,
        channels=8,
        num_convs=1,
        concat_input=False,
        num_classes=classes,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        **kwargs,
    )


def segmentor(classes=4, backbone=None, channels=None, auxiliary=True, seed=0):
    pytest.importorskip('mmseg')
    cfg = dict(
        type='EncoderDecoder',
        backbone=backbone or dict(type='replk_mm.RepLKNet', arch=TINY),
        decode_head=head(classes, channels),
    )
    if auxiliary:
        cfg['auxiliary_head'] = head(classes, channels)
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return randomize_norms(MODELS.build(ConfigDict(copy.deepcopy(cfg))), seed).eval()


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('trained') / 'iter_9.pth'
    return write(path, {'state_dict': segmentor(seed=1).state_dict(), 'meta': {'iter': 9}})


def test_whole_model(trained):
    model = segmentor()
    report, meta = load_model(model, trained)
    assert meta == {'iter': 9}
    assert_same(model, torch.load(trained)['state_dict'])
    counts = collections.Counter(key.split('.')[0] for key in model.state_dict())
    assert report.total == report.matched == dict(counts)
    assert set(counts) == {'backbone', 'decode_head', 'auxiliary_head'}
    assert report.summary() == ', '.join(f'{part} {n}/{n}' for part, n in counts.items())
    assert report.details() == ''


def test_heads_that_only_train_may_differ(trained, tmp_path):
    report, _ = load_model(segmentor(auxiliary=False), trained)  # surplus in the file
    assert report.matched == report.total and 'auxiliary_head' not in report.total
    weights = torch.load(trained)['state_dict']
    path = write(tmp_path / 'a.pth', {k: v for k, v in weights.items() if not k.startswith('auxiliary_head')})
    report, meta = load_model(segmentor(), path)  # absent from the file
    assert report.missing == [] and 'auxiliary_head 0/' in report.summary() and meta == {}
    other = {k: torch.ones(9, 9) if k == 'auxiliary_head.conv_seg.weight' else v for k, v in weights.items()}
    report, _ = load_model(segmentor(), write(tmp_path / 'b.pth', other))  # another shape
    assert [key for key, *_ in report.mismatched] == ['auxiliary_head.conv_seg.weight']


def misfit(model, path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(model, path)
    assert first_line(caught).startswith(f'{path}: does not fit')
    return str(caught.value)


def test_other_number_of_classes(trained):
    message = misfit(segmentor(classes=7), trained)
    assert 'number of classes: decode_head.conv_seg.weight has 7 outputs in the config, 4 in the checkpoint' in message
    assert 'decode_head.conv_seg.weight: model (7, 8, 1, 1), checkpoint (4, 8, 1, 1)' in message


def test_backbone_only(tmp_path):
    path = write(tmp_path / 'a.pth', {'model': tiny_backbone().state_dict()})
    message = misfit(segmentor(), path)
    assert 'only a backbone' in message and 'missing: ' in message and 'decode_head 0/' in message.splitlines()[0]


def test_other_family(trained):
    message = misfit(segmentor(backbone=dict(type='replk_mm.ConvNeXt', arch=CONV, **DENSE)), trained)
    assert 'another architecture (RepLKNet, ' in message and 'backbone 0/' in message.splitlines()[0]


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        (dict(layers=[1, 1, 3, 1]), 'missing: '),
        (dict(layers=[1, 1, 1, 1]), '... and '),
        (dict(channels=[10, 14, 18, 26]), 'shape differs: '),
        (
            dict(large_kernel_sizes=[15, 11, 9, 7]),
            'stages.0.blocks.0.large_kernel.lkb_origin.conv.weight: model (8, 1, 15, 15)',
        ),
    ],
    ids=str,
)
def test_other_sizes(changes, named, trained):
    arch = {**TINY, **changes}
    classes = 7 if 'channels' in changes else 4  # the larger difference is the one to name
    message = misfit(segmentor(classes, dict(type='replk_mm.RepLKNet', arch=arch), arch['channels']), trained)
    assert named in message and 'another size or other options of the same family' in message


def test_training_form_into_a_merged_network(trained):
    merged = dict(type='replk_mm.RepLKNet', arch=TINY, small_kernel_merged=True)
    message = misfit(segmentor(backbone=merged), trained)
    assert 'lkb_reparam' in message and 'small_kernel_merged' in message


def test_other_number_of_classes_of_a_detector():
    found = FoundWeights({}, {'roi_head.x': torch.ones(1)})
    heads = [
        ('roi_head.bbox_head.fc_cls.weight', (81, 9), (4, 9)),
        ('roi_head.bbox_head.fc_reg.weight', (320, 9), (12, 9)),
        ('roi_head.mask_head.conv_logits.weight', (80, 9, 1, 1), (3, 9, 1, 1)),
    ]
    report = LoadReport(total={'backbone': 1}, matched={'backbone': 1}, mismatched=heads)
    assert 'number of classes: roi_head.bbox_head.fc_cls.weight has 81' in guess_cause(report, found, True)


@pytest.mark.parametrize('merge, fold', [(True, False), (False, True), (True, True)])
def test_reparameterized_whole_model(merge, fold, trained, tmp_path):
    source = segmentor()
    load_model(source, trained)
    after, _ = reparameterize(source, merge, fold)
    record = {'replk_mm': {'reparameterized': {'merge': merge, 'fold': fold}}}
    path = write(tmp_path / 'a.pth', {'meta': record, 'state_dict': after.state_dict()})
    model = segmentor(seed=5)
    report, meta = load_model(model, path)
    assert meta == record and report.matched == report.total
    assert_same(model, after.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.decode_head(model.extract_feat(x)), after.decode_head(after.extract_feat(x)))


def test_merged_backbone_of_the_authors_in_a_whole_model(tmp_path):
    """No record in the file: the key names tell."""
    after, _ = reparameterize(segmentor(seed=3), fold=False)
    path = write(tmp_path / 'a.pth', after.state_dict())
    model = segmentor(seed=5)
    load_model(model, path)
    assert_same(model, after.state_dict())


def test_bare_backbone_as_model(tmp_path):
    source = tiny_backbone()
    model = tiny_backbone(2)
    report, _ = load_model(model, write(tmp_path / 'a.pth', source.state_dict()))
    assert report.summary() == f'backbone {len(source.state_dict())}/{len(source.state_dict())}'
    assert_same(model, source.state_dict())
