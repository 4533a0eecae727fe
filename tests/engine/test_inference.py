"""Loading whole models: every part is counted, and misfits are explained."""

import collections
import copy

import pytest
import torch
from checkpoint_cases import CONV, DENSE, TINY, assert_same, first_line, tiny_backbone, write
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from norms import randomize_norms

from replk_mm.analysis.benchmark.case import build_networks
from replk_mm.analysis.erf import _build_backbone
from replk_mm.checkpoints.key_formats import FoundWeights, to_official
from replk_mm.checkpoints.loading import LoadReport, guess_cause
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.inference import build_for_inference, load_model
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


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What the terminal shows."""
    lines: list[str] = []
    for module in ('replk_mm.engine.inference', 'replk_mm.checkpoints.loading'):
        monkeypatch.setattr(f'{module}.announce', lambda text, level=None: lines.append(text))
    return lines


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


def test_kernels_of_another_size(trained):
    """Padded with zeros, the segmentor of larger kernels computes the same logits."""
    larger = dict(type='replk_mm.RepLKNet', arch=dict(TINY, large_kernel_sizes=[15, 13, 11, 9]))
    source, model, image = segmentor(), segmentor(backbone=larger, seed=2), torch.randn(1, 3, 64, 64)
    load_model(source, trained)
    for training in (False, True):
        with pytest.raises(UserError, match='is 15x15 in the config, 13x13 in .*--resize-kernels pad or interpolate'):
            load_model(model, trained, training)
        report, _ = load_model(model, trained, training, resize_kernels='pad')
        assert report.matched == report.total and '1 kernels 13x13 to 15x15 (pad)' in report.summary()
    found, expected = model(image), source(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('build', ['predict', 'benchmark', 'erf'])
def test_the_config_resizes_kernels(build, trained):
    larger = dict(type='replk_mm.RepLKNet', arch=dict(TINY, large_kernel_sizes=[15, 13, 11, 9]))
    model = dict(type='EncoderDecoder', backbone=larger, decode_head=head(4, None), auxiliary_head=head(4, None))
    cfg = Config(dict(model=copy.deepcopy(model), default_scope='mmseg', resize_kernels='pad'))
    if build == 'predict':
        network = build_for_inference(cfg, trained).model.backbone
    elif build == 'benchmark':
        network = build_networks(cfg, True, 'training', trained)[0]['ours'].backbone
    else:
        network = _build_backbone(cfg, cfg.model.backbone, trained, 0, False)[0]
    key = next(k for k, v in network.state_dict().items() if v.shape[2:] == (15, 15))
    expected = torch.load(trained)['state_dict'][f'backbone.{key}']
    assert torch.equal(network.state_dict()[key], torch.nn.functional.pad(expected, (1, 1, 1, 1)))


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


WHOLE = {
    'compiled': lambda w: {'state_dict': {f'_orig_mod.{k}': v for k, v in w.items()}},
    'Lightning': lambda w: {'state_dict': {f'model.{k}': v for k, v in w.items()}, 'loops': {}},
    'mean teacher': lambda w: {
        'state_dict': {f'student.{k}': v + 1 for k, v in w.items()} | {f'teacher.{k}': v for k, v in w.items()}
    },
    'one DDP per part': lambda w: {k.replace('.', '.module.', 1): v for k, v in w.items()},
    'averaged by torch': lambda w: {'model': {'n_averaged': torch.ones(1), **{f'module.{k}': v for k, v in w.items()}}},
}


@pytest.mark.parametrize('form', WHOLE)
def test_whole_model_of_other_programs(form, trained, tmp_path):
    weights = torch.load(trained)['state_dict']
    model = segmentor()
    report, _ = load_model(model, write(tmp_path / 'a.pth', WHOLE[form](weights)))
    assert report.matched == report.total and report.unexpected == []
    assert_same(model, weights)


def test_whole_model_with_names_of_the_authors(tmp_path):
    """As in their ADE20K files."""
    convnext = dict(type='replk_mm.ConvNeXt', arch=CONV, **DENSE)
    source = segmentor(backbone=convnext, seed=1).state_dict()
    heads = {key: value for key, value in source.items() if not key.startswith('backbone.')}
    theirs = to_official({key: source[key] for key in source.keys() - heads.keys()})
    assert theirs.keys() != source.keys() - heads.keys()
    model = segmentor(backbone=convnext)
    load_model(model, write(tmp_path / 'a.pth', {'state_dict': theirs | heads}))
    assert_same(model, source)


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
    assert 'only a backbone fits' in message and 'missing: ' in message and 'decode_head 0/' in message.splitlines()[0]
    weights = {f'backbone.{key}': value for key, value in tiny_backbone().state_dict().items()}
    classifier = {'head.fc.weight': torch.ones(10, 24), 'head.fc.bias': torch.ones(10)}  # as in mmpretrain
    message = misfit(segmentor(), write(tmp_path / 'b.pth', {'state_dict': weights | classifier}))
    assert 'only a backbone fits' in message and 'unexpected' not in message


def test_other_family(trained):
    message = misfit(segmentor(backbone=dict(type='replk_mm.ConvNeXt', arch=CONV, **DENSE)), trained)
    assert 'another architecture (RepLKNet, ' in message and 'backbone 0/' in message.splitlines()[0]


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        (dict(layers=[1, 1, 3, 1]), 'missing: '),
        (dict(layers=[1, 1, 1, 1]), '... and '),
        (dict(channels=[10, 14, 18, 26]), 'shape differs: '),
    ],
    ids=str,
)
def test_other_sizes(changes, named, trained):
    arch = {**TINY, **changes}
    classes = 7 if 'channels' in changes else 4  # the larger difference is the one to name
    message = misfit(segmentor(classes, dict(type='replk_mm.RepLKNet', arch=arch), arch['channels']), trained)
    assert named in message and 'another size or other options of the same family' in message


# ---- load_from: training starts from a whole model
def renamed(rename):
    return lambda weights: {rename(key): value for key, value in weights.items()}


WRAPPED = {
    'torch.compile': lambda weights: {'state_dict': renamed(lambda key: f'_orig_mod.{key}')(weights)},
    'Lightning': lambda weights: {'state_dict': renamed(lambda key: f'model.{key}')(weights)},
    'nested': lambda weights: {'model': weights, 'epoch': 3},
    'DistributedDataParallel': renamed(lambda key: f'module.{key}'),
    'FSDP': renamed(lambda key: key.replace('blocks.0.', 'blocks.0._fsdp_wrapped_module.')),
    'official': lambda weights: {
        'state_dict': {
            **{f'backbone.{k}': v for k, v in to_official(part(weights, 'backbone.')).items()},
            **{f'decode_head.{k}': v for k, v in part(weights, 'decode_head.').items()},
        }
    },
}
CONVNEXT = dict(type='replk_mm.ConvNeXt', arch=CONV, **DENSE)


def part(weights, prefix):
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


@pytest.mark.parametrize('names', WRAPPED)
def test_training_loads_a_model_under_other_names(names, tmp_path, log):
    backbone = CONVNEXT if names == 'official' else None
    source = segmentor(backbone=backbone, auxiliary=False, seed=1).state_dict()
    model = segmentor(backbone=backbone, auxiliary=False)
    load_model(model, write(tmp_path / 'a.pth', WRAPPED[names](source)), training=True)
    assert_same(model, source)
    assert log == []


def test_training_takes_a_model_with_other_classes_and_reports_it(trained, tmp_path, log):
    model = segmentor(classes=7)
    before = model.decode_head.conv_seg.weight.clone()
    load_model(model, trained, training=True)
    weights = torch.load(trained)['state_dict']
    heads = ('decode_head.conv_seg', 'auxiliary_head.conv_seg')
    assert_same(model, {key: value for key, value in weights.items() if not key.startswith(heads)})
    assert torch.equal(model.decode_head.conv_seg.weight, before)
    [line] = log
    assert line.startswith('warning: ') and 'decode_head.conv_seg.weight: model (7, 8, 1, 1)' in line


def test_training_names_a_head_without_weights(trained, tmp_path, log):
    weights = torch.load(trained)['state_dict']
    path = write(tmp_path / 'a.pth', {k: v for k, v in weights.items() if not k.startswith('auxiliary_head')})
    load_model(segmentor(), path, training=True)
    assert 'auxiliary_head 0/' in log[0] and 'missing: ' in log[0]


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda w: part(w, 'backbone.'), 'only a backbone fits'),
        (lambda w: {k: v for k, v in w.items() if k.startswith('backbone.')}, 'only a backbone fits'),
        (
            lambda w: {k.replace('decode_head', 'head').replace('auxiliary_', ''): v for k, v in w.items()},
            'decode_head 0',
        ),
        (lambda w: {k: v for k, v in w.items() if 'stages.3' not in k}, 'stages.3'),
        (lambda w: {k: v for k, v in w.items() if not k.startswith('backbone.')}, 'another architecture'),
        (lambda w: w | {'backbone.stages.2.blocks.9.bn.weight': torch.ones(1)}, 'blocks.9.bn.weight'),
        (lambda w: {f'x{i}': v for i, v in enumerate(w.values())}, 'another architecture'),
    ],
    ids=[
        'bare backbone',
        'no heads',
        'other heads',
        'half a backbone',
        'heads only',
        'a larger network',
        'other names',
    ],
)
def test_training_rejects_what_leaves_the_network_random(change, named, trained, tmp_path):
    path = write(tmp_path / 'a.pth', change(torch.load(trained)['state_dict']))
    with pytest.raises(UserError, match='does not fit') as caught:
        load_model(segmentor(), path, training=True)
    assert named in str(caught.value)


class Pair(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.student, self.teacher = segmentor(**kwargs), segmentor(**kwargs)


def test_training_of_student_and_teacher_takes_other_classes_but_whole_backbones(tmp_path, log):
    weights = Pair(seed=1).state_dict()
    model = Pair(classes=7)
    load_model(model, write(tmp_path / 'a.pth', {'state_dict': weights}), training=True)
    assert_same(model, {key: value for key, value in weights.items() if 'conv_seg' not in key})
    assert 'student.decode_head.conv_seg.weight: model (7, 8, 1, 1)' in log[0]
    with pytest.raises(UserError, match='does not fit'):
        load_model(model, write(tmp_path / 'b.pth', part(weights, 'student.')), training=True)


@pytest.mark.parametrize('fold', [False, True])
def test_training_from_merged_weights(fold, tmp_path, log):
    source = segmentor(seed=3)
    merged, _ = reparameterize(source, fold=fold)
    path = write(tmp_path / 'a.pth', merged.state_dict())
    model = segmentor(seed=5)
    if fold:
        with pytest.raises(UserError, match='folded BatchNorm'):
            load_model(model, path, training=True)
    else:
        load_model(model, path, training=True)
        assert all(d.ok for d in compare_networks(model.eval(), merged))
        assert 'small_kernel_merged' in log[0]


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


def test_file_without_the_classifier_is_incomplete():
    report = LoadReport(
        total={'backbone': 1}, matched={'backbone': 1, 'decode_head': 1}, missing=['decode_head.conv_seg.bias']
    )
    assert 'incomplete' in guess_cause(report, FoundWeights({}, {}), True)


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


def test_merged_file_with_a_norm_that_is_folded_now(trained, tmp_path):
    source = segmentor()
    load_model(source, trained)
    kept = ['backbone.stages.0.blocks.1.preffn_bn']
    after, changes = reparameterize(source, keep=kept)
    assert changes.left == kept
    record = {'replk_mm': {'reparameterized': {'merge': True, 'fold': True}}}
    model = segmentor(seed=5)
    load_model(model, write(tmp_path / 'a.pth', {'meta': record, 'state_dict': after.state_dict()}))
    assert_same(model, after.state_dict())


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
