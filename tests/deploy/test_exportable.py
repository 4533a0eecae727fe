"""Networks as functions of tensors: the same results as mmdet, mmseg and torch, and operators against brute force."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from norms import randomize_norms

from replk_mm.deploy.exportable import exportable, pool_by_matrices
from replk_mm.engine.artefact_model import DetectorPrediction
from replk_mm.errors import UserError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

from replk_mm.deploy.export import trace  # noqa: E402
from replk_mm.deploy.exportable import ExportableModel  # noqa: E402
from replk_mm.deploy.operators import conv2d_same, nms_mask, roi_align_levels  # noqa: E402

NMS = dict(type='nms', iou_threshold=0.5)
BACKBONE = dict(
    type='replk_mm.ConvNeXt',
    arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16]),
    out_indices=(0, 1, 2, 3),
    gap_before_final_norm=False,
)
NECK = dict(type='FPN', in_channels=[8, 8, 16, 16], out_channels=8)
EXTRACTOR = dict(type='SingleRoIExtractor', out_channels=8, featmap_strides=[4, 8, 16, 32], finest_scale=14)


def bbox_head(agnostic: bool, stds: float = 0.1) -> dict:
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[stds, stds, 2 * stds, 2 * stds])
    return dict(
        type='Shared2FCBBoxHead',
        in_channels=8,
        fc_out_channels=16,
        roi_feat_size=7,
        num_classes=3,
        bbox_coder=coder,
        reg_class_agnostic=agnostic,
    )


def two_stage(cascade: bool, agnostic: bool, masks: bool = True, sampling_ratio: int = 0, **test: object) -> dict:
    def extractor(size: int) -> dict:
        return dict(EXTRACTOR, roi_layer=dict(type='RoIAlign', output_size=size, sampling_ratio=sampling_ratio))

    mask_head = dict(
        type='FCNMaskHead', num_convs=1, in_channels=8, conv_out_channels=8, num_classes=3, class_agnostic=agnostic
    )
    parts = dict(mask_roi_extractor=extractor(14), mask_head=mask_head) if masks else {}
    heads = dict(type='StandardRoIHead', bbox_head=bbox_head(agnostic))
    if cascade:
        stages = [bbox_head(agnostic, stds) for stds in (0.1, 0.05, 0.033)]
        heads = dict(type='CascadeRoIHead', num_stages=3, stage_loss_weights=[1, 0.5, 0.25], bbox_head=stages)
    anchors = dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])
    rpn = dict(nms_pre=60, max_per_img=40, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
    rcnn = dict(score_thr=0.05, nms=NMS, max_per_img=20, mask_thr_binary=0.5)
    return dict(
        type='CascadeRCNN' if cascade else 'MaskRCNN' if masks else 'FasterRCNN',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=BACKBONE,
        neck=dict(NECK, num_outs=5),
        rpn_head=dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=anchors),
        roi_head=dict(**heads, bbox_roi_extractor=extractor(7), **parts),
        train_cfg=None,
        test_cfg=dict(rpn=rpn, rcnn={**rcnn, **test}),
    )


def fcos(**test: object) -> dict:
    head = dict(type='FCOSHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1, strides=[4, 8, 16, 32])
    ranges = ((-1, 32), (32, 64), (64, 128), (128, 1e8))
    return dict(
        type='FCOS',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=BACKBONE,
        neck=dict(NECK, num_outs=4),
        bbox_head=dict(head, regress_ranges=ranges, norm_cfg=dict(type='BN'), norm_on_bbox=True),
        test_cfg=dict(dict(nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=NMS, max_per_img=20), **test),
    )


def build(config: dict):
    init_default_scope('mmdet')
    model = MODELS.build(ConfigDict(config))
    # Random heads as they are initialized find the same everywhere.
    for name, parameter in model.named_parameters():
        if 'head' in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return randomize_norms(model).eval()


DETECTORS = {
    'fcos': fcos(),
    'fcos without a limit of candidates': fcos(nms_pre=-1),
    'fcos across classes': fcos(nms=dict(NMS, class_agnostic=True)),
    'faster r-cnn': two_stage(False, False, masks=False),
    'mask r-cnn': two_stage(False, False),
    'mask r-cnn, one box for all classes': two_stage(False, True, sampling_ratio=2),
    'cascade mask r-cnn': two_stage(True, False),
    'cascade mask r-cnn, one box for all classes': two_stage(True, True),
    'without objects': two_stage(True, True, score_thr=1.1),
}


@pytest.mark.parametrize('name', DETECTORS)
@torch.no_grad()
def test_a_detector_finds_what_mmdet_finds(name) -> None:
    model = build(DETECTORS[name])
    image, sizes = torch.randn(2, 3, 96, 128), [(96, 128), (90, 101)]  # the second is padded
    originals = [(48, 32), (30, 50)]  # scaled by other factors along x and y
    metas = [
        dict(img_shape=new, ori_shape=old, scale_factor=(new[1] / old[1], new[0] / old[0]), batch_input_shape=(96, 128))
        for new, old in zip(sizes, originals, strict=True)
    ]
    expected = model.predict(image, [DetDataSample(metainfo=meta) for meta in metas], rescale=True)
    module = exportable(model)
    found = dict(zip(module.outputs, module(image, torch.tensor(sizes).float()), strict=True))
    pasted = DetectorPrediction(model, lambda *inputs: {key: value.clone() for key, value in found.items()})
    again = pasted(image, [DetDataSample(metainfo=meta) for meta in metas], rescale=True)
    assert all(len(sample.pred_instances) for sample in expected) is (name != 'without objects')
    for i, sample in enumerate(expected):
        objects = sample.pred_instances
        count = len(objects)
        torch.testing.assert_close(found['scores'][i, :count], objects.scores)
        scale = torch.tensor(metas[i]['scale_factor']).repeat(2)
        torch.testing.assert_close(found['boxes'][i, :count] / scale, objects.bboxes)
        assert torch.equal(found['labels'][i, :count], objects.labels)
        torch.testing.assert_close(again[i].pred_instances.bboxes, objects.bboxes)
        if 'masks' in objects:
            assert again[i].pred_instances.masks.shape == objects.masks.shape
            assert int((again[i].pred_instances.masks != objects.masks).sum()) <= 1e-4 * objects.masks.numel()
        # The rest is marked as missing.
        assert (found['scores'][i, count:] == 0).all() and (found['labels'][i, count:] == -1).all()
    assert ('masks' in found) is hasattr(model.roi_head if 'fcos' not in name else model, 'mask_head')


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inner = max(width, 0) * max(height, 0)
    return inner / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inner)


def brute_force_nms(boxes: list, scores: list, threshold: float, least: float, limit: int) -> list[bool]:
    """Greedy suppression of one image, in Python's floats."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if scores[i] > least and len(kept) < limit and all(overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


