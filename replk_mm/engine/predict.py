"""Predict single images with a trained segmentor."""
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch.nn as nn
from mmengine.config import Config

from replk_mm.data.checks import dataset_class
from replk_mm.data.files import damage
from replk_mm.engine.config import build_model, fit_to_machine
from replk_mm.engine.machine import select_device
from replk_mm.engine.prepare import num_classes_of
from replk_mm.errors import UserError
from replk_mm.loading import load_model
from replk_mm.ops import pack
from replk_mm.reparam import reparameterize


def load_segmentor(cfg: Config, checkpoint: str, device: str | None = None, reparam: bool = False,
                   trust: bool = False) -> nn.Module:
    """A segmentor ready to predict, with its classes and palette in ``dataset_meta``.

    Args:
        cfg: The config it was trained with; changed in place.
        checkpoint: Path or address.
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'``, or None for what is there.
        reparam: Merge and fold it.
        trust: See :func:`replk_mm.checkpoints.read`.

    Raises:
        UserError: If the checkpoint does not fit, or the model is no segmentor.
    """
    where = select_device(device)
    fit_to_machine(cfg, None, where, 1)
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('init_cfg', None)  # every weight comes from the checkpoint
    model = build_model(cfg)
    if not hasattr(model, 'decode_head'):
        raise UserError(f'{cfg.filename}: {cfg.model.type} is no segmentor; this predicts label maps only')
    _, meta = load_model(model, checkpoint, trust)
    if reparam:
        reparameterize(model, inplace=True)
    model.cfg = cfg
    dataset = cfg.test_dataloader.dataset
    known = getattr(dataset_class(dataset, cfg.get('default_scope', 'mmengine')), 'METAINFO', {})
    stored = meta.get('dataset_meta') or {}
    found = {**known, **{k.lower(): v for k, v in stored.items() if v}, **(dataset.get('metainfo') or {})}
    classes = list(found.get('classes') or [])
    classes += [f'class {i}' for i in range(len(classes), num_classes_of(model) or 0)]
    if len(found.get('palette') or []) < len(classes):
        found['palette'] = np.random.default_rng(0).integers(0, 255, (len(classes), 3)).tolist()
    setattr(model, 'dataset_meta', {**found, 'classes': classes})  # noqa: B010 (a module's plain attribute)
    model = model.to(where).eval()
    pack(model)
    return model


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture, ``(H, W, 3)`` BGR or ``(H, W)``, in the format of the path's suffix.

    Raises:
        UserError: If it cannot be written.
    """
    if not cv2.imwrite(str(path), picture):
        raise UserError(f'{path}: cannot be written\nMake room or mend the permissions there, or choose another folder.')


def predict(model: nn.Module, images: Sequence[str]) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Path, image ``(H, W, 3)`` BGR and label map ``(H, W)`` of each image.

    Raises:
        UserError: If an image does not exist or cannot be read; those before it have been yielded.
    """
    from mmseg.apis import inference_model
    for name in images:
        path = Path(name)
        if not path.is_file():
            raise UserError(f'{path}: no such image' + (' (it is a folder; name files)' if path.is_dir() else ''))
        image = cv2.imread(str(path)) if damage(path) is None else None
        if image is None:
            raise UserError(f'{path}: not a readable image ({damage(path) or "unknown format"})')
        found = inference_model(model, image).pred_sem_seg.data.squeeze(0).cpu().numpy()
        yield path, image, found.astype(np.uint8)
