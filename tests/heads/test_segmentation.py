"""Our segmentor and heads against mmseg's own with the same weights, in float64."""

import copy
import functools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel as MMSegSegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from norms import randomize_norms
from tensors import LargestTensor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError
from replk_mm.heads import pyramid
from replk_mm.heads import upsampling as upsampled
from replk_mm.heads.segmentation import DeferredLogits, SegTTAModel

CLASSES = 11
CHANNELS = [8, 12, 16, 24]
BACKBONE = dict(
    type='replk_mm.RepLKNet',
    out_memory_format='preserve_format',
    arch=dict(large_kernel_sizes=[7, 5, 5, 3], small_kernel=3, layers=[1, 1, 1, 1], channels=CHANNELS, dw_ratio=1),
)
NORM = dict(type='BN', requires_grad=True)
HEAD = dict(num_classes=CLASSES, norm_cfg=NORM, dropout_ratio=0.0)


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def loss(**kwargs) -> dict:
    return dict(type='CrossEntropyLoss', **kwargs)


def config(prefix: str = '', head: dict | None = None, auxiliary: dict | None = None, **kwargs) -> dict:
    """A small UperNet of the classes with ``prefix``."""
    return ConfigDict(
        copy.deepcopy(
            dict(
                type=f'{prefix}EncoderDecoder',
                backbone=BACKBONE,
                decode_head=dict(
                    type=f'{prefix}UPerHead',
                    in_channels=CHANNELS,
                    in_index=[0, 1, 2, 3],
                    pool_scales=(1, 2, 3),
                    channels=8,
                    **{**HEAD, 'loss_decode': loss(), **(head or {})},
                ),
                auxiliary_head=dict(
                    type=f'{prefix}FCNHead',
                    in_channels=CHANNELS[2],
                    in_index=2,
                    channels=8,
                    num_convs=1,
                    concat_input=False,
                    **{**HEAD, 'loss_decode': loss(loss_weight=0.4), **(auxiliary or {})},
                ),
                **{
                    'train_cfg': dict(),
                    'test_cfg': dict(mode='whole'),
                    'data_preprocessor': dict(type='SegDataPreProcessor', mean=[0.0] * 3, std=[1.0] * 3),
                    **kwargs,
                },
            )
        )
    )


def build(cfg: dict) -> nn.Module:
    torch.manual_seed(0)
    model = randomize_norms(MODELS.build(cfg))
    for name, parameter in model.named_parameters():
        if 'conv_seg' in name:
            nn.init.normal_(parameter, std=1.0)  # classes far enough apart for rounding not to choose
    return model.double()


def pair(**kwargs) -> tuple[nn.Module, nn.Module]:
    """mmseg's, and ours with its weights."""
    theirs, ours = build(config(**kwargs)), build(config('replk_mm.', **kwargs))
    assert type(theirs).__module__.startswith('mmseg.') and type(theirs.decode_head).__module__.startswith('mmseg.')
    assert type(ours.decode_head).__module__ == type(ours.auxiliary_head).__module__ == 'replk_mm.heads.segmentation'
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def labelled(size=(64, 64), ignored=0.1, classes=CLASSES, n=2) -> list[SegDataSample]:
    samples = []
    for _ in range(n):
        labels = torch.randint(0, classes, (1, *size))
        labels[torch.rand(labels.shape) < ignored] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
    return samples


def losses_of(model: nn.Module, x: torch.Tensor, samples: list) -> tuple[dict, dict]:
    model.train().zero_grad()
    losses = model(x, copy.deepcopy(samples), mode='loss')
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_same_training(theirs, ours, x, samples) -> dict:
    (expected, grads), (found, our_grads) = losses_of(theirs, x, samples), losses_of(ours, x, samples)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6 if 'acc' in name else 1e-11, atol=0)
    largest = max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-8, atol=1e-10 * float(largest), msg=name)
    return found


IMAGE = (2, 3, 64, 64)
PLAIN = {
    'as usual': {},
    'mean over labelled pixels': dict(head=dict(loss_decode=loss(avg_non_ignore=True, loss_weight=0.7))),
    'align_corners': dict(head=dict(align_corners=True), auxiliary=dict(align_corners=True)),
    'a list of one loss with a name': dict(head=dict(loss_decode=[loss(loss_name='loss_main')])),
    'another ignored label': dict(head=dict(ignore_index=3), auxiliary=dict(ignore_index=3)),
}
OTHER = {
    'class weights': dict(head=dict(loss_decode=loss(class_weight=[0.5] * 5 + [2.0] * 6))),
    'two losses': dict(head=dict(loss_decode=[loss(), dict(type='DiceLoss', loss_weight=2.0)])),
    'two of a kind': dict(head=dict(loss_decode=[loss(), loss(loss_weight=2.0)])),
    'sigmoid': dict(head=dict(loss_decode=loss(use_sigmoid=True))),
    'summed': dict(head=dict(loss_decode=loss(reduction='sum'))),
    'hard pixels': dict(head=dict(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=50))),
}


