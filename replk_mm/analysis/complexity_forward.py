"""One pass over an image without weights and without choosing boxes, as mmdet's and mmseg's counters made it.

The papers' figures come from ``tools/analysis_tools/get_flops.py`` of mmdetection 2.x and mmsegmentation 0.x, which ran a
``forward_dummy``: no boxes are chosen or suppressed, every box head of a two-stage detector takes the same 1000 regions, every
mask head the first 100 of them, a segmentor ends with its class scores. The versions of today count what one real
image happens to give, a cascade's mask heads on all of its 1000 proposals.
"""
import inspect
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from mmengine.structures import BaseDataElement
from torch import Tensor

#: Regions that each box head takes, and each mask head.
PROPOSALS, MASK_REGIONS = 1000, 100


def forward(model: Any, image: Tensor) -> list[str]:
    """Run all of ``model`` that inference runs and that does not depend on the values of pixels.

    Args:
        model: A segmentor, detector or backbone without weights; the extractors of regions are replaced.
        image: ``(1, 3, H, W)`` on the meta device.

    Returns:
        What is taken for granted and what was left out, a line each.
    """
    if isinstance(getattr(model, 'roi_head', None), nn.Module):
        return _two_stages(model, image)
    size = tuple(image.shape[2:])
    if 'data_samples' not in inspect.signature(model.forward).parameters:
        model(image)
        return []
    sample = BaseDataElement(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
                                           scale_factor=(1., 1.)))
    model(image, [sample])
    if hasattr(model, 'decode_head'):
        return ['not run: resizing the class scores to the image, taking the best class; sliding windows and scales of a '
                'test recipe multiply the whole']
    return ['not run: decoding boxes and suppressing doubles (NMS)']


def forward_auxiliary(model: Any, image: Tensor) -> list[str]:
    """Run the auxiliary heads of a segmentor, which only train."""
    head = getattr(model, 'auxiliary_head', None)
    if isinstance(head, nn.Module):
        features = model.extract_feat(image)
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            part(features)
    return []


def _two_stages(model: Any, image: Tensor) -> list[str]:
    cut: Counter[tuple[int, int, int]] = Counter()
    for module in model.modules():
        if hasattr(module, 'roi_layers') and hasattr(module, 'out_channels'):
            module.forward = partial(_regions, module, cut)
    features = model.extract_feat(image)
    for name in ('rpn_head', 'semantic_head'):
        if isinstance(getattr(model, name, None), nn.Module):
            getattr(model, name)(features)
    head, boxes = model.roi_head, torch.zeros(PROPOSALS, 5, device=image.device)
    for wanted, call, regions in ((head.with_bbox, head._bbox_forward, boxes),
                                  (head.with_mask, head._mask_forward, boxes[:MASK_REGIONS])):
        stages: list[tuple[int, ...]] = [(i,) for i in range(getattr(head, 'num_stages', 0))] or [()]
        for stage in stages if wanted else []:
            call(*stage, features, regions)
    sizes = ', '.join(f'{times} x {regions} regions of {height}x{width}' for (regions, height, width), times in cut.items())
    masks = (f', every mask head {MASK_REGIONS}', ', pasting masks') if head.with_mask else ('', '')
    return [f'regions: every box head takes {PROPOSALS}{masks[0]}',
            f'not run: RoIAlign ({sizes}), decoding boxes and suppressing doubles (NMS){masks[1]}']


def _regions(extractor: Any, cut: Counter, features: tuple[Tensor, ...], regions: Tensor, *_: object) -> Tensor:
    """What an extractor would cut out of the features: ``(regions, channels, height, width)``."""
    size = extractor.roi_layers[0].output_size
    height, width = (size, size) if isinstance(size, int) else size
    cut[len(regions), height, width] += 1
    return torch.empty(len(regions), extractor.out_channels, height, width, device=features[0].device)
