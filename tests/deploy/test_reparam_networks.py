"""Merging and folding whole segmentors and detectors."""

import copy

import pytest
import torch
from mmengine.runner import load_checkpoint
from norms import randomize_norms
from reparam_cases import BN, CHANNELS, FCN_HEAD, REPLK, SEGMENTOR, UNIREPLKNET, build, largest_gap, norms
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from replk_mm.deploy.equivalence import compare_networks, network_outputs
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError

CONVNEXT = dict(type='replk_mm.ConvNeXt', arch=dict(depths=[1] * 4, channels=CHANNELS), out_indices=(0, 1, 2, 3))
CONVNEXT['gap_before_final_norm'] = False
CASCADE = dict(
    type='CascadeEncoderDecoder',
    num_stages=2,
    backbone=REPLK,
    decode_head=[
        FCN_HEAD,
        dict(
            type='OCRHead',
            in_channels=16,
            in_index=2,
            channels=8,
            ocr_channels=4,
            num_classes=5,
            norm_cfg=BN,
            align_corners=False,
        ),
    ],
)


#: Networks of other libraries, of which every norm follows a convolution.
BACKBONES = {
    'mmseg': [
        dict(type='mmseg.ResNet', depth=50),
        dict(type='mmseg.ResNetV1c', depth=18, style='caffe'),
        dict(type='mmseg.MobileNetV2'),
        dict(type='mmdet.RegNet', arch='regnetx_400mf'),
    ],
    'mmpretrain': [
        dict(type='mmpretrain.ResNet', depth=50),
        dict(type='mmpretrain.EfficientNet', arch='b0'),
        dict(type='mmpretrain.MobileNetV3', arch='small'),
    ],
    'torchvision': ['resnet18', 'mobilenet_v3_small', 'efficientnet_b0', 'shufflenet_v2_x0_5'],
    'timm': [
        'resnet50',
        'tf_efficientnet_lite0',
        'efficientnet_lite0',
        'efficientnet_b0',
        'regnety_002',
        'mobilenetv3_small_050',
    ],
}


@pytest.mark.parametrize(
    'library, network',
    [
        pytest.param(library, network, marks=[pytest.mark.extras(library)] * (library != 'mmseg'))
        for library, networks in BACKBONES.items()
        for network in networks
    ],
    ids=str,
)
def test_backbones_of_other_libraries(library, network):
    if library == 'timm':
        model = pytest.importorskip('timm').create_model(network, features_only=True)
    elif library == 'torchvision':
        model = pytest.importorskip('torchvision').models.get_model(network)
    else:
        pytest.importorskip(library)
        model = build(network, library)
    randomize_norms(model).double().eval()
    after, changes = reparameterize(model)
    assert len(changes.folded) == len(norms(model)) and norms(after) == changes.left == []
    x = torch.randn(1, 3, 65, 96, dtype=torch.float64)
    with torch.no_grad():
        assert largest_gap(tree_leaves(model(x)), tree_leaves(after(x))) <= 1e-10


def test_checkpointed_blocks_are_left_alone():
    """They depend on whether the input needs a gradient."""
    pytest.importorskip('mmseg')
    model = build(dict(type='mmseg.ResNet', depth=18, with_cp=True), 'mmseg')
    after, changes = reparameterize(model)
    assert changes.folded == ['bn1'] and changes.left == [name for name in norms(model) if name != 'bn1']
    assert all(d.ok for d in compare_networks(model, after))


def test_segmentor():
    pytest.importorskip('mmseg')
    model = build(SEGMENTOR, 'mmseg')
    after, changes = reparameterize(model)
    assert norms(after) == changes.left == [] and len(changes.merged) == 5
    assert any(name.startswith('decode_head.') for name in changes.folded)
    assert any(name.startswith('auxiliary_head.') for name in changes.folded)
    found = compare_networks(model, after)
    assert all(d.ok and not d.not_compared for d in found)
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(
        after.encode_decode(image, [dict(img_shape=(64, 64))]),
        model.encode_decode(image, [dict(img_shape=(64, 64))]),
        atol=1e-4,
    )