@pytest.mark.parametrize('case', {**PLAIN, **OTHER})
def test_training_is_mmsegs(case, monkeypatch):
    calls = []
    real = upsampled.upsampled_cross_entropy
    monkeypatch.setattr(
        'replk_mm.heads.segmentation.upsampled_cross_entropy', lambda *a: (calls.append(a), real(*a))[1]
    )
    theirs, ours = pair(**{**PLAIN, **OTHER}[case])
    samples = labelled(ignored=0 if case == 'class weights' else 0.1)  # mmseg cannot weight ignored labels
    if case == 'another ignored label':
        samples = labelled(ignored=0)
    assert_same_training(theirs, ours, torch.randn(IMAGE, dtype=torch.float64), samples)
    assert len(calls) == (2 if case in PLAIN else 1)  # the other head's loss is plain


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_batch_without_labels(avg_non_ignore):
    theirs, ours = pair(head=dict(loss_decode=loss(avg_non_ignore=avg_non_ignore)))
    found = assert_same_training(theirs, ours, torch.randn(IMAGE, dtype=torch.float64), labelled(ignored=1.1))
    assert found['decode.loss_ce'] == 0 and found['decode.acc_seg'] == 100  # mmseg's figure for nothing out of nothing


def test_labels_of_another_size_than_the_image():
    theirs, ours = pair()
    x = torch.randn(2, 3, 61, 83, dtype=torch.float64)
    assert_same_training(theirs, ours, x, labelled((61, 83)))
    assert_same_training(theirs, ours, x, labelled((16, 21)))


def test_one_class_of_logits_is_mmsegs():
    head = dict(num_classes=2, out_channels=1, threshold=0.5, loss_decode=loss(use_sigmoid=True))
    theirs, ours = pair(head=head, auxiliary=head)
    x = torch.randn(IMAGE, dtype=torch.float64)
    assert_same_training(theirs, ours, x, labelled(classes=2))
    for theirs.test_cfg in (dict(mode='whole'), SLIDE):
        theirs.test_cfg = ours.test_cfg = ConfigDict(theirs.test_cfg)
        assert_same_predictions(theirs, ours, x, [dict(img_shape=(64, 64), ori_shape=(40, 50))] * 2)


def test_label_of_no_class_is_named():
    ours = build(config('replk_mm.'))
    with pytest.raises(UserError, match=f'class {CLASSES};'):
        ours(torch.randn(IMAGE, dtype=torch.float64), labelled(classes=CLASSES + 1, ignored=0), mode='loss')


@pytest.mark.parametrize('norm', ['BN', 'none'])
@pytest.mark.parametrize('align_corners', [False, True])
def test_pyramid_at_its_own_resolution(align_corners, norm, monkeypatch):
    """What pays with many channels only, forced upon a few."""
    monkeypatch.setattr(pyramid, 'MIN_MACS', 0)
    kwargs = dict(align_corners=align_corners, **(dict(norm_cfg=None) if norm == 'none' else {}))
    theirs, ours = pair(head=kwargs)
    joined = []
    real = pyramid._conv_resized
    monkeypatch.setattr(pyramid, '_conv_resized', lambda *args: (joined.append(args), real(*args))[1])
    x = torch.randn(2, 3, 67, 90, dtype=torch.float64)
    assert_same_training(theirs, ours, x, labelled((67, 90)))
    assert len(joined) == 5  # levels 2 to 4, and two of the three pooled maps are small enough beside 3x3
    ours.load_state_dict(theirs.state_dict())
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
        folded, changes = reparameterize(ours)
        torch.testing.assert_close(folded(x), theirs(x), rtol=1e-9, atol=1e-11)
    assert any('fpn_bottleneck' in name for name in changes.folded) == (norm == 'BN')


