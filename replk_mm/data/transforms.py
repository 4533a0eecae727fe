"""Checks inside the data pipeline: a bad file is named when it is read, not by a crash three layers up."""
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform

from replk_mm.data.coco_masks import mask_problem
from replk_mm.data.files import IGNORED, damage, oversize
from replk_mm.data.pairs import not_a_label_map, out_of_range
from replk_mm.errors import UserError
from replk_mm.registry import TRANSFORMS

_REMEDY = 'Replace the file, or remove it and its partner from the data set.'


@TRANSFORMS.register_module()
class CheckedLoad(BaseTransform):
    """Run a loading transform; name the file if it cannot be read or holds labels that no class has.

    Args:
        load: Config of the transform, such as ``dict(type='LoadAnnotations')``.
        num_classes: Classes of the model; None checks no labels. Defaults to None.
    """

    def __init__(self, load: dict, num_classes: int | None = None) -> None:
        self.load = TRANSFORMS.build(load)
        self.num_classes = num_classes

    def transform(self, results: dict) -> dict | None:
        loads_labels = 'img' in results
        # Of a data set with boxes the annotations are not in a file of the image's own.
        entries = loads_labels and not results.get('seg_map_path')
        path = Path(str(results.get('seg_map_path' if loads_labels and not entries else 'img_path') or ''))
        try:
            problem = (damage(path) or oversize(path)) if path.is_file() and not entries else None
            if problem:
                raise UserError(f'{path}: {problem}\n{_REMEDY}')
            if entries and getattr(self.load, 'with_mask', False):
                self._check_masks(results)
            out = self.load(results)
        except UserError:
            raise
        except Exception as error:
            # Decoders raise anything from OSError to cv2.error; all of them mean this file.
            if entries:
                raise UserError(f'{path}: its annotations cannot be read ({type(error).__name__}: {error})\n'
                                f'Mend the entries of image {results.get("img_id")!r} in the annotation file.') from error
            raise UserError(f'{path}: cannot be read ({type(error).__name__}: {error})\n{_REMEDY}') from error
        if loads_labels and out is not None and 'gt_seg_map' in out:
            if out['gt_seg_map'].ndim != 2:
                raise UserError(f'{path}: {not_a_label_map(out["gt_seg_map"])}\n{_REMEDY}')
            if self.num_classes is not None:
                self._check_ids(out, path, self.num_classes)
        return out

    @staticmethod
    def _check_masks(results: dict) -> None:
        for instance in results.get('instances', ()):
            problem = mask_problem(instance['mask'], results['ori_shape']) if 'mask' in instance else None
            if problem:
                raise ValueError(f'{problem}, box {instance.get("bbox")}')

    def _check_ids(self, results: dict, path: Path, num_classes: int) -> None:
        ids = np.unique(results['gt_seg_map'])
        wrong = ids[(ids >= num_classes) & (ids != IGNORED)]
        if len(wrong):
            shift = 1 if results.get('reduce_zero_label') else 0
            raise UserError(label_range_message(path, (wrong + shift).tolist(), num_classes, bool(shift)))


def label_range_message(path: Path, found: list[int], num_classes: int, reduce_zero_label: bool) -> str:
    """What to say of label ids, as they stand in the file, that no class has."""
    problem = out_of_range(str(path), found, num_classes, reduce_zero_label)
    return f'{path}: {problem.text}\n{problem.advice}'


@TRANSFORMS.register_module()
class ShrinkLabels(BaseTransform):
    """Keep one label of every ``factor`` x ``factor`` block, so that the loss is taken at the logits' own resolution.

    With 150 classes, logits brought to full resolution and their log-softmax are most of a small model's training step on a
    CPU. Images keep their size. Put it after every transform that moves pixels, and see that no image is smaller than the
    crop: padding is counted in image pixels.

    Args:
        factor: Side of a block in pixels; the stride of the logits, 4 for UperNet.

    Raises:
        UserError: If an image's sides are no multiples of ``factor``.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def transform(self, results: dict) -> dict:
        labels = results['gt_seg_map']
        if labels.shape[0] % self.factor or labels.shape[1] % self.factor:
            raise UserError(f'{results.get("seg_map_path")}: ShrinkLabels(factor={self.factor}) met a map of '
                            f'{labels.shape[0]}x{labels.shape[1]} after cropping\n'
                            f'Make the crop size a multiple of the factor, and resize images to at least the crop before it.')
        # The label nearest to the block's centre, where the logit of the block is.
        centre = self.factor // 2
        results['gt_seg_map'] = np.ascontiguousarray(labels[centre::self.factor, centre::self.factor])
        return results
