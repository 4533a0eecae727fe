"""Checkpoints: every published key format loads whole, a stranger's code never runs, and misfits are explained."""
import collections
import copy
import os
import pickle
import zipfile

import pytest
import torch
from conftest import randomize_norms
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from replk_mm import checkpoints
from replk_mm.checkpoints import load_pretrained, read, save
from replk_mm.errors import UserError
from replk_mm.key_formats import convert, to_official, unwrap
from replk_mm.loading import load_model
from replk_mm.models import ConvNeXt, RepLKNet
from replk_mm.reparam import reparameterize

TINY = dict(large_kernel_sizes=[13, 11, 9, 7], small_kernel=5, layers=[1, 1, 2, 1], channels=[8, 12, 16, 24], dw_ratio=1)
CONV = dict(depths=[1, 1, 2, 1], channels=[8, 12, 16, 24])
DENSE = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def empty(build) -> nn.Module:
    """A large network without the seconds of its initialization."""
    with torch.device('meta'):
        model = build()
    model.to_empty(device='cpu')
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(-1)
    return model


def listed(reference, name: str) -> dict[str, torch.Tensor]:
    """A state dict of published keys and shapes. Every weight is constant, its place in the list: a small file."""
    weights = {}
    for number, line in enumerate((reference / 'facts' / f'keys_{name}.txt').read_text().splitlines(), 1):
        key, shape = line.split('\t')
        shape = tuple(int(n) for n in shape.strip('()').split(',') if n.strip())
        weights[key] = torch.tensor(float(number)).expand(shape)
    assert len(weights) > 100
    return weights


def write(path, content) -> str:
    torch.save(content, path)
    return str(path)


# Written by hand: what becomes of some keys of each list. '=' is the same name.
PLACES = {
    'replknet31b_official': ['=stem.3.bn.running_var', '=stages.2.blocks.34.large_kernel.small_conv.conv.weight',
                             '=transitions.1.1.bn.bias', '=stages.3.blocks.3.preffn_bn.running_mean'],
    'replknet31b_official_merged': ['=stem.3.bn.running_var', '=stages.2.blocks.34.large_kernel.lkb_reparam.weight'],
    'replknetxl_official': ['=stages.0.norm.weight', '=stages.1.blocks.2.large_kernel.lkb_origin.bn.bias'],
    'convnext_tiny_official': [
        'stages.2.8.pwconv1.weight=stages.2.8.pointwise_conv1.weight', '=stages.0.1.gamma', '=norm3.bias',
        'stages.0.0.dwconv.bias=stages.0.0.depthwise_conv.bias', '=downsample_layers.2.1.weight'],
    'convnext_tiny_mmpretrain': [
        'backbone.stages.2.8.pointwise_conv1.weight=stages.2.8.pointwise_conv1.weight', 'backbone.norm0.bias=norm0.bias'],
    'convnext_tiny_timm': [
        'stem.0.weight=downsample_layers.0.0.weight', 'stem.1.bias=downsample_layers.0.1.bias',
        'stages.1.downsample.0.weight=downsample_layers.1.0.weight', 'stages.3.downsample.1.bias=downsample_layers.3.1.bias',
        'stages.2.blocks.8.mlp.fc2.weight=stages.2.8.pointwise_conv2.weight', 'stages.0.blocks.2.gamma=stages.0.2.gamma',
        'stages.0.blocks.0.conv_dw.weight=stages.0.0.depthwise_conv.weight', 'head.norm.weight=norm3.weight'],
}
BUILD = {
    'replknet31b_official': lambda: RepLKNet('31B'),
    'replknet31b_official_merged': lambda: RepLKNet('31B', small_kernel_merged=True),
    'replknetxl_official': lambda: RepLKNet('XL', norm_intermediate_features=True),
    'convnext_tiny_official': lambda: ConvNeXt('tiny', **DENSE),
    'convnext_tiny_mmpretrain': lambda: ConvNeXt('tiny', **DENSE),
    'convnext_tiny_timm': lambda: ConvNeXt('tiny', **DENSE),
}