@pytest.mark.parametrize('limit', [3, 100])
def test_suppression_equals_brute_force(limit) -> None:
    corner = torch.rand(3, 40, 2) * 40
    boxes, scores = torch.cat([corner, corner + 5 + torch.rand(3, 40, 2) * 30], 2), torch.rand(3, 40)
    keep = nms_mask(boxes, scores, 0.4, 0.2, limit)
    for i in range(3):
        expected = brute_force_nms(boxes[i].double().tolist(), scores[i].double().tolist(), 0.4, 0.2, limit)
        assert keep[i].tolist() == expected


def test_regions_are_pooled_from_their_level() -> None:
    features = [torch.full((2, 1, 16 >> level, 16 >> level), float(level)) for level in range(3)]
    for level, feature in enumerate(features):
        feature[1] += 10  # the second image
        assert feature.shape[2] == 16 >> level
    rois = torch.tensor([[0, 4, 4, 20, 20], [1, 8, 8, 24, 24], [1, 4, 8, 30, 30], [0, 0, 0, 0, 0]]).float()
    pooled = roi_align_levels(features, rois, torch.tensor([2, 0, 1, 0]), [0.5, 0.25, 0.125], 2, 0)
    assert pooled.shape == (4, 1, 2, 2)
    assert pooled.flatten(1).mean(1)[:3].tolist() == [2.0, 10.0, 11.0]


@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 3), (6, 6), (2, 5)])
@pytest.mark.parametrize('shape', [(7, 12), (6, 6), (3, 2), (17, 31)])
def test_pooling_by_matrices_is_adaptive_pooling(size, shape) -> None:
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(pool_by_matrices(x, size), F.adaptive_avg_pool2d(x, size), rtol=1e-6, atol=1e-6)


class PooledTo(ExportableModel):
    """Pools an image to the size of a strided map, as heads do."""

    outputs = ('pooled',)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        size = self.model(image).shape[2:]
        return (F.adaptive_avg_pool2d(image, size) + F.adaptive_avg_pool2d(image, 1),)


