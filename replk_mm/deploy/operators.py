"""Operators whose outputs have simple shapes, and their form in ONNX: two of detectors, and a convolution.

torch.export traces each of them as one operator. Importing this module registers them as ``torch.ops.replk_mm``; a
program that runs a network of format ``torch`` with one of them needs this import.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op('replk_mm::nms_mask', mutates_args=())
def nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int) -> Tensor:
    """Greedy non-maximum suppression of each image.

    Args:
        boxes: ``(N, K, 4)``: left, top, right, bottom in pixels.
        scores: ``(N, K)``.
        iou_threshold: Boxes that overlap a kept box of a higher score by more are suppressed.
        score_threshold: Boxes of at most this score do not take part.
        limit: Largest number of boxes to keep per image.

    Returns:
        Which boxes are kept, ``(N, K)`` bool.
    """
    from mmcv.ops import nms

    keep = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(len(boxes)):
        candidates = (scores[i] > score_threshold).nonzero().squeeze(1)
        if len(candidates):
            chosen = nms(boxes[i, candidates].contiguous(), scores[i, candidates], iou_threshold)[1]
            keep[i, candidates[chosen[:limit]]] = True
    return keep


@nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op('replk_mm::roi_align_levels', mutates_args=())
def roi_align_levels(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], size: int, sampling_ratio: int
) -> Tensor:
    """RoIAlign ("Mask R-CNN", arXiv:1703.06870) of each region on its level of a feature pyramid.

    Args:
        features: Maps of all levels, each ``(N, C, H, W)``.
        rois: ``(R, 5)``: index of the image; left, top, right, bottom in pixels of the image.
        levels: Level of each region, ``(R,)`` int64.
        scales: Pixels of the image to cells, of each level.
        size: Side of the result in bins.
        sampling_ratio: Samples per bin and axis; 0 for as many as a bin has cells.

    Returns:
        ``(R, C, size, size)``.
    """
    from mmcv.ops import roi_align

    pooled = features[0].new_zeros(len(rois), features[0].shape[1], size, size)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        of_level = (levels == level).nonzero().squeeze(1)
        if len(of_level):
            pooled[of_level] = roi_align(feature, rois[of_level], (size, size), scale, sampling_ratio, 'avg', True)
    return pooled


@roi_align_levels.register_fake
def _(
    features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], size: int, sampling_ratio: int
) -> Tensor:
    return features[0].new_empty(rois.shape[0], features[0].shape[1], size, size)


@torch.library.custom_op('replk_mm::conv2d_same', mutates_args=())
def conv2d_same(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Convolution with the padding ``SAME`` of TensorFlow, which depends on the size of the input.

    With the padding written out, the size of each layer is a formula of that before, and torch.export takes longer
    than anybody waits for the formulas of a whole network.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(K, C / groups, kernel height, kernel width)``.
        bias: ``(K,)``, or None.
        stride: Of rows and columns.
        dilation: Of rows and columns.
        groups: As of :func:`torch.nn.functional.conv2d`.

    Returns:
        ``(N, K, ceil(H / stride), ceil(W / stride))``.
    """
    padding = list[int]()
    for side, kernel, step, spread in zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True):
        total = max((-(-side // step) - 1) * step + (kernel - 1) * spread + 1 - side, 0)
        padding = [total // 2, total - total // 2, *padding]  # columns first
    return F.conv2d(F.pad(x, padding), weight, bias, list(stride), 0, list(dilation), groups)


@conv2d_same.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    sides = [(side + step - 1) // step for side, step in zip(x.shape[2:], stride, strict=True)]
    return x.new_empty(x.shape[0], weight.shape[0], *sides)


#: Opset of the ONNX operators: RoiAlign has ``coordinate_transformation_mode`` from 16 on.
OPSET = 18


def onnx_translations() -> dict[Callable, Callable]:
    """The ``custom_translation_table`` of :func:`torch.onnx.export` for the operators of this module."""
    from onnxscript import opset18 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def floats(value: float) -> Any:
        return op.Constant(value_floats=[value])

    def nms(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float, limit: int) -> Any:
        selected = op.NonMaxSuppression(
            boxes, op.Unsqueeze(scores, ints(1)), ints(limit), floats(iou_threshold), floats(score_threshold)
        )  # (S, 3): image, class, box
        where = op.Gather(selected, ints(0, 2), axis=1)
        ones = op.Expand(floats(1.0), op.Shape(where, start=0, end=1))
        zeros = op.Expand(floats(0.0), op.Shape(scores))
        return op.Greater(op.ScatterND(zeros, where, ones), floats(0.5))

    def roi_align(
        features: Sequence[Any], rois: Any, levels: Any, scales: Sequence[float], size: int, sampling_ratio: int
    ) -> Any:
        images = op.Cast(op.Squeeze(op.Slice(rois, ints(0), ints(1), ints(1)), ints(1)), to=7)  # int64
        boxes = op.Slice(rois, ints(1), ints(5), ints(1))
        shape = op.Concat(
            op.Shape(rois, start=0, end=1), op.Shape(features[0], start=1, end=2), ints(size, size), axis=0
        )
        pooled = op.Expand(floats(0.0), shape)
        for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
            where = op.NonZero(op.Equal(levels, ints(level)))  # (1, number of regions)
            of_level = op.Squeeze(where, ints(0))
            of_level = op.RoiAlign(
                feature,
                op.Gather(boxes, of_level),
                op.Gather(images, of_level),
                coordinate_transformation_mode='half_pixel',
                output_height=size,
                output_width=size,
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
            pooled = op.ScatterND(pooled, op.Transpose(where, perm=[1, 0]), of_level)
        return pooled

    def same(x: Any, weight: Any, bias: Any, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Any:
        return op.Conv(x, weight, bias, strides=stride, dilations=dilation, group=groups, auto_pad='SAME_UPPER')

    operators = torch.ops.replk_mm
    return {
        operators.nms_mask.default: nms,
        operators.roi_align_levels.default: roi_align,
        operators.conv2d_same.default: same,
    }
