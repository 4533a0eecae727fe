"""Compare the outputs of an exported network with those of torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replk_mm.deploy.artefact import Comparison
from replk_mm.errors import UserError


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


def compare_classes(
    images: str, pairs: Sequence[tuple[Tensor, Tensor]], tolerance: Tolerance, threshold: float = 0.5
) -> list[Comparison]:
    """Compare logits ``(N, K, ...)``, and the classes that follow from them.

    Args:
        images: Which images, for the report.
        pairs: Logits of torch and of the exported network.
        tolerance: Largest differences.
        threshold: Probability from which a pixel belongs to the class of a single channel. Defaults to 0.5.

    Raises:
        UserError: If the exported network returns another size than torch.
    """
    largest, differing, values, total = 0.0, 0, 0, 0
    for reference, logits in pairs:
        if reference.shape != logits.shape:
            raise UserError(
                f'{images}: the exported network returns logits of shape {tuple(logits.shape)}, torch '
                f'{tuple(reference.shape)}; nothing was written\nExport for one size: --shape H W.'
            )
        gap = (reference.double() - logits.double()).abs().max() / reference.double().abs().max().clamp(min=1e-30)
        largest = float(np.maximum(largest, gap.item()))  # NaN, if one of them is
        before, after = (x[:, 0].sigmoid() > threshold if x.shape[1] == 1 else x.argmax(1) for x in (reference, logits))
        differing += int((before != after).sum())
        values, total = values + logits.numel(), total + before.numel()
    finite = all(torch.isfinite(logits).all() for _, logits in pairs)
    return [
        _relative(images, 'logits', largest, tolerance.relative, values),
        _share(images, 'classes', differing if finite else math.nan, total, tolerance.pixels),
    ]


def compare_labels(images: str, pairs: Sequence[tuple[Tensor, Tensor]], tolerance: Tolerance) -> Comparison:
    """Compare label maps of torch and of the exported network, ``(N, H, W)`` each."""
    differing = sum(int((before != after).sum()) for before, after in pairs)
    return _share(images, 'labels', differing, sum(after.numel() for _, after in pairs), tolerance.pixels)


def compare_objects(
    images: str, pairs: Sequence[tuple[Any, Any]], tolerance: Tolerance, least_score: float = 0.05
) -> list[Comparison]:
    """Compare detected objects: each should have a counterpart of the same class, box, mask and score.

    Args:
        images: Which images, for the report.
        pairs: ``pred_instances`` of torch and of the exported network for each image: ``bboxes``, ``scores``,
            ``labels``, perhaps ``masks``.
        tolerance: Largest differences.
        least_score: Objects of lower scores need no counterpart, but may be one.
    """
    total = unmatched = pixels = differing = 0
    for before, after in pairs:
        found = _match(before, after, tolerance)
        for objects, matched in ((before, set(found)), (after, set(found.values()))):
            counted = [i for i, score in enumerate(objects.scores.tolist()) if score >= least_score]
            total += len(counted)
            unmatched += sum(i not in matched for i in counted)
        for i, j in found.items() if 'masks' in before else ():
            pixels += int((before.masks[i] | after.masks[j]).sum())
            differing += int((before.masks[i] ^ after.masks[j]).sum())
    comparisons = [_share(images, 'objects', unmatched, total, tolerance.objects)]
    if pixels:
        comparisons.append(_share(images, 'pixels of masks', differing, pixels, tolerance.objects))
    return comparisons


def _match(before: Any, after: Any, tolerance: Tolerance) -> dict[int, int]:
    """Indices of the counterparts of objects, those of high scores first."""
    from mmdet.structures.bbox import bbox_overlaps

    overlap, free = bbox_overlaps(before.bboxes, after.bboxes), torch.ones(len(after.scores), dtype=torch.bool)
    found = {}
    for i in before.scores.argsort(descending=True).tolist():
        same = free & (after.labels == before.labels[i]) & (overlap[i] >= tolerance.iou)
        same &= (after.scores - before.scores[i]).abs() <= tolerance.score
        if same.any():
            found[i] = int(torch.where(same, overlap[i], -1.0).argmax())
            free[found[i]] = False
    return found


def _relative(images: str, output: str, difference: float, tolerance: float, count: int) -> Comparison:
    return Comparison(
        images=images, output=output, difference=difference, tolerance=tolerance, unit='relative', count=count
    )


def _share(images: str, output: str, differing: float, count: int, tolerance: float) -> Comparison:
    share = differing / count if count else 0.0
    return Comparison(images=images, output=output, difference=share, tolerance=tolerance, unit='share', count=count)
