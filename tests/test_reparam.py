"""Merging and folding: exact on whole networks, left undone where it would not be, and the proof notices a wrong one."""
import copy
import math

import pytest
import torch
from conftest import randomize_norms
from mmcv.cnn import ConvModule
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from replk_mm.equivalence import compare, network_outputs
from replk_mm.models import ConvNeXt, RepLKNet
from replk_mm.models.replknet import ConvFFN, ReparamLargeKernelConv
from replk_mm.ops import DepthwiseConv2d
from replk_mm.reparam import reparameterize

TINY = dict(large_kernel_sizes=[13, 11, 9, 7], small_kernel=5, layers=[1, 1, 2, 1], channels=[8, 12, 16, 24], dw_ratio=1)
CHANNELS = TINY['channels']
BN = dict(type='BN')


def backbone(**kwargs) -> RepLKNet:
    return randomize_norms(RepLKNet(TINY, **kwargs))


def norms(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def largest_gap(a, b) -> float:
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in zip(a, b, strict=True))


# by hand

def test_merge_by_hand():
    """Two channels, a 3x3 kernel beside a 1x1 kernel, every number worked out on paper."""
    block = ReparamLargeKernelConv(2, 3, 1, 1, False, BN).double().eval()
    with torch.no_grad():
        large, small = block.lkb_origin, block.small_conv
        large.conv.weight.copy_(torch.arange(18.).view(2, 1, 3, 3))
        small.conv.weight.copy_(torch.tensor([10., 20.]).view(2, 1, 1, 1))
        for branch, mean, var, weight, bias in ((large, (1, 2), (4, 9), (2, 6), (5, 7)),
                                                (small, (3, -1), (1, .25), (1, 2), (-1, 0))):
            branch.bn.eps = 0.
            for tensor, value in ((branch.bn.running_mean, mean), (branch.bn.running_var, var),
                                  (branch.bn.weight, weight), (branch.bn.bias, bias)):
                tensor.copy_(torch.tensor(value))
    merged, changes = reparameterize(block, fold=False)
    # Scales: large 2/2 = 1 and 6/3 = 2; small 1/1 = 1 and 2/.5 = 4.
    expected = torch.tensor([[0, 1, 2, 3, 4 + 10, 5, 6, 7, 8], [18, 20, 22, 24, 26 + 80, 28, 30, 32, 34]]).double()
    assert merged.lkb_reparam.weight.equal(expected.view(2, 1, 3, 3))
    # Biases: large 5 - 1 * 1 = 4 and 7 - 2 * 2 = 3; small -1 - 3 * 1 = -4 and 0 + 1 * 4 = 4.
    assert merged.lkb_reparam.bias.tolist() == [0, 7]
    assert changes.merged == [''] and changes.left == []


def test_fold_by_hand():
    """A norm behind a convolution and one in front of it."""
    ffn = ConvFFN(2, .5, 0., BN).double().eval()
    with torch.no_grad():
        ffn.pw1.conv.weight.copy_(torch.tensor([[[[3.]], [[5.]]]]))
        for bn, mean, var, weight, bias in ((ffn.preffn_bn, (1, 2), (4, 1), (2, 3), (0, 1)),
                                            (ffn.pw1.bn, (6,), (16,), (2,), (9,))):
            bn.eps = 0.
            for tensor, value in ((bn.running_mean, mean), (bn.running_var, var), (bn.weight, weight), (bn.bias, bias)):
                tensor.copy_(torch.tensor(value))
    folded, changes = reparameterize(ffn)
    # In front: scales 1 and 3, shifts -1 and 1 - 6 = -5. The convolution becomes (3, 15), its bias -3 - 25 = -28.
    # Behind: scale 2/4 = .5, shift 9 - 3 = 6. Together (1.5, 7.5) and -14 + 6 = -8.
    assert folded.pw1.conv.weight.flatten().tolist() == [1.5, 7.5]
    assert folded.pw1.conv.bias.tolist() == [-8]
    assert sorted(changes.folded) == ['preffn_bn', 'pw1.bn', 'pw2.bn'] and norms(folded) == []


# whole backbones

@pytest.mark.parametrize('kwargs', [{}, dict(arch=dict(TINY, small_kernel=None, dw_ratio=1.5)),
                                    dict(arch=dict(TINY, small_kernel=None, dilation=2, shortcut=False)),
                                    dict(act_cfg=dict(type='SiLU')),
                                    dict(norm_cfg=dict(type='BN', eps=1e-2)), dict(norm_cfg=dict(type='SyncBN'))], ids=str)
