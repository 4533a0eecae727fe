"""A config's model whose network is an exported one: the same data, windows, test-time augmentation and metrics."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.checkpoints.io import MANIFEST, read_checkpoint
from replk_mm.data.checks.classes import classes_option
from replk_mm.deploy.artefact import Artefact, Normalization
from replk_mm.errors import UserError


def use_artefact(model: Any, artefact: Artefact) -> None:
    """Replace the network of a model by an exported one, in place. What comes before and after it stays.

    Args:
        model: Segmentor, detector or classifier of the config.
        artefact: The exported network.

    Raises:
        UserError: If it was exported from another kind of model, or for other classes or another normalization.
    """
    _check_fit(model, artefact)
    if artefact.manifest.task == 'detection':
        model.predict = DetectorPrediction(model, artefact)
    else:
        # Everything between the normalized image and the logits; the head keeps what it does with them.
        model.extract_feat = lambda image, **_: artefact(image)['logits']
        head = model.decode_head if artefact.manifest.task == 'segmentation' else model.head
        head.forward = lambda logits, *args, **kwargs: logits
    for name in ('backbone', 'neck', 'rpn_head', 'auxiliary_head'):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())  # its random weights would only take memory


class DetectorPrediction:
    """``predict`` of a detector whose boxes, scores, labels and masks come from an exported network."""

    def __init__(self, model: Any, artefact: Artefact) -> None:
        self.model, self.artefact = model, artefact

    def __call__(self, batch_inputs: Tensor, batch_data_samples: list, rescale: bool = True) -> list:
        from mmengine.structures import InstanceData

        metas = [sample.metainfo for sample in batch_data_samples]
        size = torch.tensor([meta['img_shape'][:2] for meta in metas], dtype=torch.float32)
        found = self.artefact(batch_inputs, size)
        results = []
        for i, meta in enumerate(metas):
            present = found['scores'][i] > 0
            result = InstanceData(
                bboxes=found['boxes'][i][present],
                scores=found['scores'][i][present],
                labels=found['labels'][i][present],
            )
            if 'masks' in found:
                result.masks = self._paste(found['masks'][i][present], result.bboxes, meta, rescale)
            if rescale:
                result.bboxes = result.bboxes / result.bboxes.new_tensor(meta['scale_factor']).repeat(2)
            results.append(result)
        return self.model.add_pred_to_datasample(batch_data_samples, results)

    def _paste(self, masks: Tensor, boxes: Tensor, meta: dict, rescale: bool) -> Tensor:
        """Masks in boxes ``(n, h, w)`` to masks of the image ``(n, H, W)``, as mmdet does."""
        heads, settings = self.model.roi_head.mask_head, self.model.test_cfg.rcnn
        head: Any = heads[-1] if isinstance(heads, nn.ModuleList) else heads
        if not len(masks):
            height, width = meta['ori_shape'][:2] if rescale else meta['img_shape'][:2]
            return torch.zeros(0, height, width, dtype=torch.bool)
        one_class = torch.zeros(len(masks), dtype=torch.long)
        return head._predict_by_feat_single(
            masks.numpy()[:, None], boxes.clone(), one_class, meta, settings, rescale, activate_map=True
        )


def normalization_of(model: Any) -> Normalization:
    """What a model's data preprocessor does to an image at inference."""
    part = model.data_preprocessor
    mean, std = (getattr(part, name, None) for name in ('mean', 'std'))
    # Images are loaded as BGR; both directions swap red and blue.
    converts = any(getattr(part, name, False) for name in ('channel_conversion', '_channel_conversion', 'to_rgb'))
    values = (getattr(part, 'test_cfg', None) or {}) if hasattr(part, 'channel_conversion') else vars(part)
    if values.get('size'):
        raise UserError(
            'model.data_preprocessor.test_cfg.size: pads all images to one size, which is not supported\n'
            'Use size_divisor, or a Resize in the test pipeline.'
        )
    return Normalization(
        channel_order='as loaded' if mean is not None and len(mean) != 3 else 'RGB' if converts else 'BGR',
        mean=[0.0] if mean is None else [round(v, 6) for v in mean.flatten().tolist()],
        std=[1.0] if std is None else [round(v, 6) for v in std.flatten().tolist()],
        pad_size_divisor=values.get('pad_size_divisor') or values.get('size_divisor') or 1,
        pad_value=float(getattr(part, 'pad_value', getattr(part, 'pad_val', 0)) or 0),
    )


