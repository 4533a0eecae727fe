"""Effective receptive fields of a segmentor at the centers of objects, by class and by size, beside the IoU."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS

from replk_mm.analysis.receptive_field import ImageShares, contributions, ring_profile
from replk_mm.analysis.statistics import interval
from replk_mm.data.datasets import datasets_of
from replk_mm.data.files import IGNORE_INDEX
from replk_mm.engine.predict import is_segmentor, label_map, load_for_prediction
from replk_mm.engine.prepare import prepare_data
from replk_mm.engine.process import RunOptions
from replk_mm.engine.record import write_record
from replk_mm.errors import UserError
from replk_mm.logs import log_notes

#: Least area of an object in pixels, most objects of an image, and upper ends of COCO's sizes.
_LEAST_AREA, _PER_IMAGE, _SIZES = 64, 8, {'small': 32**2, 'medium': 96**2, 'large': np.inf}


def find_objects(labels: np.ndarray, predicted: np.ndarray) -> Iterator[dict[str, Any]]:
    """The connected regions of a label map ``(H, W)``: ``label``, ``area`` in pixels, ``center``, ``iou``.

    The center is the pixel farthest from the border of the region. The IoU is that with the predicted regions of the
    class that touch the object, without the other objects of the class.
    """
    for label in np.unique(labels[known := labels != IGNORE_INDEX]):
        of_class = labels == label
        regions = cv2.connectedComponents((predicted == label).astype(np.uint8))[1]
        count, objects = cv2.connectedComponents(of_class.astype(np.uint8))
        for mask in (objects == index for index in range(1, count)):
            if (area := int(mask.sum())) >= _LEAST_AREA:
                touching = np.isin(regions, np.setdiff1d(regions[mask], 0))
                depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
                center = np.unravel_index(depth[1:-1, 1:-1].argmax(), mask.shape)
                iou = float((mask & touching).sum() / (mask | touching & ~of_class & known).sum())
                yield dict(label=int(label), area=area, center=np.array(center), iou=iou)


def measure_objects(
    cfg: Config, checkpoint: str, options: RunOptions, count: int, out: Path, stage: int | None = None
) -> list[dict[str, Any]]:
    """Measure at the centers of objects in the first ``count`` test images; write ``objects.json``.

    Args:
        cfg: Config of a segmentor; left unchanged.
        checkpoint: Path or URL.
        options: Device, data root and classes are used.
        count: Largest number of images; of each, at most eight objects at random (seed 0).
        out: Folder for the result.
        stage: Index of the feature map among the backbone's outputs. Defaults to the last.

    Returns:
        A row for each class and each size (COCO's): ``objects``, ``images``, ``mean_area``, ``side`` of the square
        with 50 % of the mean contribution, in pixels of the network's input, ``low`` and ``high`` of its 95 % interval
        over images, and ``iou`` in percent: of a class over all pixels, of a size the mean over objects.
    """
    cfg = copy.deepcopy(cfg)
    log_notes(prepare_data(cfg, options, ('test',)))
    model: Any = load_for_prediction(cfg, checkpoint, options.device)
    if not is_segmentor(model):
        raise UserError(f'{cfg.filename}: a detector has no label maps\nUse --objects with a segmentor.')
    model.requires_grad_(False)
    classes, random = model.dataset_meta['classes'], np.random.default_rng(0)
    dataset = DATASETS.build(next(datasets_of(cfg, ('test',))))
    counts = np.zeros((2, len(classes)))
    found: list[dict[str, Any]] = []
    for i in range(min(count, len(dataset))):
        data = dataset[i]
        predicted = label_map(model.test_step(pseudo_collate([data]))[0])
        labels = data['data_samples'].gt_sem_seg.data.squeeze(0).numpy()
        inputs = model.data_preprocessor(pseudo_collate([data]), False)['inputs']
        for k in range(len(classes)):
            label, prediction = labels == k, (predicted == k) & (labels != IGNORE_INDEX)
            counts[:, k] += (label & prediction).sum(), (label | prediction).sum()
        objects = list(find_objects(labels, predicted))
        objects = [objects[k] for k in random.permutation(len(objects))[:_PER_IMAGE]]
        ratio = np.divide(data['data_samples'].img_shape[:2], labels.shape)  # the input may be padded
        pixels = [((o['center'] + 0.5) * ratio).astype(int) for o in objects]
        places = [tuple(pixel / inputs.shape[2:]) for pixel in pixels]
        scores = contributions(model.backbone, inputs, stage, places)[0].cpu().numpy() if objects else ()
        for item, pixel, score in zip(objects, pixels, scores, strict=True):
            if score.any():
                found.append(dict(item, image=str(i), profile=ring_profile(score / score.sum(), tuple(pixel))))
    rows = [
        _summarize(name, of_class, 100 * counts[0, k] / counts[1, k])
        for k, name in enumerate(classes)
        if (of_class := [o for o in found if o['label'] == k])
    ]
    for (name, most), least in zip(_SIZES.items(), (0, *_SIZES.values()), strict=False):
        if of_size := [o for o in found if least <= o['area'] < most]:
            rows.append(_summarize(f'{name} objects', of_size, 100 * float(np.mean([o['iou'] for o in of_size]))))
    write_record(dict(kind='receptive fields of objects', config=str(cfg.filename), rows=rows), out / 'objects.json')
    return rows


def _summarize(name: str, objects: Sequence[dict[str, Any]], iou: float) -> dict[str, Any]:
    images = sorted({o['image'] for o in objects})
    profiles = np.zeros((len(images), max(len(o['profile']) for o in objects)))
    for o in objects:
        profiles[images.index(o['image']), : len(o['profile'])] += o['profile']
    side = interval([ImageShares(tuple(images), profiles)])
    area = float(np.mean([o['area'] for o in objects]))
    counts = dict(objects=len(objects), images=len(images), mean_area=area)
    return dict(name=name, **counts, side=side.value, low=side.low, high=side.high, iou=iou)
