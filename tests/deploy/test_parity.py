"""Comparisons of outputs: planted differences are found, and counted as by hand."""

import pytest
import torch
from mmengine.structures import InstanceData

from replk_mm.deploy.parity import TOLERANCES, Tolerance, compare_classes, compare_labels, compare_objects
from replk_mm.errors import UserError

TOLERANCE = Tolerance(1e-4, 0.1, 0.1, 0.9, 0.01)


def test_equal_logits_are_equal() -> None:
    logits = torch.randn(2, 5, 8, 8)
    relative, classes = compare_classes('', [(logits, logits + 1e-7)], TOLERANCE)
    assert relative.ok and classes.ok and classes.difference == 0


def test_other_classes_are_counted() -> None:
    reference = torch.zeros(1, 3, 4, 5)
    reference[:, 1] = 1.0
    changed = reference.clone()
    changed[0, 2, 0, :3] = 2.0  # 3 of 20 pixels
    relative, classes = compare_classes('', [(reference, changed)], TOLERANCE)
    assert classes.difference == pytest.approx(3 / 20) and not classes.ok
    assert relative.difference == pytest.approx(2.0) and not relative.ok


def test_one_channel_is_compared_by_its_sign() -> None:
    reference = torch.tensor([-1.0, 1.0, 2.0, -3.0]).view(1, 1, 2, 2)
    assert compare_classes('', [(reference, -reference)], TOLERANCE)[1].difference == 1.0
    assert compare_classes('', [(reference, 2 * reference)], TOLERANCE)[1].difference == 0.0


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite_are_different(value) -> None:
    logits = torch.randn(1, 3, 4, 4)
    broken = logits.clone()
    broken[0, 0, 0, 0] = value
    assert not any(found.ok for found in compare_classes('', [(logits, logits), (logits, broken)], TOLERANCES['int8']))


def objects(*found: tuple, masks: torch.Tensor | None = None) -> InstanceData:
    boxes, scores, labels = zip(*found, strict=True) if found else ((), (), ())
    data = dict(
        bboxes=torch.tensor(boxes).float().view(-1, 4), scores=torch.tensor(scores), labels=torch.tensor(labels).long()
    )
    return InstanceData(**data, **({} if masks is None else dict(masks=masks)))


A, B = [0, 0, 10, 10], [20, 20, 40, 40]


@pytest.mark.parametrize(
    ('found', 'share'),
    [
        ([(A, 0.9, 0), (B, 0.8, 1)], 0.0),
        ([(B, 0.805, 1), (A, 0.9, 0)], 0.0),  # in another order
        ([(A, 0.9, 0)], 1 / 3),  # one is missing: 1 of 2 + 1
        ([(A, 0.9, 1), (B, 0.8, 1)], 2 / 4),  # another class
        ([([5, 0, 15, 10], 0.9, 0), (B, 0.8, 1)], 2 / 4),  # another box
        ([(A, 0.5, 0), (B, 0.8, 1)], 2 / 4),  # another score
        ([(A, 0.9, 0), (A, 0.9, 0), (B, 0.8, 1)], 1 / 5),  # found twice
        ([(A, 0.9, 0), (B, 0.8, 1), (B, 0.01, 2)], 0.0),  # below the least score
        ([], 1.0),
    ],
)
def test_objects_without_a_counterpart_are_counted(found, share) -> None:
    reference = objects((A, 0.9, 0), (B, 0.8, 1))
    [result] = compare_objects('', [(reference, objects(*found))], TOLERANCE)
    assert result.difference == pytest.approx(share)
    assert result.ok is (share <= TOLERANCE.objects)


def test_a_score_on_either_side_of_the_limit_is_no_difference() -> None:
    pair = (objects((A, 0.0500004, 0)), objects((A, 0.0499999, 0)))
    [found] = compare_objects('', [pair], TOLERANCE)
    assert found.difference == 0 and found.count == 1


def test_shares_are_of_all_images() -> None:
    same, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert compare_classes('', [(same, same)] * 9 + [(same, other)], TOLERANCE)[1].difference == pytest.approx(0.1)
    one, none = objects((A, 0.9, 0)), objects()
    assert compare_objects('', [(one, one), (one, none)], TOLERANCE)[0].difference == pytest.approx(1 / 3)


def test_the_threshold_of_one_channel_decides() -> None:
    logits = torch.tensor([0.2, 0.4]).logit().view(2, 1, 1)
    assert compare_classes('', [(logits, logits.flip(0))], TOLERANCE)[1].difference == 0.0
    assert compare_classes('', [(logits, logits.flip(0))], TOLERANCE, threshold=0.3)[1].difference == 1.0


def test_label_maps_are_compared() -> None:
    labels = torch.tensor([[[0, 1], [2, 3]]])
    found = compare_labels('', [(labels, labels), (labels, labels.flip(2))], TOLERANCE)
    assert found.difference == pytest.approx(0.5) and found.count == 8 and not found.ok


def test_images_without_objects_are_equal() -> None:
    [found] = compare_objects('', [(objects(), objects())], TOLERANCE)
    assert found.ok and found.count == 0


def test_masks_are_compared_where_either_is() -> None:
    one, other = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    one[0, :4], other[0, :4, :6] = True, True  # 32 pixels, 8 of which are missing
    pair = (objects((A, 0.9, 0), masks=one), objects((A, 0.9, 0), masks=other))
    masks = compare_objects('', [pair], TOLERANCE)[1]
    assert masks.difference == pytest.approx(8 / 32) and not masks.ok and masks.count == 32


def test_another_size_is_named() -> None:
    with pytest.raises(UserError, match=r'\(1, 2, 16, 16\), torch \(1, 2, 17, 16\)'):
        compare_classes('4 random', [(torch.zeros(1, 2, 17, 16), torch.zeros(1, 2, 16, 16))], TOLERANCES['fp32'])
