"""The operators beside torchvision's, and the paths through torchvision, which CPUs do not take by themselves."""

import pytest
import torch

from replk_mm.mmcv_ops import torchvision_ops
from replk_mm.mmcv_ops.nms import nms
from replk_mm.mmcv_ops.roi_align import roi_align_backward, roi_align_forward

pytestmark = pytest.mark.extras('torchvision')


@pytest.fixture(params=[False, True], ids=['torch', 'torchvision'])
def through_torchvision(request, monkeypatch) -> None:
    import torchvision.ops  # noqa: F401 (registers the operators)

    monkeypatch.setattr(torchvision_ops, 'works_on', lambda device_type: request.param)


def test_works_on():
    assert torchvision_ops.works_on('cpu:0')  # another name of the CPU: the test of the operator runs
    assert not torchvision_ops.works_on('cpu') and not torchvision_ops.works_on('meta')


@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.7])
def test_nms(threshold, through_torchvision):
    import torchvision

    removed = 0
    for count in (0, 1, 2, 63, 64, 65, 400):
        corner, scores = torch.rand(count, 2) * 50, torch.rand(count)
        boxes = torch.cat([corner, corner + torch.rand(count, 2) * 30], 1)
        expected = torchvision.ops.nms(boxes, scores, threshold)
        assert torch.equal(nms(boxes, scores, iou_threshold=threshold, offset=0), expected)
        removed += count - len(expected)
    assert removed > 20


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align(aligned, ratio, through_torchvision):
    import torchvision

    features = torch.randn(2, 5, 13, 17, requires_grad=True)
    corner = torch.rand(30, 2) * 60 - 10
    rois = torch.cat([torch.arange(30)[:, None] % 2, corner, corner + torch.rand(30, 2) * 50], 1)
    expected = torchvision.ops.roi_align(features, rois, (7, 5), 0.25, ratio, aligned)
    gradient = torch.randn_like(expected)
    arguments = dict(aligned_height=7, aligned_width=5, spatial_scale=0.25, sampling_ratio=ratio, pool_mode=1)
    output, grad_input = torch.zeros_like(expected), torch.zeros_like(features)
    unused = torch.zeros(0)
    roi_align_forward(features.detach(), rois, output, unused, unused, **arguments, aligned=aligned)
    roi_align_backward(gradient, rois, unused, unused, grad_input, **arguments, aligned=aligned)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward(gradient)
    torch.testing.assert_close(grad_input, features.grad, rtol=1e-5, atol=1e-5)
