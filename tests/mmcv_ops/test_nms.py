"""NMS and Soft-NMS against their definitions in float64, box by box."""

import numpy as np
import pytest
import torch

from replk_mm.mmcv_ops.nms import nms, softnms


def iou(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    corners = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    intersection = (corners[1] - corners[0] + offset).clip(0).prod(1)
    union = (box[2:] - box[:2] + offset).prod() + (others[:, 2:] - others[:, :2] + offset).prod(1) - intersection
    return np.divide(intersection, union, out=np.zeros(len(others)), where=union > 0)


def boxes(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes with integer corners: float32 computes their areas exactly, and many IoUs equal a threshold."""
    corner = torch.randint(0, size, (count, 2), generator=generator)
    extent = torch.randint(0, size // 2, (count, 2), generator=generator)
    return torch.cat([corner, corner + extent], 1).float()


def expected(boxes: torch.Tensor, order: list[int], threshold: float, offset: int) -> list[int]:
    """Greedy suppression of boxes in ``order``: the best one removes those that overlap it more than the threshold."""
    b, left, kept = boxes.double().numpy(), np.array(order, dtype=int), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        left = left[iou(b[best], b[left], offset) < threshold + 1e-9]
    return kept


def test_keeps_the_boxes_of_the_definition_in_1000_cases():
    generator = torch.Generator().manual_seed(0)
    removed = 0
    for case in range(1000):
        count, threshold, offset = case % 91, [0.1, 0.3, 0.5, 0.7][case % 4], case // 2 % 2
        b = boxes(count, 24, generator)
        scores = torch.rand(count, generator=generator)
        if case % 3:  # many equal scores, which torch.sort orders
            scores = (scores * 10).floor() / 10
        order = scores.sort(0, descending=True).indices.tolist()
        kept = nms(b, scores, iou_threshold=threshold, offset=offset)
        assert kept.dtype == torch.long
        assert kept.tolist() == expected(b, order, threshold, offset), case
        removed += count - len(kept)
    assert removed > 5000


@pytest.mark.parametrize('count', [0, 1, 5000])
def test_no_box_one_box_and_5000_boxes(count):
    generator = torch.Generator().manual_seed(1)
    b, scores = boxes(count, 400, generator), torch.rand(count, generator=generator)
    kept = nms(b, scores, iou_threshold=0.5, offset=0).tolist()
    assert kept == expected(b, scores.sort(0, descending=True).indices.tolist(), 0.5, 0)
    assert count < 2 or 100 < len(kept) < 4900


def test_a_box_at_the_threshold_stays():
    b = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 7.0]])  # IoU 0.7, which float32 rounds down
    assert nms(b, torch.tensor([0.9, 0.8]), iou_threshold=0.7, offset=0).tolist() == [0, 1]
    assert nms(b, torch.tensor([0.9, 0.8]), iou_threshold=0.69, offset=0).tolist() == [0]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_boxes(dtype):
    b = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [20, 0, 28, 8]], dtype=dtype)
    assert nms(b, torch.tensor([0.5, 0.9, 0.7], dtype=dtype), iou_threshold=0.5, offset=0).tolist() == [1, 2]


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('min_score', [0.001, 0.2])
def test_softnms(method, offset, min_score):
    generator = torch.Generator().manual_seed(2)
    for count in (0, 1, 2, 40):
        b, scores = boxes(count, 24, generator), torch.rand(count, generator=generator)
        dets = torch.full((count, 5), -1.0)
        arguments = dict(iou_threshold=0.3, sigma=0.5, min_score=min_score, method=method, offset=offset)
        kept = softnms(b, scores, dets, **arguments)
        left, s, found = list(range(count)), scores.double().numpy().copy(), []
        while left:
            best = max(left, key=lambda i: s[i])
            left.remove(best)
            found.append((best, s[best]))
            overlap = iou(b[best].double().numpy(), b[left].double().numpy().reshape(-1, 4), offset)
            high = overlap > 0.3 - 1e-9
            s[left] *= [np.where(high, 0, 1), np.where(high, 1 - overlap, 1), np.exp(-(overlap**2) / 0.5)][method]
            left = [i for i in left if s[i] >= min_score]
        assert kept.tolist() == [i for i, _ in found]
        torch.testing.assert_close(dets[: len(kept), :4], b[kept], rtol=0, atol=0)
        np.testing.assert_allclose(dets[: len(kept), 4], [score for _, score in found], rtol=1e-5)
        assert (dets[len(kept) :] == -1).all()


def test_softnms_resolves_ties_as_mmcv_does():
    """It fills the places of removed boxes from the end, so that of three equal scores the last ones come first."""
    b = torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 3 + [[20.0, 0.0, 29.0, 9.0], [40.0, 0.0, 49.0, 9.0]])
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5])
    kept = softnms(b, scores, torch.zeros(5, 5), iou_threshold=0.3, sigma=0.5, min_score=0.1, method=0, offset=0)
    assert kept.tolist() == [0, 4, 3]