def test_backbone_in_float64(kwargs):
    model = randomize_norms(RepLKNet(**{'arch': TINY, **kwargs})).double().eval()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    expected = model(x)
    for merge, fold in ((True, False), (False, True), (True, True)):
        after, changes = reparameterize(model, merge, fold)
        assert largest_gap(expected, after(x)) <= 1e-10
        assert len(changes.merged) == (5 if merge else 0)
        before = len(norms(model))
        branches = sum('.large_kernel.' in n for n in norms(model))
        assert len(changes.folded) == (0 if not fold else before - branches if merge else before)
        assert norms(after) == changes.left
        assert (norms(after) == []) == fold


def test_norms_of_features_stay():
    model = backbone(norm_intermediate_features=True)
    after, changes = reparameterize(model)
    assert norms(after) == changes.left == [f'stages.{i}.norm' for i in range(4)]
    assert all(d.ok for d in compare(model, after))
    assert '4 BatchNorm layers stay (stages.0.norm' in str(changes)


def test_float32_agrees():
    model = backbone()
    after, _ = reparameterize(model)
    found = compare(model, after)
    assert [d.dtype for d in found] == [torch.float64, torch.float32] and all(d.ok for d in found)
    assert 0 < found[0].relative <= 1e-6 and found[1].relative <= 1e-5
    assert all('equal' in str(d) for d in found)


def test_keys_of_the_authors(reference):
    """The merged network has exactly the keys and shapes of the authors' merged files."""
    with torch.device('meta'):
        after, _ = reparameterize(RepLKNet('31B'), fold=False)
        built = RepLKNet('31B', small_kernel_merged=True)
    lines = (reference / 'facts' / 'keys_replknet31b_official_merged.txt').read_text().splitlines()
    for model in (after, built):
        assert [f'{k}\t{tuple(v.shape)}' for k, v in sorted(model.state_dict().items())] == sorted(lines)


def test_structure_equals_that_of_small_kernel_merged():
    after, _ = reparameterize(backbone(), fold=False)
    built = RepLKNet(TINY, small_kernel_merged=True).eval()
    built.load_state_dict(after.state_dict(), strict=True)
    assert all(d.relative == 0 for d in compare(after, built))


# the promises of the call

def test_copy_and_in_place():
    model = backbone().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after, _ = reparameterize(model)
    assert after is not model and model.training and not any(m.training for m in after.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not [n for n, p in after.named_parameters() if p.data_ptr() in theirs]
    same, _ = reparameterize(model, inplace=True)
    assert same is model and norms(model) == [] and not any(m.training for m in model.modules())
    assert model.state_dict().keys() == after.state_dict().keys()


def test_twice_changes_nothing():
    once, _ = reparameterize(backbone())
    twice, changes = reparameterize(once)
    assert changes.merged == changes.folded == changes.left == []
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())


def test_frozen_weights_stay_frozen():
    model = backbone()
    model.stages[0].requires_grad_(False)
    after, _ = reparameterize(model)
    for name, p in after.named_parameters():
        assert p.requires_grad == (not name.startswith('stages.0.')), name


