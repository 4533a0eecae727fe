"""Predict single images with a trained segmentor or detector."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch.nn as nn
from mmengine.config import Config
from mmengine.structures import BaseDataElement

from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import dataset_class, datasets_of
from replk_mm.data.files import read_image
from replk_mm.engine.inference import build_for_inference
from replk_mm.engine.process import select_device
from replk_mm.errors import UserError, explain_errors
from replk_mm.files import write_output
from replk_mm.wrappers import num_classes_of


def load_for_prediction(cfg: Config, checkpoint: str, device: str | None = None, reparam: bool = False) -> nn.Module:
    """Load a segmentor or detector for prediction, with classes and palette in ``dataset_meta``.

    Args:
        cfg: The config it was trained with; changed in place.
        checkpoint: Path or URL.
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'``, or None for a GPU if there is one.
        reparam: Whether to merge and fold it.

    Raises:
        UserError: If the checkpoint does not fit, or the model is neither.
    """
    built = build_for_inference(cfg, checkpoint, device=select_device(device), reparam=reparam, exported=True)
    model = built.model
    if not (is_segmentor(model) or hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')):
        raise UserError(f'{cfg.filename}: {cfg.model.type} is neither a segmentor nor a detector')
    model.cfg = cfg
    scope = cfg.get('default_scope', 'mmengine')
    dataset = next(datasets_of(cfg, ('test',)))
    cfg.test_pipeline = copy.deepcopy(dataset.get('pipeline', []))  # mmseg reads it
    known = getattr(dataset_class(dataset, scope), 'METAINFO', {})
    stored = built.meta.get('dataset_meta') or {}
    found = {**known, **{k.lower(): v for k, v in stored.items() if v}, **(dataset.get('metainfo') or {})}
    classes = list(classes_of(dataset, scope) or found.get('classes') or [])
    classes += [f'class {i}' for i in range(len(classes), num_classes_of(model) or 0)]
    if len(found.get('palette') or []) < len(classes):
        found['palette'] = np.random.default_rng(0).integers(0, 255, (len(classes), 3)).tolist()
    setattr(model, 'dataset_meta', {**found, 'classes': classes})  # noqa: B010 (a module's plain attribute)
    return model


def is_segmentor(model: nn.Module) -> bool:
    """Whether a model predicts label maps."""
    return hasattr(model, 'decode_head')


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture, ``(H, W, 3)`` BGR or ``(H, W)``, in the format of the path's suffix.

    Raises:
        UserError: If it cannot be written.
    """
    write_output(path, cv2.imencode(path.suffix, picture)[1].tobytes())


def predict(model: nn.Module, images: Sequence[str]) -> Iterator[tuple[Path, np.ndarray, BaseDataElement]]:
    """Path, image ``(H, W, 3)`` BGR and prediction of each image.

    Args:
        model: From :func:`load_for_prediction`.
        images: Files.

    Raises:
        UserError: If an image does not exist or cannot be read; earlier images have been yielded.
    """
    for name in images:
        path = Path(name)
        image = read_image(path)
        if is_segmentor(model):
            from mmseg.apis import inference_model as infer
        else:
            from mmdet.apis import inference_detector as infer
        with explain_errors(f'{path}: prediction fails', 'Check that the image has the channels of the training data.'):
            found = infer(model, str(path))  # loads it as the config does, with all channels
        yield path, image, found


def label_map(prediction: BaseDataElement) -> np.ndarray:
    """Class indices ``(H, W)`` of a segmentor's prediction."""
    return prediction.pred_sem_seg.data.squeeze(0).cpu().numpy().astype(np.uint8)


def select_instances(prediction: BaseDataElement, least_score: float) -> list[dict]:
    """Objects of a detector's prediction, highest score first.

    Args:
        prediction: From :func:`predict`.
        least_score: Minimum score.

    Returns:
        For each object its ``label`` (class index), ``score``, ``box`` (left, top, right, bottom in pixels) and, of
        detectors with masks, ``mask`` (``(H, W)`` bool).
    """
    found = prediction.pred_instances.cpu().numpy()
    order = np.argsort(-found.scores, kind='stable')
    masks = found.get('masks')
    return [
        dict(
            label=int(found.labels[i]),
            score=float(found.scores[i]),
            box=[float(v) for v in found.bboxes[i]],
            **({} if masks is None else {'mask': np.asarray(masks[i], dtype=bool)}),
        )
        for i in order
        if found.scores[i] >= least_score
    ]


def describe_instances(prediction: BaseDataElement, objects: Sequence[dict], classes: Sequence[str]) -> str:
    """The number of selected objects of each class; without any, the highest score in the prediction."""
    if objects:
        names = Counter(classes[thing['label']] for thing in objects)
        return f'objects: {", ".join(f"{count} {name}" for name, count in names.most_common())}'
    scores = prediction.pred_instances.scores
    best = f'the highest score is {float(scores.max()):.4g}' if len(scores) else 'the model predicts none'
    return f'no object reaches the minimum score; {best}'


def instances_to_json(objects: Sequence[dict], classes: Sequence[str]) -> list[dict]:
    """Objects of :func:`select_instances` for JSON: class, score, box, and a mask in COCO's RLE."""
    from pycocotools import mask as rle

    def encoded(mask: np.ndarray) -> dict:
        found = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        return dict(size=found['size'], counts=found['counts'].decode())

    return [
        {
            'class': classes[thing['label']],
            'score': thing['score'],
            'box': thing['box'],
            **({'segmentation': encoded(thing['mask'])} if 'mask' in thing else {}),
        }
        for thing in objects
    ]
