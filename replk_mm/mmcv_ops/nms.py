"""Non-maximum suppression. All functions accept boxes as corners (x1, y1, x2, y2)."""

import numpy as np
import torch
from torch import Tensor

from replk_mm.mmcv_ops import torchvision_ops

BLOCK = 64  # boxes compared with all later ones at a time: a block's overlaps stay in the cache


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: Shape (N, 4).
        scores: Shape (N,). ``torch.sort`` decides between equal ones.
        iou_threshold: A box is removed if its IoU with a kept box of higher score exceeds it.
        offset: Width and height are ``x2 - x1 + offset`` and ``y2 - y1 + offset``.

    Returns:
        Indices of the kept boxes, by descending score.
    """
    if not offset and torchvision_ops.works_on(boxes.device.type):
        # The compiled operator of mmcv rounds the threshold to float32.
        return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), float(np.float32(iou_threshold)))
    order = scores.sort(0, descending=True).indices  # as mmcv: not stable, so that ties are resolved alike
    left = _with_areas(boxes[order], offset)
    indices, kept = order.cpu().numpy(), []
    while len(indices):
        block, rest = left[:, :BLOCK], left[:, BLOCK:]
        chosen = _greedy(_iou(block[..., None], block[:, None], offset) > np.float32(iou_threshold))
        kept.append(indices[chosen])
        overlap = _iou(block[:, chosen, None], rest[:, None], offset)
        alive = ~(overlap > np.float32(iou_threshold)).any(0)
        indices, left = indices[BLOCK:][alive], rest[:, alive]
    return torch.from_numpy(np.concatenate(kept)).to(order.device) if kept else order


def _with_areas(boxes: Tensor, offset: int) -> np.ndarray:
    """x1, y1, x2, y2 and areas, shape (5, N), in float32."""
    x1, y1, x2, y2 = boxes.detach().float().cpu().numpy().T
    return np.stack([x1, y1, x2, y2, (x2 - x1 + np.float32(offset)) * (y2 - y1 + np.float32(offset))])


def _iou(a: np.ndarray, b: np.ndarray, offset: int) -> np.ndarray:
    """IoU of boxes with areas, shapes (5, ...), which broadcast. 0 for two boxes without an area.

    The order of the operations is that of mmcv, so that results are equal to the last bit. Numpy, because threads for
    such small arrays cost more than they save, above all beside data workers.
    """
    width = np.minimum(a[2], b[2])
    width -= np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3])
    height -= np.maximum(a[1], b[1])
    if offset:
        width += offset
        height += offset
    intersection = np.maximum(width, 0, out=width)
    intersection *= np.maximum(height, 0, out=height)
    union = a[4] + b[4]
    union -= intersection
    with np.errstate(invalid='ignore'):
        return np.fmax(np.divide(intersection, union, out=union), 0, out=union)  # fmax: 0 instead of NaN


def _greedy(overlap: np.ndarray) -> list[int]:
    """The kept ones of boxes in descending order of scores, given which pairs overlap; rows as integers of N bits."""
    removed, kept = 0, []
    for index, row in enumerate(np.packbits(overlap, axis=1, bitorder='little')):
        if not removed >> index & 1:
            kept.append(index)
            removed |= int.from_bytes(row.tobytes(), 'little')
    return kept


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv:1704.04503): lower the scores of overlapping boxes instead of removing them.

    Args:
        boxes: Shape (N, 4), on a CPU.
        scores: Shape (N,).
        dets: Receives boxes and new scores in its first rows, shape (N, 5).
        iou_threshold: From this IoU on, methods 0 and 1 lower scores.
        sigma: Of method 2.
        min_score: Boxes whose score falls below it are removed.
        method: Factor of a score: 0 for 0, 1 for ``1 - IoU``, 2 for ``exp(-IoU**2 / sigma)``.
        offset: As of :func:`nms`.

    Returns:
        Indices of the kept boxes, by descending new score.
    """
    rows = np.concatenate([_with_areas(boxes, offset), scores.detach().float().numpy()[None]])
    order = np.arange(rows.shape[1])
    end = len(order)
    for i in range(len(order)):
        if i >= end:
            break
        best = i + int(rows[5, i:end].argmax())
        rows[:, [i, best]], order[[i, best]] = rows[:, [best, i]], order[[best, i]]
        top, rest = rows[:, i], rows[:, i + 1 : end]
        overlap = _iou(top, rest, offset)
        if method == 2:
            rest[5] *= np.exp(-(overlap * overlap) / np.float32(sigma))
        else:
            high = overlap >= np.float32(iou_threshold)
            rest[5, high] *= (1 - overlap[high]) if method == 1 else 0
        # Removed boxes are replaced by those at the end, as in mmcv: the order decides between equal scores.
        alive = rest[5] >= np.float32(min_score)
        count = int(alive.sum())
        holes = i + 1 + np.flatnonzero(~alive[:count])
        fillers = i + 1 + count + np.flatnonzero(alive[count:])[::-1]
        rows[:, holes], order[holes] = rows[:, fillers], order[fillers]
        end = i + 1 + count
    dets[:end] = torch.from_numpy(rows[[0, 1, 2, 3, 5], :end].T)
    return torch.from_numpy(order[:end])
