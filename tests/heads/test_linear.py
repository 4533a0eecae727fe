"""The linear head against torch's own interpolation and cross-entropy, in float64."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from tensors import LargestTensor

from replk_mm.heads.linear import LinearHead, count_labels

CLASSES, CHANNELS = 5, (3, 4, 6)


def head(**kwargs) -> LinearHead:
    made = LinearHead(CHANNELS, CLASSES, range(3), **kwargs).double()
    torch.nn.init.normal_(made.conv_seg.weight)
    return made


def maps(height: int, width: int) -> list[torch.Tensor]:
    """Maps of stride 1, 2 and 4."""
    return [torch.randn(2, c, height >> i, width >> i, dtype=torch.float64) for i, c in enumerate(CHANNELS)]


@pytest.mark.parametrize('shape, size', [((12, 8), (3, 2)), ((13, 30), (4, 7)), ((5, 4), (8, 9))])
def test_loss_is_that_of_pixels_with_the_logits_of_their_cell(shape, size):
    labels = torch.randint(0, CLASSES, (2, *shape))
    labels[torch.rand(labels.shape) < 0.2] = 255
    logits = torch.randn(2, CLASSES, *size, dtype=torch.float64)
    large = F.interpolate(logits, shape, mode='nearest-exact')
    samples = [SegDataSample(gt_sem_seg=PixelData(data=x[None])) for x in labels]
    found = head().loss_by_feat(logits, samples)
    torch.testing.assert_close(found, dict(loss_ce=F.cross_entropy(large, labels, ignore_index=255)))
    counts = count_labels(labels[0], size, CLASSES)
    assert counts.sum(0).tolist() == [(labels[0] == k).sum() for k in range(CLASSES)]


def test_another_label_is_ignored():
    logits, labels = torch.randn(1, CLASSES, 2, 2, dtype=torch.float64), torch.tensor([[1, 2], [2, 4]])
    [loss] = (
        head(ignore_index=2).loss_by_feat(logits, [SegDataSample(gt_sem_seg=PixelData(data=labels[None]))]).values()
    )
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels[None], ignore_index=2))


def test_maps_are_averaged_or_interpolated_to_the_second_to_last_one():
    given = maps(8, 12)
    small = F.interpolate(given[2], (4, 6), mode='bilinear', align_corners=False)
    mean = given[0].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(head().gather(given), torch.cat([mean, given[1], small], 1))
    last = LinearHead([6], CLASSES, [2])
    assert last.gather(given) is not None and torch.equal(last.gather(given), given[2])


def test_features_are_normalized_before_the_linear_layer():
    """Features of another scale and offset give the same logits, as PyTorch's own BatchNorm without parameters."""
    given, net = maps(8, 12), head()
    want = net.conv_seg(F.batch_norm(net.gather(given), None, None, training=True))
    torch.testing.assert_close(net(given), want)
    torch.testing.assert_close(net([1000 * x - 3 for x in given]), want, rtol=0, atol=1e-3)


def test_nothing_has_the_size_of_the_labels_but_the_labels():
    features = [torch.randn(1, c, 16 >> i, 16 >> i, dtype=torch.float64) for i, c in enumerate(CHANNELS)]
    labels = [SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 256, 256, dtype=torch.long)))]
    with LargestTensor() as largest:
        head().loss(features, labels, {})
    assert largest.numel == 256 * 256  # one channel