def in_groups(module):
    module.conv.weight = nn.Parameter(module.conv.weight[:, : module.conv.in_channels // 2].clone())
    module.conv.groups = 2


CHANGES = {
    'dilation': lambda module: vars(module.conv).update(dilation=(2, 2), padding=(2, 2)),
    'stride': lambda module: vars(module.conv).update(stride=(2, 2)),
    'padding': lambda module: vars(module.conv).update(padding=(2, 2)),
    'reflected padding': lambda module: vars(module.conv).update(padding_mode='reflect'),
    'groups': in_groups,
    'order': lambda module: vars(module).update(order=('conv', 'act', 'norm')),
    'spectral norm': lambda module: nn.utils.spectral_norm(module.conv),
    'norm folded at run time': lambda module: module.turn_on_efficient_conv_bn_eval(True),
}


@pytest.mark.parametrize('change', ['hook', 'half precision', 'meta', *CHANGES])
def test_pyramid_is_mmsegs_where_it_must_be(change, monkeypatch):
    monkeypatch.setattr(pyramid, 'MIN_MACS', 0)
    monkeypatch.setattr(pyramid, '_conv_resized', lambda *args: pytest.fail('the convolution was taken apart'))
    theirs, ours = (model.float().eval() for model in pair())
    if change == 'meta':  # where multiply-accumulates are counted, which are to be the published network's
        counts = []
        for head in (theirs.decode_head.to('meta'), ours.decode_head.to('meta')):
            with FlopCounterMode(display=False) as counter:
                head([torch.empty(1, c, 64 >> i, 64 >> i, device='meta') for i, c in enumerate(CHANNELS)])
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
        return
    x = torch.randn(1, 3, 64, 64)
    seen = []
    for model in (theirs, ours):
        for module in (model.decode_head.fpn_bottleneck, model.decode_head.bottleneck):
            if change == 'hook':
                module.conv.register_forward_hook(lambda module, args, out: seen.append(out))
            if change in CHANGES:
                torch.manual_seed(0)
                CHANGES[change](module)
    features = theirs.extract_feat(x)  # in float32: only the head runs under autocast
    with torch.no_grad(), torch.autocast('cpu', torch.float16, enabled=change == 'half precision'):
        a, b = theirs.decode_head(features), ours.decode_head(features)
    torch.testing.assert_close(
        b, a, rtol=1e-4, atol=1e-4 if change != 'half precision' else 0.01 * a.abs().max().item()
    )
    assert len(seen) == (4 if change == 'hook' else 0)


@pytest.mark.parametrize('taken_apart', [False, True])
def test_features_stay_in_channels_last_memory(taken_apart):
    ours = build(config('replk_mm.')).eval()
    if not taken_apart:
        for module in (ours.decode_head.fpn_bottleneck, ours.decode_head.bottleneck):
            module.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        logits = ours(torch.randn(1, 3, 96, 96, dtype=torch.float64))
    assert logits.is_contiguous(memory_format=torch.channels_last) and not logits.is_contiguous()


def predict(model: nn.Module, x: torch.Tensor, metas: list[dict] | None) -> list[SegDataSample]:
    samples = None if metas is None else [SegDataSample(metainfo=meta) for meta in metas]
    with torch.no_grad():
        return model.eval()(x, samples, mode='predict')


def assert_same_predictions(theirs, ours, x, metas) -> list[SegDataSample]:
    found = predict(ours, x, metas)
    for a, b in zip(predict(theirs, x, metas), found, strict=True):
        assert torch.equal(b.pred_sem_seg.data, a.pred_sem_seg.data)
        assert b.pred_sem_seg.data.dtype == a.pred_sem_seg.data.dtype
        assert len(a.pred_sem_seg.data.unique()) > 1
        assert b.metainfo == a.metainfo
        torch.testing.assert_close(b.seg_logits.data, a.seg_logits.data, rtol=1e-9, atol=1e-11)
    return found


METAS = {
    'resized': dict(img_shape=(64, 96), ori_shape=(50, 77)),
    'same size': dict(img_shape=(64, 96), ori_shape=(64, 96)),
    'enlarged': dict(img_shape=(64, 96), ori_shape=(130, 101)),
    'padded by the preprocessor': dict(
        img_shape=(60, 90), ori_shape=(50, 77), pad_shape=(64, 96), img_padding_size=(0, 6, 0, 4)
    ),
    'padded by the pipeline': dict(
        img_shape=(60, 90), ori_shape=(50, 77), pad_shape=(64, 96, 3), padding_size=[2, 4, 1, 3]
    ),
    'flipped': dict(img_shape=(64, 96), ori_shape=(50, 77), flip=True, flip_direction='horizontal'),
    'upside down and padded': dict(
        img_shape=(60, 90),
        ori_shape=(50, 77),
        pad_shape=(64, 96),
        flip=True,
        flip_direction='vertical',
        padding_size=[0, 6, 0, 4],
    ),
    'not flipped': dict(img_shape=(64, 96), ori_shape=(50, 77), flip=False, flip_direction=None),
    'not flipped either': dict(img_shape=(64, 96), ori_shape=(50, 77), flip=False, flip_direction='horizontal'),
}
SLIDE = dict(mode='slide', crop_size=(48, 48), stride=(32, 32))


@functools.cache
def evaluated(align_corners: bool, mode: str) -> tuple[nn.Module, nn.Module]:
    return pair(head=dict(align_corners=align_corners), **(dict(test_cfg=SLIDE) if mode == 'slide' else {}))


@pytest.mark.parametrize('align_corners, mode', [(False, 'whole'), (True, 'whole'), (True, 'slide')])
@pytest.mark.parametrize('case', METAS)
def test_prediction_is_mmsegs(case, align_corners, mode):
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert_same_predictions(*evaluated(align_corners, mode), x, [METAS[case]] * 2)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_prediction_without_samples(mode):
    assert_same_predictions(*evaluated(False, mode), torch.randn(2, 3, 64, 70, dtype=torch.float64), None)


def test_images_of_different_sizes_in_a_batch():
    assert_same_predictions(
        *evaluated(False, 'whole'),
        torch.randn(2, 3, 64, 96, dtype=torch.float64),
        [METAS['resized'], METAS['upside down and padded']],
    )


def test_kept_logits_are_mmsegs_way():
    theirs, ours = build(config()), build(config('replk_mm.', keep_logits=True))
    ours.load_state_dict(theirs.state_dict())
    (found,) = assert_same_predictions(theirs, ours, torch.randn(1, 3, 64, 96, dtype=torch.float64), [METAS['resized']])
    assert type(found.seg_logits) is PixelData and 'data' in found.seg_logits


def test_heads_of_mmseg_in_our_segmentor():
    theirs = build(config())
    mixed = build(ConfigDict({**config(), 'type': 'replk_mm.EncoderDecoder'}))
    mixed.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert_same_predictions(theirs, mixed, x, [METAS['padded by the pipeline']] * 2)
    assert torch.equal(mixed(x), theirs(x))


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_head_with_its_own_predict_is_called(mode):
    ours = build(config('replk_mm.', **(dict(test_cfg=SLIDE) if mode == 'slide' else {})))

    sizes = []

    class Negative(type(ours.decode_head)):
        def predict_by_feat(self, logits, metas):
            found = super().predict_by_feat(logits, metas)
            sizes.append(tuple(found.shape[2:]))
            return -found

    x, metas = torch.randn(1, 3, 64, 96, dtype=torch.float64), [METAS['resized']]
    before = predict(ours, x, metas)[0].seg_logits.data
    ours.decode_head.__class__ = Negative
    (after,) = predict(ours, x, metas)
    assert sizes == ([(64, 96)] if mode == 'whole' else [(48, 48)] * 6)
    torch.testing.assert_close(after.seg_logits.data, -before)
    assert torch.equal(after.pred_sem_seg.data[0], before.argmin(0))


def test_logits_are_computed_when_read():
    ours = build(config('replk_mm.'))
    (sample,) = predict(ours, torch.randn(1, 3, 64, 96, dtype=torch.float64), [METAS['resized']])
    assert isinstance(sample.seg_logits, DeferredLogits) and 'data' not in sample.seg_logits
    assert sample.to_dict()['seg_logits'] == {}  # what metrics are given
    with pytest.raises(AttributeError, match='no attribute'):
        _ = sample.seg_logits.scores
    assert sample.seg_logits.shape == (50, 77)
    assert torch.equal(sample.seg_logits.data.argmax(0), sample.pred_sem_seg.data[0])
    assert sample.to_dict()['seg_logits']['data'] is sample.seg_logits.data


@pytest.mark.parametrize('name', ['encode_decode', 'inference', 'slide_inference', 'postprocess_result'])
def test_a_segmentor_that_predicts_in_its_own_way_does(name, monkeypatch):
    theirs, ours = pair(test_cfg=SLIDE)
    called = []

    class Own(type(ours)):
        pass

    setattr(Own, name, lambda self, *args: (called.append(name), getattr(type(theirs), name)(self, *args))[1])
    assert ours.predicts_by_rows
    ours.__class__ = Own
    assert not ours.predicts_by_rows
    assert_same_predictions(theirs, ours, torch.randn(1, 3, 64, 96, dtype=torch.float64), [METAS['resized']])
    assert called


@pytest.mark.parametrize(
    'test_cfg, words',
    [
        (dict(mode='slide', crop_size=(16, 16), stride=(20, 16)), 'test_cfg.stride'),
        (dict(mode='tiles'), "test_cfg.mode='tiles'"),
    ],
)
def test_other_ways_to_slide_are_rejected(test_cfg, words):
    with pytest.raises(UserError, match=words):
        predict(build(config('replk_mm.', test_cfg=test_cfg)), torch.randn(1, 3, 64, 96, dtype=torch.float64), None)


@pytest.mark.parametrize(
    'copied',
    [
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: x.cpu(),
        lambda x: x.to('cpu'),
        lambda x: x.clone(),
        lambda x: x.new(),
        lambda x: x[:, :],
        lambda x: x.numpy().to_tensor(),
    ],
)
def test_copies_of_logits_are_plain(copied):
    (sample,) = predict(build(config('replk_mm.')), torch.randn(1, 3, 64, 96, dtype=torch.float64), [METAS['resized']])
    other = copied(sample.seg_logits)
    assert type(other) is PixelData and torch.equal(other.data, sample.seg_logits.data)


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('factor', [4, pytest.param(8, marks=pytest.mark.slow)])
def test_sliding_windows_hold_no_large_logits(factor, monkeypatch):
    """Neither at the network's input's size nor at the photograph's."""
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**16)
    theirs, ours = (model.float() for model in pair(test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(24, 24))))
    largest, size = {}, (32 * factor, 33 * factor)
    x = torch.randn(1, 3, *size)
    for model in (theirs, ours):
        with LargestTensor() as found:
            predict(model, x, [dict(img_shape=size, ori_shape=(300, 400))])
        largest[model] = found.numel
    assert largest[theirs] >= CLASSES * 300 * 400
    assert largest[ours] <= max(300 * 400, x.numel())  # the class map, the image