def test_cascade_segmentor():
    pytest.importorskip('mmseg')
    model = build(CASCADE, 'mmseg')
    after, changes = reparameterize(model)
    assert all(d.ok and not d.not_compared for d in compare_networks(model, after))


NECK = dict(type='FPN', in_channels=CHANNELS, out_channels=8, num_outs=5, norm_cfg=BN)
ANCHORS = dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])
CODER = dict(type='DeltaXYWHBBoxCoder')
RPN = dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS, bbox_coder=CODER)
EXTRACTOR = dict(
    type='SingleRoIExtractor',
    roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
    out_channels=8,
    featmap_strides=[4, 8, 16, 32],
)
BOX = dict(
    type='Shared4Conv1FCBBoxHead',
    in_channels=8,
    conv_out_channels=8,
    fc_out_channels=16,
    roi_feat_size=7,
    num_classes=3,
    norm_cfg=BN,
    bbox_coder=CODER,
)
MASK = dict(type='FCNMaskHead', num_convs=2, in_channels=8, conv_out_channels=8, num_classes=3, norm_cfg=BN)
DENSE = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2)
TEST = dict(rpn=dict(nms_pre=10, max_per_img=10, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0), rcnn=dict())
DETECTORS = {
    'Mask R-CNN': dict(
        type='MaskRCNN',
        train_cfg=None,
        test_cfg=TEST,
        backbone=REPLK,
        neck=NECK,
        rpn_head=RPN,
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=EXTRACTOR,
            bbox_head=BOX,
            mask_roi_extractor=EXTRACTOR,
            mask_head=MASK,
        ),
    ),
    'Cascade Mask R-CNN': dict(
        type='CascadeRCNN',
        test_cfg=TEST,
        backbone=REPLK,
        neck=NECK,
        rpn_head=RPN,
        roi_head=dict(
            type='CascadeRoIHead',
            num_stages=3,
            stage_loss_weights=[1, 0.5, 0.25],
            bbox_roi_extractor=EXTRACTOR,
            bbox_head=[BOX] * 3,
            mask_roi_extractor=EXTRACTOR,
            mask_head=[MASK] * 3,
        ),
    ),
    'RetinaNet': dict(
        type='RetinaNet',
        backbone=REPLK,
        neck=NECK,
        bbox_head=dict(type='RetinaHead', norm_cfg=BN, anchor_generator=ANCHORS, bbox_coder=CODER, **DENSE),
    ),
    'FCOS': dict(
        type='FCOS',
        backbone=REPLK,
        neck=NECK,
        bbox_head=dict(type='FCOSHead', norm_cfg=BN, strides=[4, 8, 16, 32, 64], **DENSE),
    ),
}
#: Layers whose output every detector's loss or prediction reads, as ends of their names.
ENDS = {
    'Mask R-CNN': [
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
        'roi_head.mask_head.conv_logits',
    ],
    'Cascade Mask R-CNN': [
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        *(
            f'roi_head.{head}.{i}.{end}'
            for i in range(3)
            for head, end in (('bbox_head', 'fc_cls'), ('bbox_head', 'fc_reg'), ('mask_head', 'conv_logits'))
        ),
    ],
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
    assert all(d.ok and d.not_compared == [] for d in compare_networks(model, after))
    # Every head's output is in the comparison: it notices when the last layer of any of them is off by little.
    for end in ENDS[name]:
        wrong = copy.deepcopy(after)
        with torch.no_grad():
            wrong.get_submodule(end).bias[-1] += 0.1 * wrong.get_submodule(end).weight.abs().max() + 0.1
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            good, bad = (list(flat(network_outputs(m, image))) for m in (after, wrong))
        assert any(not torch.equal(a, b) for a, b in zip(good, bad, strict=True)), end


def flat(nest):
    return [nest] if isinstance(nest, torch.Tensor) else [t for item in nest for t in flat(item)]


def test_separate_norms_of_shared_convolutions():
    pytest.importorskip('mmdet')
    cfg = dict(
        DETECTORS['RetinaNet'],
        bbox_head=dict(
            type='RetinaSepBNHead', num_ins=5, norm_cfg=BN, anchor_generator=ANCHORS, bbox_coder=CODER, **DENSE
        ),
    )
    model = build(cfg, 'mmdet')
    for i, m in enumerate(model.modules()):
        if isinstance(m, _BatchNorm):
            randomize_norms(m, seed=i)
    after, changes = reparameterize(model)
    left = [n for n in norms(model) if n.startswith('bbox_head.')]
    assert len(left) == 2 * 2 * 5 and changes.left == left
    assert all(d.ok and not d.not_compared for d in compare_networks(model, after))


def test_part_that_does_not_run_is_named():
    pytest.importorskip('mmdet')
    # Two inputs, which are not features alone.
    roi = dict(
        DETECTORS['Mask R-CNN']['roi_head'],
        bbox_head=dict(
            type='DoubleConvFCBBoxHead',
            num_convs=2,
            num_fcs=1,
            in_channels=8,
            conv_out_channels=8,
            fc_out_channels=8,
            roi_feat_size=7,
            num_classes=3,
            norm_cfg=BN,
            bbox_coder=CODER,
        ),
    )
    model = build(dict(DETECTORS['Mask R-CNN'], roi_head=roi), 'mmdet')
    found = compare_networks(model, reparameterize(model)[0])
    assert all(
        d.ok and d.not_compared and all(n.startswith('roi_head.bbox_head.') for n in d.not_compared) for d in found
    )
    assert 'not compared' in str(found[0]) and found[0].not_compared[0] in str(found[0])


# ---- the form of weights
FORMS = {
    'segmentor': (SEGMENTOR, True, True),
    'merged only': (SEGMENTOR, True, False),
    'BatchNorm in heads only': ({**SEGMENTOR, 'backbone': CONVNEXT}, False, True),
    'our segmentor': ({**SEGMENTOR, 'type': 'replk_mm.EncoderDecoder'}, True, True),
    'detector': (DETECTORS['RetinaNet'], True, True),
    'backbone': (REPLK, False, True),
    'UniRepLKNet': (dict(type='replk_mm.UniRepLKNet', arch=UNIREPLKNET), True, False),
}


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('loader', ['mmengine', 'torch'])
def test_weights_in_another_form_are_rejected_by_other_loaders(name, loader, tmp_path):
    """mmengine, mmseg and mmdet load what fits and log the rest; the outputs would be wrong."""
    cfg, merge, fold = FORMS[name]
    scope = 'mmdet' if name == 'detector' else 'mmseg'
    pytest.importorskip(scope)
    trained = build(cfg, scope)
    merged, _ = reparameterize(trained, merge, fold)
    paths = {}
    for form, model in (('training', trained), ('merged', merged)):
        paths[form] = tmp_path / f'{form}.pth'
        torch.save({'meta': {}, 'state_dict': model.state_dict()}, paths[form])

    def load(model, form):
        if loader == 'mmengine':
            load_checkpoint(model, str(paths[form]))
        else:
            model.load_state_dict(torch.load(paths[form])['state_dict'], strict=False)
        return model

    with pytest.raises(UserError, match=rf'merged form .merge={merge}, fold={fold}., but'):
        load(build(cfg, scope), 'merged')
    empty, _ = reparameterize(build(cfg, scope), merge, fold)
    with pytest.raises(UserError, match='in training form, but'):
        load(empty, 'training')
    for form in ('training', 'merged'):
        model = build(cfg, scope) if form == 'training' else empty
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        assert all(d.ok for d in compare_networks(load(model, form), merged))


@pytest.mark.parametrize('part', ['running_', 'large_kernel', 'stem', 'backbone.stages.0'])
def test_parts_of_the_weights_load_into_both_forms(part):
    trained = build(SEGMENTOR, 'mmseg')
    for model in (trained, reparameterize(trained)[0]):
        weights = {key: value for key, value in model.state_dict().items() if part in key}
        zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
        model.load_state_dict(zeros, strict=False)
        assert not any(value.any() for value in weights.values())
