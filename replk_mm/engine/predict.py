"""Predict single images with a trained segmentor."""
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DATASETS

from replk_mm import checkpoints
from replk_mm.data.files import damage
from replk_mm.engine.config import build_model, fit_to_machine
from replk_mm.engine.runner import select_device
from replk_mm.errors import UserError
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
    cfg.model.backbone.pop('init_cfg', None)
    model = build_model(cfg)
    if not hasattr(model, 'decode_head'):
        raise UserError(f'{cfg.filename}: {cfg.model.type} is no segmentor; this predicts label maps only')
    _, meta = checkpoints.load_model(model, checkpoint, trust)
    if reparam:
        reparameterize(model, inplace=True)
    model.cfg = cfg
    known = DATASETS.get(cfg.test_dataloader.dataset.type).METAINFO
    given = cfg.test_dataloader.dataset.get('metainfo') or {}
    stored = meta.get('dataset_meta') or {}
    model.dataset_meta = {**known, **{k.lower(): v for k, v in stored.items() if v}, **given}
    return model.to(where).eval()


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
