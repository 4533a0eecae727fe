"""Transforms of the data pipeline: loading that names the file on failure, labels at the resolution of the logits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine.dataset import Compose

from replk_mm.data.checks.dataset import LabelFormat
from replk_mm.data.checks.images import check_annotated_size, describe_channels, out_of_range, read_size
from replk_mm.data.coco import mask_error
from replk_mm.data.files import IGNORE_INDEX, check_image_file
from replk_mm.errors import UserError
from replk_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CheckedLoad(BaseTransform):
    """Run a loading transform; on failure, raise an error that names the file.

    Label maps with ids of no class fail too.

    Args:
        load: The transform or its config, such as ``dict(type='LoadAnnotations')``.
        num_classes: Number of classes of the model; None does not check labels. Defaults to None.
    """

    def __init__(self, load: dict | BaseTransform, num_classes: int | None = None) -> None:
        self.load = TRANSFORMS.build(load) if isinstance(load, dict) else load
        self.num_classes = num_classes

    def transform(self, results: dict) -> dict | None:
        loads_labels = 'img' in results
        path = str(results.get('seg_map_path' if loads_labels else 'img_path') or '')
        try:
            if path:
                check_image_file(path)
            elif loads_labels and getattr(self.load, 'with_mask', False):
                _check_masks(results)
            out = self.load(results)
        except Exception as error:  # decoders raise anything from OSError to cv2.error
            where = path or f'annotations of {results.get("img_path")}'
            raise UserError(
                f'{where}: cannot be read ({error})\nReplace the file, or remove it and its partner from the data set.'
            ) from error
        if loads_labels and out is not None and 'gt_seg_map' in out:
            self._check_ids(out, path)
            _check_size(out, out['gt_seg_map'].shape, path)
        elif not loads_labels and out is not None and {'instances', 'height', 'width'} <= out.keys():
            _check_size(out, (out['height'], out['width']), None)
        return out

    def _check_ids(self, results: dict, path: str) -> None:
        labels = results['gt_seg_map']
        if labels.ndim != 2:
            raise UserError(f'{path}: {describe_channels(labels)}\nReplace the file, or remove it and its image.')
        if self.num_classes is None:
            return
        ids = np.unique(labels)
        wrong = ids[(ids >= self.num_classes) & (ids != IGNORE_INDEX)]
        if len(wrong):
            reduces = bool(results.get('reduce_zero_label'))
            finding = out_of_range(path, (wrong + reduces).tolist(), LabelFormat(self.num_classes, reduces))
            raise UserError(f'{finding}\n{finding.fix}')


def _check_size(results: dict, annotated: tuple[int, int], label: str | None) -> None:
    """Reject an annotation of another (height, width) than the image, such as one without its EXIF rotation."""
    if annotated != tuple(results['ori_shape'][:2]):
        path = results['img_path']
        for finding in check_annotated_size(path, read_size(path), (annotated[1], annotated[0]), label):
            raise UserError(f'{finding}\n{finding.fix}')


def check_loading(dataset: Any, num_classes: int | None) -> None:
    """Wrap the loading transforms of a built data set in :class:`CheckedLoad`, in place.

    Args:
        dataset: The data set, or a wrapper (repeat, concatenate).
        num_classes: See :class:`CheckedLoad`.
    """
    for part in datasets_with_pipeline(dataset):
        part.pipeline = _with_checks(part.pipeline, num_classes)


def datasets_with_pipeline(dataset: Any) -> Iterator[Any]:
    """The built data sets that have a pipeline: this one and those within it (repeat, concatenate)."""
    for part in (*(vars(dataset).get(key) for key in ('dataset', 'wrapped')), *(vars(dataset).get('datasets') or ())):
        if part is not None:
            yield from datasets_with_pipeline(part)
    if isinstance(vars(dataset).get('pipeline'), Compose):
        yield dataset


def _with_checks(step: Any, num_classes: int | None) -> Any:
    if isinstance(step, (LoadImageFromFile, LoadAnnotations)):
        return CheckedLoad(step, num_classes)
    for key in ('transforms', 'subroutines'):  # of pipelines, random choices and test-time augmentation
        if isinstance(getattr(step, key, None), list):
            setattr(step, key, [_with_checks(part, num_classes) for part in getattr(step, key)])
    return step


def _check_masks(results: dict) -> None:
    for instance in results.get('instances', ()):
        error = mask_error(instance['mask'], *results['ori_shape'][:2]) if 'mask' in instance else None
        if error:
            raise ValueError(f'mask of box {instance.get("bbox")}: {error}')


@TRANSFORMS.register_module()
class ShrinkLabels(BaseTransform):
    """Keep one label of every ``factor`` x ``factor`` block, to compute the loss at the resolution of the logits.

    With 150 classes, upsampled logits and their log-softmax take most of a small model's training step on a CPU. Images
    keep their size. Place this transform after all that move pixels. Resize images to at least the crop size, since
    padding is counted in image pixels.

    Args:
        factor: Side of a block in pixels; the stride of the logits, 4 for UperNet.

    Raises:
        UserError: If the sides of a label map are not multiples of ``factor``.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def transform(self, results: dict) -> dict:
        labels = results['gt_seg_map']
        if labels.shape[0] % self.factor or labels.shape[1] % self.factor:
            raise UserError(
                f'{results.get("seg_map_path")}: ShrinkLabels(factor={self.factor}) got a map of '
                f'{labels.shape[0]}x{labels.shape[1]} after cropping\n'
                f'Make the crop size a multiple of the factor, and resize images to at least the crop.'
            )
        # The label nearest to the block's centre, where the logit of the block is.
        centre = self.factor // 2
        results['gt_seg_map'] = np.ascontiguousarray(labels[centre :: self.factor, centre :: self.factor])
        return results