@pytest.mark.parametrize('name', PLACES)
def test_published_formats_load_whole(name, reference, tmp_path):
    weights = listed(reference, name)
    path = write(tmp_path / 'weights.pth', {'model': weights})
    xl = name == 'replknetxl_official'  # 1.3 GB: names and shapes only
    with torch.device('meta' if xl else 'cpu'):
        model = BUILD[name]() if xl else empty(BUILD[name])
    report = load_pretrained(model, path)
    assert report.unexpected == report.missing == report.mismatched == []
    own = model.state_dict()
    classifier = {key for key in weights if key.startswith('head.fc.')}
    assert len(classifier) == (2 if 'timm' in name else 0)
    assert report.matched == {'backbone': len(weights) - len(classifier)}
    if xl:
        assert set(PLACES[name]) <= {f'={key}' for key in own.keys() & weights.keys()}
        return
    # Every weight of the file is in the network once: their constants are all different.
    values = {value.flatten()[0].item() for value in own.values()}
    assert all((value == value.flatten()[0]).all() for key, value in own.items() if value.numel() < 1e6)
    unset = {'convnext_tiny_timm': {f'norm{i}.{end}' for i in range(3) for end in ('weight', 'bias')}}.get(name, set())
    assert {key for key, value in own.items() if value.flatten()[0] == -1} == unset
    assert values - {-1.} == {value.flatten()[0].item() for key, value in weights.items() if key not in classifier}
    for place in PLACES[name]:
        theirs, ours = place.split('=')
        assert own[ours].flatten()[0] == weights[theirs or ours].flatten()[0], place


def test_classifier_is_reported(reference):
    found = convert(listed(reference, 'convnext_tiny_timm'))
    assert found.set_aside == ['head.fc.weight', 'head.fc.bias']
    assert found.describe() == 'ConvNeXt, timm key names, 2 classifier keys set aside'
    imagenet = {**listed(reference, 'replknet31b_official'), 'norm.weight': torch.ones(1024), 'head.weight': torch.ones(1),
                'head.bias': torch.ones(1)}
    found = convert(imagenet)
    assert sorted(found.set_aside) == ['head.bias', 'head.weight', 'norm.weight'] and found.format == 'official'


@pytest.mark.parametrize('name, family, form, merged', [
    ('replknet31b_official', 'RepLKNet', 'official', False), ('replknet31b_official_merged', 'RepLKNet', 'official', True),
    ('convnext_tiny_official', 'ConvNeXt', 'official', False), ('convnext_tiny_timm', 'ConvNeXt', 'timm', False),
    ('convnext_tiny_mmpretrain', 'ConvNeXt', 'mmpretrain', False)])
def test_formats_are_told_apart(name, family, form, merged, reference):
    found = convert(listed(reference, name))
    assert (found.family, found.format, found.merged, found.whole_model) == (family, form, merged, form == 'mmpretrain')


@pytest.mark.parametrize('family', ['replknet31b', 'convnext_tiny'])
def test_to_official_round_trip(family, reference):
    theirs = listed(reference, f'{family}_official')
    ours = convert(theirs).backbone
    back = to_official(ours)
    assert list(back) == list(theirs) and all(back[key] is theirs[key] for key in theirs)
    again = convert(back).backbone
    assert list(again) == list(ours) and all(again[key] is ours[key] for key in ours)


# nests, prefixes, init_cfg

def tiny_backbone(seed: int = 1, **kwargs) -> RepLKNet:
    torch.manual_seed(seed)
    return randomize_norms(RepLKNet(TINY, **kwargs), seed).eval()


def assert_same(model, weights) -> None:
    own = model.state_dict()
    assert {key for key in weights if not torch.equal(own[key].float(), weights[key].float())} == set()