@pytest.mark.usefixtures('one_thread')
def test_prediction_and_loss_hold_no_large_logits(monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**16)
    theirs, ours = (model.float() for model in pair())
    x, samples, meta = torch.randn(IMAGE), labelled((256, 256)), dict(img_shape=(64, 64), ori_shape=(300, 400))
    largest = {}
    for model in (theirs, ours):
        copied = copy.deepcopy(samples)
        with LargestTensor() as loss_mode:
            losses = model.train()(x, copied, mode='loss')
            (losses['decode.loss_ce'] + losses['aux.loss_ce']).backward()
        with LargestTensor() as predict_mode:
            predict(model, x[:1], [meta])
        largest[model] = loss_mode.numel, predict_mode.numel
    assert largest[theirs][0] >= 2 * CLASSES * 256 * 256 and largest[theirs][1] >= CLASSES * 300 * 400
    # the labels, and the class map
    assert largest[ours][0] <= 2 * 256 * 256 and largest[ours][1] <= 300 * 400


@pytest.mark.slow
def test_other_programs_find_the_classes_and_pay_for_them_only_then(root):
    """Names resolve from mmengine's and mmseg's registries; a backbone alone imports neither mmseg nor mmdet."""
    program = """
import sys
import replk_mm.mmcv_ops
from mmengine.registry import MODELS
arch = dict(large_kernel_sizes=[5, 5, 5, 3], small_kernel=3, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], dw_ratio=1)
MODELS.build(dict(type='replk_mm.RepLKNet', arch=arch))
from replk_mm.registry import MODELS as OURS
assert OURS.get('RepLKNet') and OURS.get('EncoderDecoders') is None
assert not [name for name in sys.modules if name.split('.')[0] in ('mmseg', 'mmdet')]
for name in ('EncoderDecoder', 'UPerHead', 'FCNHead'):
    assert MODELS.get(f'replk_mm.{name}').__module__ == 'replk_mm.heads.segmentation', name
    assert OURS.get(name) is OURS.get(f'replk_mm.{name}') is MODELS.get(f'replk_mm.{name}')
from mmseg.registry import MODELS as THEIRS
assert THEIRS.get('replk_mm.UPerHead') is OURS.get('UPerHead')
assert THEIRS.get('UPerHead').__module__.startswith('mmseg.')
"""
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# test-time augmentation

