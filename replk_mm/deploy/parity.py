"""Compare the outputs of an exported network with those of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replk_mm.deploy.artefact import Comparison


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of one precision."""

    relative: float  #: of logits, relative to the largest one
    pixels: float  #: share of pixels, or of images, with another class
    objects: float  #: share of objects without a counterpart
    iou: float  #: smallest overlap of the boxes of two objects that count as the same
    score: float  #: largest difference of their scores


#: Rounding alone causes much smaller differences in float32. Beyond these a network of lower precision would be of
#: little use; the score on the validation set tells how good it is.
TOLERANCES = {
    'fp32': Tolerance(1e-4, 1e-3, 0.02, 0.99, 1e-3),
    'fp16': Tolerance(1e-2, 1e-2, 0.05, 0.95, 1e-2),
    'bf16': Tolerance(0.1, 0.03, 0.15, 0.8, 0.05),
    'int8': Tolerance(0.5, 0.1, 0.3, 0.6, 0.15),
}


def compare_classes(images: str, reference: Tensor, logits: Tensor, tolerance: Tolerance) -> list[Comparison]:
    """Compare logits ``(N, K, ...)``, and the classes that follow from them."""
    logits = logits.double()
    gap = (reference.double() - logits).abs().max() / reference.double().abs().max().clamp(min=1e-30)
    binary = reference.shape[1] == 1
    before, after = (x[:, 0] > 0 if binary else x.argmax(1) for x in (reference, logits))
    share = (before != after).double().mean().item()
    if not torch.isfinite(logits).all():
        gap, share = torch.tensor(torch.nan), torch.nan
    return [
        Comparison(images=images, output='logits', difference=gap, tolerance=tolerance.relative, unit='relative'),
        Comparison(images=images, output='classes', difference=share, tolerance=tolerance.pixels, unit='share'),
    ]


def compare_objects(
    images: str, reference: Sequence[Any], found: Sequence[Any], tolerance: Tolerance, least_score: float = 0.05
) -> list[Comparison]:
    """Compare detected objects: each should have a counterpart of the same class, box, mask and score.

    Args:
        images: Which images, for the report.
        reference: ``pred_instances`` of torch for each image: ``bboxes``, ``scores``, ``labels``, perhaps ``masks``.
        found: Those of the exported network.
        tolerance: Largest differences.
        least_score: Objects of lower scores are not compared.
    """
    total = unmatched = pixels = differing = 0
    for before, after in zip(reference, found, strict=True):
        before, after = (x[x.scores >= least_score] for x in (before, after))
        total += len(before) + len(after)
        free = torch.ones(len(after), dtype=torch.bool)
        overlap = box_iou(before.bboxes, after.bboxes)
        for i in range(len(before)):
            same = free & (after.labels == before.labels[i]) & (overlap[i] >= tolerance.iou)
            same &= (after.scores - before.scores[i]).abs() <= tolerance.score
            if not same.any():
                unmatched += 1
                continue
            j = int(torch.where(same, overlap[i], -1.0).argmax())
            free[j] = False
            if 'masks' in before:
                pixels += int((before.masks[i] | after.masks[j]).sum())
                differing += int((before.masks[i] ^ after.masks[j]).sum())
        unmatched += int(free.sum())
    share = unmatched / total if total else 0.0
    comparisons = [
        Comparison(images=images, output='objects', difference=share, tolerance=tolerance.objects, unit='share')
    ]
    if pixels:
        share = differing / pixels
        comparisons.append(
            Comparison(images=images, output='masks', difference=share, tolerance=tolerance.objects, unit='share')
        )
    return comparisons


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of boxes ``(M, 4)`` and ``(N, 4)``: ``(M, N)``."""
    corner = torch.maximum(a[:, None, :2], b[None, :, :2])
    inner = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - corner).clamp(min=0).prod(2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b))
    return inner / (area_a[:, None] + area_b[None] - inner).clamp(min=1e-9)