def test_a_trace_pools_images_of_any_size_as_torch() -> None:
    net = PooledTo(torch.nn.Conv2d(3, 1, 3, stride=3, padding=1)).eval()
    program = trace(net, (torch.randn(2, 3, 32, 32),), dynamic=True)
    for shape in ((3, 3, 32, 32), (1, 3, 37, 50), (4, 3, 64, 41)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'side, kernel, stride, dilation, padding',  # as TensorFlow documents: the odd pixel is added at the end
    [
        (5, 3, 1, 1, (1, 1)),
        (5, 3, 2, 1, (1, 1)),
        (6, 3, 2, 1, (0, 1)),
        (8, 5, 2, 1, (1, 2)),
        (7, 5, 2, 1, (2, 2)),
        (9, 2, 1, 1, (0, 1)),
        (7, 1, 2, 1, (0, 0)),
        (9, 3, 2, 2, (2, 2)),
        (10, 3, 2, 2, (1, 2)),
    ],
)
def test_same_padding(side, kernel, stride, dilation, padding) -> None:
    x, weight, bias = (
        torch.randn(2, 4, side, 9).double(),
        torch.randn(6, 2, kernel, 1).double(),
        torch.randn(6).double(),
    )
    found = conv2d_same(x, weight, bias, [stride, 1], [dilation, 1], 2)
    padded = F.pad(x, (0, 0, *padding))
    expected = F.conv2d(padded, weight, bias, (stride, 1), 0, (dilation, 1), 2)
    assert found.shape == (2, 6, -(-side // stride), 9)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    columns = conv2d_same(x.mT, weight.mT, bias, [1, stride], [1, dilation], 2)
    torch.testing.assert_close(columns.mT, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.extras('timm')
def test_convolutions_of_timm_with_same_padding_are_traced_for_any_size() -> None:
    from timm.layers import Conv2dSame

    class Net(ExportableModel):
        outputs = ('features',)

        def extract_feat(self, image: torch.Tensor) -> torch.Tensor:
            return self.model.head(image)

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.extract_feat(image),)

    layers = [
        Conv2dSame(3 if i == 0 else 8, 8, 3, stride=2, groups=1 if i < 2 else 8, bias=i % 2 == 0) for i in range(5)
    ]
    net = torch.nn.Module()
    net.head = torch.nn.Sequential(*layers)
    images = [torch.randn(shape) for shape in ((3, 3, 64, 64), (1, 3, 67, 70), (2, 3, 99, 65))]
    expected = [net.head(x) for x in images]
    exportable(net)  # replaces them in place
    assert not any(isinstance(module, Conv2dSame) for module in net.modules())
    program = trace(Net(net), (torch.randn(2, 3, 64, 64),), dynamic=True)
    for x, features in zip(images, expected, strict=True):
        torch.testing.assert_close(program.module()(x)[0], features, rtol=1e-5, atol=1e-6)


def segmentor(**changes: object) -> dict:
    head = dict(
        type='replk_mm.UPerHead',
        in_channels=[8, 8, 16, 16],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=8,
        num_classes=4,
        norm_cfg=dict(type='BN'),
        align_corners=False,
    )
    config = dict(type='replk_mm.EncoderDecoder', backbone=BACKBONE, decode_head=head, test_cfg=dict(mode='whole'))
    return {**config, **changes}


@torch.no_grad()
def test_a_segmentor_returns_the_logits_of_its_head_and_the_label_map() -> None:
    init_default_scope('mmseg')
    model = randomize_norms(MODELS.build(ConfigDict(segmentor()))).eval()
    image = torch.randn(2, 3, 70, 97)
    expected = model.decode_head(model.extract_feat(image))
    labels = torch.stack([sample.pred_sem_seg.data[0] for sample in model.predict(image)])
    logits, found = exportable(model, labels=True)(image)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (found != labels).float().mean() < 1e-3


@pytest.mark.parametrize(
    'config', [fcos(nms=dict(type='soft_nms')), two_stage(False, False, nms=dict(type='soft_nms'))]
)
def test_other_suppressions_have_no_form(config) -> None:
    with pytest.raises(UserError, match='soft_nms has no form in ONNX; use nms in model.test_cfg'):
        exportable(build(config))


@pytest.mark.parametrize(
    ('config', 'why'),
    [
        (fcos(nms=dict(NMS, score_threshold=0.5)), 'nms in model.test_cfg has score_threshold'),
        (fcos(nms=dict(type='nms', iou_thr=0.5)), 'nms in model.test_cfg has no iou_threshold'),
        (fcos(min_bbox_size=8), 'min_bbox_size'),
    ],
)
def test_settings_with_another_meaning_are_named(config, why) -> None:
    with pytest.raises(UserError, match=why):
        exportable(build(config))


def test_other_activations_are_named() -> None:
    config = two_stage(False, False)
    config['roi_head']['bbox_head']['loss_cls'] = dict(type='SeesawLoss', num_classes=3)
    with pytest.raises(UserError, match='Shared2FCBBoxHead predicts in a way of its own'):
        exportable(build(config))


def test_other_models_are_named() -> None:
    init_default_scope('mmseg')
    heads = [segmentor()['decode_head']] * 2
    cascade = segmentor(type='mmseg.CascadeEncoderDecoder', num_stages=2, decode_head=heads)
    for model, why in (
        (torch.nn.Conv2d(3, 3, 1), 'no segmentor'),
        (MODELS.build(ConfigDict(cascade)), 'cascade of heads'),
    ):
        with pytest.raises(UserError, match=why):
            exportable(model)