VIEWS = [
    ((64, 96), None),
    ((64, 96), 'horizontal'),
    ((80, 112), None),
    ((80, 112), 'vertical'),
    ((41, 57), 'horizontal'),
]


def views(images: int, ori_shape=(50, 77), sizes=VIEWS) -> dict:
    """What the loader gives: lists of views of lists of images."""
    generator, inputs, samples = torch.Generator().manual_seed(0), [], []
    for size, flip in sizes:
        inputs.append([255 * torch.rand(3, *size, generator=generator) for _ in range(images)])
        samples.append(
            [
                SegDataSample(
                    metainfo=dict(
                        img_path=f'{i}.png', img_shape=size, ori_shape=ori_shape, flip=bool(flip), flip_direction=flip
                    ),
                    gt_sem_seg=PixelData(data=torch.full((1, *ori_shape), i)),
                )
                for i in range(images)
            ]
        )
    return dict(inputs=inputs, data_samples=samples)


def in_double(model: nn.Module) -> nn.Module:
    """The preprocessor gives float32."""
    model.eval().double().data_preprocessor.float()
    extract_feat = model.extract_feat
    model.extract_feat = lambda x: extract_feat(x.double())
    return model


def merged(kind: type, model: nn.Module, data: dict) -> list[SegDataSample]:
    with torch.no_grad():
        return kind(module=model).test_step(copy.deepcopy(data))