def fingerprint(model: Any) -> str:
    """SHA-256 of the names and shapes of a model's weights, in hexadecimal; without those that only training uses."""
    shapes = {
        name: list(value.shape)
        for name, value in model.state_dict().items()
        if not name.startswith('auxiliary_head.') and not name.endswith('num_batches_tracked')
    }
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def test_settings(model: Any) -> dict[str, Any]:
    """Test settings of a model as plain data, with what else the interpretation of its outputs needs."""
    found = dict(getattr(model, 'test_cfg', None) or {})
    if task_of_model(model) == 'segmentation':
        found['align_corners'] = bool(model.align_corners)
        if model.decode_head.out_channels == 1:
            found['threshold'] = model.decode_head.threshold
    return json.loads(json.dumps(found, default=str))


def count_classes(model: Any) -> int:
    """Classes that a model predicts."""
    roi = getattr(model, 'roi_head', None)
    owners = ((model, 'decode_head'), (roi, 'bbox_head'), (model, 'bbox_head'), (model, 'head'))
    head: Any = next(getattr(owner, name) for owner, name in owners if getattr(owner, name, None) is not None)
    last: Any = head[-1] if isinstance(head, nn.ModuleList) else head
    return last.num_classes


def task_of_model(model: Any) -> str:
    """``'segmentation'``, ``'detection'`` or ``'classification'``."""
    if hasattr(model, 'decode_head'):
        return 'segmentation'
    return 'detection' if hasattr(model, 'roi_head') or hasattr(model, 'bbox_head') else 'classification'


def _check_fit(model: Any, artefact: Artefact) -> None:
    manifest = artefact.manifest
    masks = bool(getattr(getattr(model, 'roi_head', None), 'with_mask', False))
    pairs: dict[str, tuple[Any, Any]] = {
        'model': (manifest.model, type(model).__name__),
        'task': (manifest.task, task_of_model(model)),
        'normalization': (manifest.normalization.model_dump(), normalization_of(model).model_dump()),
    }
    if pairs['task'][0] == pairs['task'][1]:
        pairs['number of classes'] = (len(manifest.classes), count_classes(model))
        pairs['masks'] = (any(output.name == 'masks' for output in manifest.outputs), masks)
        pairs['weights'] = (manifest.weights[:8], fingerprint(model)[:8])
    if manifest.task == 'detection':  # they are a part of the network
        pairs['test_cfg'] = (manifest.postprocessing, test_settings(model))
    differing = [line for name, pair in pairs.items() for line in _differences(name, *pair)]
    if differing:
        advice = f'It was exported with {manifest.config}: use that config with the same options, or export again.'
        there, here = pairs.get('number of classes', (0, 0))
        if there != here:
            advice = f'It has {len(manifest.classes)} classes; use them: {classes_option(manifest.classes)}'
        raise UserError(f'{artefact.folder / MANIFEST}: does not fit the config: {"; ".join(differing)}\n{advice}')


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """One line for each value that differs; dicts are compared by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [line for key in keys for line in _differences(f'{name}.{key}', there.get(key), here.get(key))]
    return [] if there == here else [f'{name}: {there} there, {here} in the config']


def load_artefact(model: Any, folder: str | Path, reparam: bool = False) -> dict:
    """Make an exported network that of ``model``, in place; returns the ``meta`` of a checkpoint.

    Raises:
        UserError: If it does not fit, or is to be merged.
    """
    if reparam:
        raise UserError(f'{folder}: is an exported network, which is merged already\nOmit --reparam.')
    artefact = Artefact(folder)
    use_artefact(model, artefact)
    return read_checkpoint(folder)['meta']