NESTS = {
    'flat': lambda w: w, 'model': lambda w: {'model': w, 'epoch': 3}, 'state_dict': lambda w: {'state_dict': w, 'meta': {}},
    'module': lambda w: {'module': w}, 'model_ema': lambda w: {'model_ema': w, 'epoch': 3},
    'model beside model_ema': lambda w: {'model_ema': {k: v + 1 for k, v in w.items()}, 'model': w},
    'two levels': lambda w: {'model': {'state_dict': w}}, 'ordered': lambda w: collections.OrderedDict(state_dict=w),
    'DistributedDataParallel': lambda w: {f'module.{k}': v for k, v in w.items()},
    'compiled': lambda w: {'model': {f'_orig_mod.{k}': v for k, v in w.items()}},
    'both wrappers': lambda w: {'model': {f'module._orig_mod.{k}': v for k, v in w.items()}},
    'backbone': lambda w: {'state_dict': {f'backbone.{k}': v for k, v in w.items()}},
    'wrapped backbone': lambda w: {'state_dict': {f'module.backbone.{k}': v for k, v in w.items()}},
    'beside a tensor': lambda w: {'best_accuracy': torch.tensor(83.5), 'model': w},
    'averaged': lambda w: {'model': {'n_averaged': torch.tensor(7), **{f'module.{k}': v for k, v in w.items()}}},
    'whole model': lambda w: {'state_dict': {**{f'backbone.{k}': v for k, v in w.items()},
                                             'decode_head.conv_seg.weight': torch.ones(2, 3, 1, 1)}},
    'parameters': lambda w: {'model': {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()}},
}


@pytest.mark.parametrize('nest', NESTS)
def test_nests_and_prefixes(nest, tmp_path):
    source = tiny_backbone().state_dict()
    path = write(tmp_path / 'a.pth', NESTS[nest](source))
    for prefix in (None, 'backbone.', 'backbone'):
        model = tiny_backbone(2)
        assert load_pretrained(model, path, prefix).matched == {'backbone': len(source)}
        assert_same(model, source)


@pytest.mark.parametrize('prefix', [None, 'backbone.', 'encoder.'])
def test_init_cfg(prefix, tmp_path):
    source = tiny_backbone().state_dict()
    there = prefix or 'backbone.' if prefix != 'encoder.' else prefix
    path = write(tmp_path / 'a.pth', {'state_dict': {**{f'{there}{k}': v for k, v in source.items()}, 'x.y': torch.ones(1)}})
    cfg = dict(type='Pretrained', checkpoint=path, **({'prefix': prefix} if prefix else {}))
    model = MODELS.build(dict(type='replk_mm.RepLKNet', arch=TINY, init_cfg=cfg))
    model.init_weights()
    assert_same(model, source)
    # As part of a larger model, after other initializations; and before them in the list.
    model = MODELS.build(dict(type='replk_mm.RepLKNet', arch=TINY, init_cfg=[
        cfg, dict(type='Constant', layer='Conv2d', val=0.)]))
    model.init_weights()
    assert_same(model, source)