def test_merged_network_trains():
    after, _ = reparameterize(backbone())
    sum(o.square().mean() for o in after.train()(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in after.parameters())


# what must be left alone

class WeightFlip(nn.Conv2d):
    """A convolution that computes something else with its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.flip(-1), self.bias)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def conv(**kwargs):
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


def parametrized():
    module = conv()
    parametrize.register_parametrization(module, 'weight', Double())
    return module


def hooked():
    module = conv()
    module.register_forward_hook(lambda *args: args[-1] * 2)
    return module


LEFT = {
    'another convolution class': lambda: nn.Sequential(WeightFlip(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    'weight standardization': lambda: ConvModule(4, 4, 3, padding=1, conv_cfg=dict(type='ConvAWS'), norm_cfg=BN),
    'parametrized weight': lambda: nn.Sequential(parametrized(), nn.BatchNorm2d(4)),
    'spectral norm': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, with_spectral_norm=True),
    'forward hook': lambda: nn.Sequential(hooked(), nn.BatchNorm2d(4)),
    'transposed convolution': lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    'activation between': lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
    'norm in front of padding': lambda: nn.Sequential(nn.BatchNorm2d(4), conv()),
    'norm first': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('norm', 'conv', 'act')),
    'activation before norm': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('conv', 'act', 'norm')),
    'batch statistics': lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    'another norm class': lambda: nn.Sequential(conv(), DoubledNorm(4)),
    'the norm of something else': lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(1)),
}


def randomized(model):
    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            nn.init.normal_(m.weight)
        elif isinstance(m, _BatchNorm):
            randomize_norms(m)
    return model


@pytest.mark.parametrize('case', LEFT)
def test_left_alone(case):
    model = randomized(LEFT[case]())
    after, changes = reparameterize(model)
    assert changes.folded == [] and changes.left == norms(model) and len(changes.left) == 1
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(after(x), model.eval()(x))


FOLDED = {
    'Sequential': lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()),
    'no affine': lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(4, affine=False)),
    'groups': lambda: nn.Sequential(conv(groups=2), nn.BatchNorm2d(4)),
    'reflected padding': lambda: nn.Sequential(conv(padding_mode='reflect'), nn.BatchNorm2d(4)),
    'stride and dilation': lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, dilation=2), nn.BatchNorm2d(6)),
    'ConvModule': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=BN),
    'ConvModule folded at run time': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=BN, efficient_conv_bn_eval=True),
    'ConvModule with circular padding': lambda: ConvModule(4, 6, 3, padding=1, padding_mode='reflect', norm_cfg=BN),
    'SyncBN': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=dict(type='SyncBN')),
    'depthwise': lambda: nn.Sequential(DepthwiseConv2d(4, 9, bias=False), nn.BatchNorm2d(4)),
    '1d': lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize('case', FOLDED)
def test_folded(case):
    model = randomize_norms(FOLDED[case]()).double().eval()
    after, changes = reparameterize(model)
    assert len(changes.folded) == 1 and changes.left == norms(after) == []
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert (after(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()


def test_reverted_sync_bn_is_folded():
    from mmengine.model import revert_sync_batchnorm
    model = randomize_norms(revert_sync_batchnorm(RepLKNet(TINY, norm_cfg=dict(type='SyncBN'))))
    after, _ = reparameterize(model)
    assert norms(after) == [] and all(d.ok for d in compare(model, after))


def test_group_norm_stays():
    model = RepLKNet(TINY, norm_cfg=dict(type='GN', num_groups=2)).eval()
    after, changes = reparameterize(model)
    assert changes.merged == changes.folded == changes.left == []
    assert after.state_dict().keys() == model.state_dict().keys()


def test_norm_in_front_of_a_padded_convolution():
    """Behind the norm the border is zero; folded, it would be something else."""
    ffn = ConvFFN(4, 1, 0., BN)
    ffn.pw1.conv = conv(bias=False)
    randomize_norms(ffn).double().eval()
    after, changes = reparameterize(ffn)
    assert sorted(changes.folded) == ['pw1.bn', 'pw2.bn'] and changes.left == ['preffn_bn']
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(after(x), ffn(x), rtol=0, atol=1e-12)


def test_shared_convolution_serves_all_its_norms():
    """As in heads that share convolutions between pyramid levels and keep a norm for each."""
    shared = conv()
    model = randomize_norms(nn.ModuleList([nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(2)]))
    for i, branch in enumerate(model):
        randomize_norms(branch[1], seed=i)
    after, changes = reparameterize(model)
    assert changes.folded == [] and len(changes.left) == 2
    x = torch.randn(1, 4, 6, 6)
    assert all(torch.equal(a(x), b.eval()(x)) for a, b in zip(after, model, strict=True))


# segmentors and detectors

def build(cfg, scope):
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(0)
        return randomize_norms(MODELS.build(ConfigDict(copy.deepcopy(cfg)))).eval()


REPLK = dict(type='replk_mm.RepLKNet', arch=TINY)
SEGMENTOR = dict(
    type='EncoderDecoder', backbone=REPLK,
    decode_head=dict(type='UPerHead', in_channels=CHANNELS, in_index=[0, 1, 2, 3], pool_scales=(1, 2), channels=8,
                     num_classes=5, norm_cfg=BN, align_corners=False),
    auxiliary_head=dict(type='FCNHead', in_channels=16, in_index=2, channels=8, num_convs=1, concat_input=False,
                        num_classes=5, norm_cfg=BN, align_corners=False))
CASCADE = dict(
    type='CascadeEncoderDecoder', num_stages=2, backbone=REPLK,
    decode_head=[dict(type='FCNHead', in_channels=16, in_index=2, channels=8, num_convs=1, concat_input=False, num_classes=5,
                      norm_cfg=BN, align_corners=False),
                 dict(type='OCRHead', in_channels=16, in_index=2, channels=8, ocr_channels=4, num_classes=5, norm_cfg=BN,
                      align_corners=False)])


def test_segmentor():
    pytest.importorskip('mmseg')
    model = build(SEGMENTOR, 'mmseg')
    after, changes = reparameterize(model)
    assert norms(after) == changes.left == [] and len(changes.merged) == 5
    assert any(name.startswith('decode_head.') for name in changes.folded)
    assert any(name.startswith('auxiliary_head.') for name in changes.folded)
    found = compare(model, after)
    assert all(d.ok and not d.unproven for d in found)
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(after.encode_decode(image, [dict(img_shape=(64, 64))]),
                          model.encode_decode(image, [dict(img_shape=(64, 64))]), atol=1e-4)


def test_cascade_segmentor():
    pytest.importorskip('mmseg')
    model = build(CASCADE, 'mmseg')
    after, changes = reparameterize(model)
    assert all(d.ok and not d.unproven for d in compare(model, after))


NECK = dict(type='FPN', in_channels=CHANNELS, out_channels=8, num_outs=5, norm_cfg=BN)
ANCHORS = dict(type='AnchorGenerator', scales=[8], ratios=[.5, 1., 2.], strides=[4, 8, 16, 32, 64])
CODER = dict(type='DeltaXYWHBBoxCoder')
RPN = dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS, bbox_coder=CODER)
EXTRACTOR = dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0), out_channels=8,
                 featmap_strides=[4, 8, 16, 32])
BOX = dict(type='Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8, fc_out_channels=16, roi_feat_size=7,
           num_classes=3, norm_cfg=BN, bbox_coder=CODER)
MASK = dict(type='FCNMaskHead', num_convs=2, in_channels=8, conv_out_channels=8, num_classes=3, norm_cfg=BN)
DENSE = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2)
TEST = dict(rpn=dict(nms_pre=10, max_per_img=10, nms=dict(type='nms', iou_threshold=.7), min_bbox_size=0), rcnn=dict())
DETECTORS = {
    'Mask R-CNN': dict(type='MaskRCNN', train_cfg=None, test_cfg=TEST, backbone=REPLK, neck=NECK, rpn_head=RPN, roi_head=dict(
        type='StandardRoIHead', bbox_roi_extractor=EXTRACTOR, bbox_head=BOX, mask_roi_extractor=EXTRACTOR, mask_head=MASK)),
    'Cascade Mask R-CNN': dict(type='CascadeRCNN', test_cfg=TEST, backbone=REPLK, neck=NECK, rpn_head=RPN, roi_head=dict(
        type='CascadeRoIHead', num_stages=3, stage_loss_weights=[1, .5, .25], bbox_roi_extractor=EXTRACTOR,
        bbox_head=[BOX] * 3, mask_roi_extractor=EXTRACTOR, mask_head=[MASK] * 3)),
    'RetinaNet': dict(type='RetinaNet', backbone=REPLK, neck=NECK, bbox_head=dict(
        type='RetinaHead', norm_cfg=BN, anchor_generator=ANCHORS, bbox_coder=CODER, **DENSE)),
    'FCOS': dict(type='FCOS', backbone=REPLK, neck=NECK, bbox_head=dict(
        type='FCOSHead', norm_cfg=BN, strides=[4, 8, 16, 32, 64], **DENSE)),
}
#: Layers whose output every detector's loss or prediction reads, as ends of their names.
ENDS = {
    'Mask R-CNN': ['rpn_head.rpn_cls', 'rpn_head.rpn_reg', 'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg',
                   'roi_head.mask_head.conv_logits'],
    'Cascade Mask R-CNN': ['rpn_head.rpn_cls', 'rpn_head.rpn_reg', *(
        f'roi_head.{head}.{i}.{end}' for i in range(3)
        for head, end in (('bbox_head', 'fc_cls'), ('bbox_head', 'fc_reg'), ('mask_head', 'conv_logits')))],
    'RetinaNet': ['bbox_head.retina_cls', 'bbox_head.retina_reg'],
    'FCOS': ['bbox_head.conv_cls', 'bbox_head.conv_reg', 'bbox_head.conv_centerness'],
}


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name):
    pytest.importorskip('mmdet')
    model = build(DETECTORS[name], 'mmdet')
    after, changes = reparameterize(model)
    assert norms(after) == changes.left == [] and len(changes.merged) == 5
    parts = {path.split('.')[0] for path in changes.folded}
    assert parts == {'backbone', 'neck', 'roi_head' if 'R-CNN' in name else 'bbox_head'}
    assert all(d.ok and d.unproven == [] for d in compare(model, after))
    # Every head's output is in the comparison: it notices when the last layer of any of them is off by little.
    for end in ENDS[name]:
        wrong = copy.deepcopy(after)
        with torch.no_grad():
            wrong.get_submodule(end).bias[-1] += .1 * wrong.get_submodule(end).weight.abs().max() + .1
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            good, bad = (list(flat(network_outputs(m, image))) for m in (after, wrong))
        assert any(not torch.equal(a, b) for a, b in zip(good, bad, strict=True)), end


def flat(nest):
    return [nest] if isinstance(nest, torch.Tensor) else [t for item in nest for t in flat(item)]


def test_separate_norms_of_shared_convolutions():
    pytest.importorskip('mmdet')
    cfg = dict(DETECTORS['RetinaNet'], bbox_head=dict(
        type='RetinaSepBNHead', num_ins=5, norm_cfg=BN, anchor_generator=ANCHORS, bbox_coder=CODER, **DENSE))
    model = build(cfg, 'mmdet')
    for i, m in enumerate(model.modules()):
        if isinstance(m, _BatchNorm):
            randomize_norms(m, seed=i)
    after, changes = reparameterize(model)
    left = [n for n in norms(model) if n.startswith('bbox_head.')]
    assert len(left) == 2 * 2 * 5 and changes.left == left
    assert all(d.ok and not d.unproven for d in compare(model, after))


def test_part_that_does_not_run_is_named():
    pytest.importorskip('mmdet')
    # Two inputs, which are not features alone.
    roi = dict(DETECTORS['Mask R-CNN']['roi_head'], bbox_head=dict(
        type='DoubleConvFCBBoxHead', num_convs=2, num_fcs=1, in_channels=8, conv_out_channels=8, fc_out_channels=8,
        roi_feat_size=7, num_classes=3, norm_cfg=BN, bbox_coder=CODER))
    model = build(dict(DETECTORS['Mask R-CNN'], roi_head=roi), 'mmdet')
    found = compare(model, reparameterize(model)[0])
    assert all(d.ok and d.unproven and all(n.startswith('roi_head.bbox_head.') for n in d.unproven) for d in found)
    assert 'not compared' in str(found[0]) and found[0].unproven[0] in str(found[0])


# the proof itself

@pytest.mark.parametrize('corrupt', ['bias', 'weight', 'shift', 'nan', 'inf'])
def test_wrong_fold_is_noticed(corrupt):
    model = backbone().eval()
    after, _ = reparameterize(model)
    large = after.stages[2].blocks[2].large_kernel.lkb_reparam
    with torch.no_grad():
        if corrupt == 'bias':
            large.bias[3] += .05 * large.bias.abs().max()
        elif corrupt == 'weight':
            large.weight[5, 0, 4, 4] *= -1
        elif corrupt == 'shift':  # the small kernel one pixel off centre
            large.weight.copy_(large.weight.roll(1, -1))
        else:
            large.bias[0] = math.nan if corrupt == 'nan' else math.inf
    found = compare(model, after)
    assert not any(d.ok for d in found)
    assert all('DIFFERENT' in str(d) for d in found)
    assert not any(d.ok for d in compare(after, model))


def test_same_nan_is_no_equality():
    model = backbone()
    with torch.no_grad():
        model.stem[0].bn.bias[0] = math.nan
    assert not any(d.ok for d in compare(model, copy.deepcopy(model)))


class Outputs(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, x):
        return [torch.ones(s, dtype=x.dtype) for s in self.shapes]


def test_other_outputs_are_different():
    assert all(d.ok for d in compare(Outputs((1, 2), (3,)), Outputs((1, 2), (3,))))
    for other in (Outputs((1, 2)), Outputs((1, 2), (1,)), Outputs((1, 2), (3,), (3,)), Outputs()):
        assert not any(d.ok for d in compare(Outputs((1, 2), (3,)), other))
    with pytest.raises(ValueError, match='no output'):
        compare(Outputs(), Outputs())


def test_networks_are_not_changed_by_comparing():
    model = backbone().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compare(model, model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_convnext_has_nothing_to_fold():
    model = ConvNeXt(dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]))
    after, changes = reparameterize(model)
    assert changes.merged == changes.folded == changes.left == []
    assert all(d.relative == 0 for d in compare(model, after))