@pytest.mark.filterwarnings('ignore:The shape of value will convert')
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_labels_are_mmsegs(mode, align_corners):
    cfg = dict(head=dict(align_corners=align_corners), **(dict(test_cfg=SLIDE) if mode == 'slide' else {}))
    theirs, ours = (in_double(model) for model in pair(**cfg))
    kept = build(config('replk_mm.', keep_logits=True, **cfg))
    kept.load_state_dict(theirs.state_dict())
    data = views(2)
    expected = merged(MMSegSegTTAModel, theirs, data)
    for model in (ours, theirs, in_double(kept)):  # in bands, and the ways of other segmentors
        for i, (a, b) in enumerate(zip(expected, merged(SegTTAModel, model, data), strict=True)):
            assert torch.equal(b.pred_sem_seg.data, a.pred_sem_seg.data)
            assert b.pred_sem_seg.data.dtype == a.pred_sem_seg.data.dtype and len(b.pred_sem_seg.data.unique()) > 1
            assert b.img_path == a.img_path == f'{i}.png' and b.ori_shape == (50, 77) and (b.gt_sem_seg.data == i).all()
            assert 'seg_logits' not in b
    assert not torch.equal(expected[0].pred_sem_seg.data, expected[1].pred_sem_seg.data)
    (first,) = merged(SegTTAModel, ours, views(1, sizes=VIEWS[:1]))
    assert not torch.equal(first.pred_sem_seg.data, expected[0].pred_sem_seg.data)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_mmsegs_model_finds_the_logits_of_ours(mode):
    found = [
        merged(MMSegSegTTAModel, in_double(model), views(1))[0].pred_sem_seg.data
        for model in pair(**(dict(test_cfg=SLIDE) if mode == 'slide' else {}))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize('threshold', [0.3, 0.6])
def test_one_channel_is_the_mean_probability(threshold):
    head = dict(num_classes=2, out_channels=1, threshold=threshold, loss_decode=loss(use_sigmoid=True))
    theirs, ours = (in_double(model) for model in pair(head=head, auxiliary=head))
    data = views(2)
    found = merged(SegTTAModel, ours, data)
    for i in range(2):
        shares = []
        for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True):
            view = dict(inputs=[inputs[i]], data_samples=[copy.deepcopy(samples[i])])
            with torch.no_grad():
                shares.append(theirs.test_step(view)[0].seg_logits.data)
        mean = sum(shares) / len(VIEWS)
        assert torch.equal(found[i].pred_sem_seg.data, (mean > threshold).to(mean))
        assert len(found[i].pred_sem_seg.data.unique()) == 2


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_no_view_is_held_at_the_size_of_the_photograph(mode, monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**16)
    theirs, ours = pair(**(dict(test_cfg=SLIDE) if mode == 'slide' else {}))
    data, largest = views(1, (300, 400)), {}
    for kind, model in ((MMSegSegTTAModel, theirs), (SegTTAModel, ours)):
        wrapped, given = kind(module=model.float().eval()), copy.deepcopy(data)
        with LargestTensor() as found, torch.no_grad():
            wrapped.test_step(given)
        largest[kind] = found.numel
    assert largest[MMSegSegTTAModel] >= CLASSES * 300 * 400 and largest[SegTTAModel] <= 300 * 400