def test_init_cfg_that_does_not_fit(tmp_path):
    path = write(tmp_path / 'a.pth', tiny_backbone().state_dict())
    model = RepLKNet(dict(TINY, channels=[8, 12, 16, 32]), init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(UserError, match='RepLKNet: backbone .*/') as caught:
        model.init_weights()
    assert str(caught.value).startswith(path) and 'another size' in str(caught.value)
    with pytest.raises(UserError, match='map_location'):
        load_pretrained(model, path, map_location='cuda:0')


def test_strict_can_be_switched_off(tmp_path):
    source = tiny_backbone().state_dict()
    partial = {k: v for k, v in source.items() if not k.startswith('stages.3.')}
    path = write(tmp_path / 'a.pth', partial)
    with pytest.raises(UserError, match='missing'):
        load_pretrained(tiny_backbone(2), path)
    model = tiny_backbone(2)
    report = load_pretrained(model, path, strict=False)
    assert report.matched['backbone'] == len(partial) and all(k.startswith('stages.3.') for k in report.missing)
    assert_same(model, partial)
    with pytest.raises(UserError, match='another architecture'):
        load_pretrained(tiny_backbone(2), write(tmp_path / 'b.pth', {'fc1': torch.ones(2)}), strict=False)


def test_norms_of_stages_that_are_not_returned(tmp_path):
    source = ConvNeXt(CONV, **DENSE).state_dict()
    path = write(tmp_path / 'a.pth', source)
    model = ConvNeXt(CONV, out_indices=(1, 2))
    assert load_pretrained(model, path).unexpected == []
    assert_same(model, {k: v for k, v in source.items() if not k.startswith(('norm0', 'norm3'))})
    xl = RepLKNet(TINY, norm_intermediate_features=True).state_dict()
    path = write(tmp_path / 'b.pth', xl)
    load_pretrained(RepLKNet(TINY, norm_intermediate_features=True, out_indices=(3,)), path)
    with pytest.raises(UserError, match='norm_intermediate_features'):  # these would be lost
        load_pretrained(RepLKNet(TINY), path)


def test_linear_and_convolution(tmp_path):
    linear = ConvNeXt(CONV, **DENSE)
    conv = ConvNeXt(CONV, linear_pw_conv=False, **DENSE)
    for source, target in ((linear, conv), (conv, linear)):
        for value in source.parameters():
            nn.init.normal_(value)
        load_pretrained(target, write(tmp_path / 'a.pth', to_official(source.state_dict())))
        assert all(torch.equal(v.flatten(), source.state_dict()[k].flatten()) for k, v in target.state_dict().items())


def test_version_2_of_the_authors(tmp_path):
    """Global response norm as (1, 1, 1, C), no layer scale, classifier with its norm."""
    source = ConvNeXt(CONV, use_grn=True, layer_scale_init_value=0.)
    for value in source.parameters():
        nn.init.normal_(value)
    ours = source.state_dict()
    theirs = {k: v.view(1, 1, 1, -1) if '.grn.' in k else v for k, v in to_official(ours).items()}
    theirs = {k.replace('norm3.', 'norm.') if k.startswith('norm3.') else k: v for k, v in theirs.items()}
    theirs |= {'head.weight': torch.ones(10, 24), 'head.bias': torch.ones(10)}
    model = ConvNeXt(CONV, use_grn=True, layer_scale_init_value=0.)
    report = load_pretrained(model, write(tmp_path / 'a.pth', {'model': theirs}))
    assert report.matched['backbone'] == len(ours)
    assert_same(model, ours)


@pytest.mark.parametrize('kwargs', [{}, dict(norm_cfg=dict(type='BN', eps=1e-2)), dict(arch=dict(TINY, small_kernel=None))],
                         ids=str)
def test_merged_file_into_either_form(kwargs, tmp_path):
    kwargs = {'arch': TINY, **kwargs}
    merged, _ = reparameterize(randomize_norms(RepLKNet(**kwargs)), fold=False)
    path = write(tmp_path / 'merged.pth', {'model': merged.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    expected = merged(x)
    for seed, form in ((3, True), (4, False)):
        model = randomize_norms(RepLKNet(**kwargs, small_kernel_merged=form), seed)
        report = load_pretrained(model, path)
        assert report.missing == report.unexpected == report.mismatched == []
        for a, b in zip(model.eval()(x), expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert hasattr(model.stages[0].blocks[0].large_kernel, 'lkb_origin')
    sum(o.mean() for o in model.train()(x)).backward()  # and it trains


# reading what strangers wrote

class Exploit:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def first_line(error) -> str:
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize('legacy', [False, True])
def test_malicious_pickle_is_refused_and_does_not_run(legacy, tmp_path):
    proof = tmp_path / 'proof'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'x': Exploit(os.system, f'touch {proof}')}, path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError) as caught:
        read(path)
    assert not proof.exists()
    assert first_line(caught).startswith(f'{path}: refused') and 'system' in first_line(caught)
    assert '--trust-checkpoint' in str(caught.value)
    read(path, trust=True)
    assert proof.exists()  # the same file does run code for those who ask for it


@pytest.mark.parametrize('attribute', ['__init__', '__globals__', '__subclasses__', 'register_statistics'])
def test_getattr_of_the_allow_list_opens_nothing(attribute, tmp_path):
    from mmengine.logging import HistoryBuffer
    path = write(tmp_path / 'evil.pth', {'x': Exploit(getattr, HistoryBuffer, attribute)}
                 if attribute != '__globals__' else {'x': Exploit(getattr, HistoryBuffer.mean, '__globals__')})
    with pytest.raises(UserError) as caught:
        read(path)
    assert first_line(caught).startswith(f'{path}: refused') and attribute in first_line(caught)


def test_unknown_class_is_named(tmp_path):
    path = write(tmp_path / 'a.pth', {'x': collections.Counter(a=1), 'args': Exploit(zipfile.ZipInfo)})
    with pytest.raises(UserError) as caught:
        read(path)
    assert first_line(caught).startswith(f'{path}: refused') and 'zipfile.ZipInfo' in first_line(caught)
    assert 'torch' not in first_line(caught).split(': ', 1)[1]


def plain(path):
    torch.save({'state_dict': {'w': torch.randn(1000)}}, path)
    return path.read_bytes()


BROKEN = {
    'empty': lambda p: p.write_bytes(b''),
    'text': lambda p: p.write_text('<!DOCTYPE html><html>not found</html>\n'),
    'text that begins like a number': lambda p: p.write_text('404: Not Found'),
    'cut in half': lambda p: p.write_bytes(plain(p)[:2500]),
    'cut by a byte': lambda p: p.write_bytes(plain(p)[:-1]),
    'cut after its header': lambda p: p.write_bytes(plain(p)[:40]),
    'noise': lambda p: p.write_bytes(bytes((i * 97 + 13) % 256 for i in range(4000))),
    'zip of nonsense': lambda p: zipfile.ZipFile(p, 'w').writestr('readme.txt', 'hello'),
    'zip with a broken pickle': lambda p: zipfile.ZipFile(p, 'w').writestr('archive/data.pkl', b'\x80\x02}q\x00X'),
    'a bare pickle': lambda p: p.write_bytes(pickle.dumps({'a': 1}, 4)),
    'a cut pickle': lambda p: p.write_bytes(pickle.dumps({'a': list(range(100))}, 2)[:60]),
    'a cut legacy file': lambda p: (torch.save({'w': torch.ones(99)}, p, _use_new_zipfile_serialization=False),
                                    p.write_bytes(p.read_bytes()[:-50])),
    'a list': lambda p: torch.save([torch.ones(2)], p),
    'a tensor': lambda p: torch.save(torch.ones(2), p),
    'a folder': lambda p: p.mkdir(),
    'nothing there': lambda p: None,
}


@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize('kind', BROKEN)
def test_broken_files_are_explained(kind, trust, tmp_path):
    path = tmp_path / 'broken.pth'
    BROKEN[kind](path)
    if kind == 'a bare pickle' and trust:
        return  # torch reads what it calls its legacy format here
    with pytest.raises(UserError) as caught:
        read(path, trust)
    assert first_line(caught).startswith(f'{path}: ')
    assert {'a folder': 'folder', 'nothing there': 'no such', 'a list': 'list', 'a tensor': 'Tensor'}.get(
        kind, 'damaged') in first_line(caught)
    assert len(str(caught.value)) < 700 and 'Traceback' not in str(caught.value)


def test_noise_anywhere_is_a_user_error(tmp_path):
    """A file with some bytes changed either loads or is refused politely."""
    path = tmp_path / 'a.pth'
    good = plain(path)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for at in torch.randint(len(bad), (8,), generator=generator).tolist():
            bad[at] ^= 255
        path.write_bytes(bad)
        try:
            read(path)
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize('content', [{}, {'epoch': 3}, {'state_dict': {}}, {'model': [1, 2]}, {'model': {'a': 'b'}}], ids=str)
def test_no_weights(content, tmp_path):
    path = write(tmp_path / 'a.pth', content)
    with pytest.raises(UserError, match='no weights in it') as caught:
        load_pretrained(tiny_backbone(), path)
    assert first_line(caught).startswith(path)


def test_checkpoint_of_mmengine_itself(tmp_path):
    """Written by a real Runner, with its log buffers, optimizer and scheduler."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Toy(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = tiny_backbone()

        def forward(self, inputs, data_samples=None, mode='loss'):
            return dict(loss=sum(o.square().mean() for o in self.backbone(inputs)))

    runner = Runner(Toy(), str(tmp_path), train_dataloader=dict(
        batch_size=2, num_workers=0, dataset=[dict(inputs=torch.randn(3, 32, 32)) for _ in range(4)],
        sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=dict(type='PolyLR', eta_min=0, power=.9, begin=0, end=4, by_epoch=False),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)), experiment_name='toy')
    runner.train()
    path = tmp_path / 'epoch_1.pth'
    loaded = read(path)
    buffers = loaded['message_hub']['log_scalars']
    assert buffers['train/loss'].data[0].shape == (2,) and buffers['train/loss'].mean() > 0
    assert loaded['optimizer']['state'] and loaded['param_schedulers'] and loaded['meta']['epoch'] == 1
    model = tiny_backbone(5)
    load_pretrained(model, path)
    assert_same(model, runner.model.backbone.state_dict())
    resumed = Toy()  # mmengine's own loading works too, which it does not by itself
    from mmengine.runner import load_checkpoint
    load_checkpoint(resumed, str(path), strict=True)
    assert_same(resumed, runner.model.state_dict())


# writing

def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_halfway(monkeypatch, error) -> None:
    def fails(content, file):
        file.write(b'half of it')
        raise error

    monkeypatch.setattr(torch, 'save', fails)


def test_save_round_trip(tmp_path):
    path = tmp_path / 'deep' / 'er' / 'a.pth'
    save({'state_dict': {'w': torch.arange(3.)}}, path)
    assert read(path)['state_dict']['w'].tolist() == [0, 1, 2]
    assert names(path.parent) == ['a.pth'] and path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('unexpected pos 64 vs 0')], ids=str)
def test_failed_save_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save({'state_dict': {'w': torch.ones(1)}}, path)

    fail_halfway(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        save({'state_dict': {'w': torch.zeros(1)}}, path)
    assert first_line(caught).startswith(f'{path}: cannot be written') and str(error) in first_line(caught)
    monkeypatch.undo()
    assert read(path)['state_dict']['w'].item() == 1
    assert names(tmp_path) == ['a.pth']


@pytest.mark.parametrize('error', [KeyboardInterrupt, pickle.PicklingError])
def test_interrupted_save_cleans_up(error, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save({'state_dict': {'w': torch.ones(1)}}, path)

    fail_halfway(monkeypatch, error)
    with pytest.raises(error):
        save({}, path)
    assert names(tmp_path) == ['a.pth']


def test_unwritable_places(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file' / 'a.pth', tmp_path / 'folder'):
        with pytest.raises(UserError) as caught:
            save({'w': torch.ones(1)}, path)
        assert first_line(caught).startswith(f'{path}: cannot be written')
    assert names(tmp_path) == ['file', 'folder']


# whole models

def head(classes=4, channels=None, name='FCNHead', **kwargs):
    return dict(type=name, in_channels=(channels or CONV['channels'])[2], in_index=2, channels=8, num_convs=1,
                concat_input=False, num_classes=classes, norm_cfg=dict(type='BN'), align_corners=False, **kwargs)


def segmentor(classes=4, backbone=None, channels=None, auxiliary=True, seed=0):
    pytest.importorskip('mmseg')
    cfg = dict(type='EncoderDecoder', backbone=backbone or dict(type='replk_mm.RepLKNet', arch=TINY),
               decode_head=head(classes, channels))
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
    assert report.total == report.matched == dict(counts) and set(counts) == {'backbone', 'decode_head', 'auxiliary_head'}
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
    assert 'a backbone only' in message and 'missing: ' in message and 'decode_head 0/' in message.splitlines()[0]


def test_other_family(trained):
    message = misfit(segmentor(backbone=dict(type='replk_mm.ConvNeXt', arch=CONV, **DENSE)), trained)
    assert 'another architecture (RepLKNet, ' in message and 'backbone 0/' in message.splitlines()[0]


def test_other_depth(trained):
    deeper = dict(TINY, layers=[1, 1, 3, 1])
    assert 'another depth' in misfit(segmentor(backbone=dict(type='replk_mm.RepLKNet', arch=deeper)), trained)
    shallower = dict(TINY, layers=[1, 1, 1, 1])
    message = misfit(segmentor(backbone=dict(type='replk_mm.RepLKNet', arch=shallower)), trained)
    assert 'another depth' in message and 'unexpected: ' in message and '... and ' in message


@pytest.mark.parametrize('family', ['RepLKNet', 'ConvNeXt'])
def test_other_width(family, trained, tmp_path):
    wide = [10, 14, 18, 26]
    if family == 'ConvNeXt':
        backbone = dict(type='replk_mm.ConvNeXt', arch=CONV, **DENSE)
        trained = write(tmp_path / 'a.pth', segmentor(backbone=backbone).state_dict())
        backbone = dict(backbone, arch=dict(CONV, channels=wide))
    else:
        backbone = dict(type='replk_mm.RepLKNet', arch=dict(TINY, channels=wide))
    for classes in (4, 7):  # the larger difference is the one to name
        assert 'another size of the same family' in misfit(segmentor(classes, backbone, wide), trained)


def test_other_kernel_size(trained):
    other = dict(TINY, large_kernel_sizes=[15, 11, 9, 7])
    message = misfit(segmentor(backbone=dict(type='replk_mm.RepLKNet', arch=other)), trained)
    assert 'kernel sizes' in message
    assert 'stages.0.blocks.0.large_kernel.lkb_origin.conv.weight: model (8, 1, 15, 15)' in message


def test_training_form_into_a_merged_network(trained, tmp_path):
    merged = dict(type='replk_mm.RepLKNet', arch=TINY, small_kernel_merged=True)
    assert 'built merged and the checkpoint is not' in misfit(segmentor(backbone=merged), trained)
    source = write(tmp_path / 'a.pth', tiny_backbone().state_dict())
    with pytest.raises(UserError, match='built merged and the checkpoint is not'):
        load_pretrained(RepLKNet(TINY, small_kernel_merged=True), source)


def test_other_number_of_classes_of_a_detector():
    found = convert({'backbone.stages.0.blocks.0.large_kernel.x': torch.ones(1), 'roi_head.x': torch.ones(1)})
    heads = [('roi_head.bbox_head.fc_cls.weight', (81, 9), (4, 9)), ('roi_head.bbox_head.fc_reg.weight', (320, 9), (12, 9)),
             ('roi_head.mask_head.conv_logits.weight', (80, 9, 1, 1), (3, 9, 1, 1))]
    report = checkpoints.LoadReport(total={'backbone': 1}, matched={'backbone': 1}, mismatched=heads)
    assert 'number of classes: roi_head.bbox_head.fc_cls.weight has 81' in checkpoints.guess_cause(report, found, True)


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


def test_trust_is_passed_on(tmp_path):
    ran = tmp_path / 'ran'
    path = write(tmp_path / 'a.pth', {'state_dict': tiny_backbone().state_dict(), 'x': Exploit(os.mkdir, str(ran))})
    with pytest.raises(UserError, match='refused'):
        load_model(tiny_backbone(2), path)
    assert not ran.exists()
    load_model(tiny_backbone(2), path, trust=True)
    assert ran.exists()


def test_unwrap_of_a_wrapper_only():
    assert list(unwrap({'module.model.a': torch.ones(1), 'module.model.b': torch.ones(1)})) == ['a', 'b']


def test_hash(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes(b'abc')
    assert checkpoints.sha256(path) == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
