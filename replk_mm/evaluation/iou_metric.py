"""Segmentation metrics with per-class scores."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmseg.evaluation.metrics import IoUMetric as MMSegIoUMetric

from replk_mm.evaluation.gather import GatheringMetric
from replk_mm.evaluation.per_image import SegmentationCounts
from replk_mm.files import write_output
from replk_mm.registry import METRICS


def image_name(path: str, root: str | None) -> Path:
    """The path of an image below a folder, without suffix; its name if it is elsewhere, also by a link."""
    folder, base = Path(path).resolve().parent, Path(root or '').resolve()
    inside = root is not None and folder.is_relative_to(base)
    return (folder.relative_to(base) if inside else Path()) / Path(path).stem


@METRICS.register_module()
class IoUMetric(GatheringMetric, MMSegIoUMetric):
    """mmseg's IoU metric, which also reports ``mIoU_present`` and per-class scores.

    ``mIoU`` averages over the classes that occur in labels or predictions; ``mIoU_present`` over those in the labels.
    Use the latter on a data set with few of the classes.

    Args:
        images_root: Folder of the images; predictions are written to the same subfolders. By default, all go to one
            folder, where equal names overwrite each other.

    Attributes:
        per_class: ``{class: {'IoU', 'Acc', 'pixels'}}`` of the classes in the labels: percentages, and the number of
            labelled pixels.
    """

    output_dir: str | None

    def __init__(self, *args, images_root: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.images_root = images_root

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the pixels of each image, and write its prediction to ``output_dir``, if set."""
        folder, self.output_dir = self.output_dir, None  # mmseg would write into one folder
        before = len(self.results)
        super().process(data_batch, data_samples)
        self.output_dir = folder
        if not self.format_only:
            names = [str(image_name(sample.get('img_path') or '', self.images_root)) for sample in data_samples]
            self.results[before:] = zip(self.results[before:], names, strict=True)
        if folder is not None:
            for sample in data_samples:
                self._write(sample, Path(folder))

    def _write(self, sample: dict, folder: Path) -> None:
        # Undo reduce_zero_label, as mmseg does.
        labels = sample['pred_sem_seg']['data'].squeeze().cpu().numpy() + int(sample.get('reduce_zero_label', False))
        name = image_name(sample.get('img_path') or '', self.images_root)
        write_output(folder / f'{name}.png', cv2.imencode('.png', labels.astype(np.uint8))[1].tobytes())

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics in percent from the histograms of all images."""
        if self.format_only:
            return super().compute_metrics(results)
        # float32 counts up to 16.7 million only, which is less than the pixels of a class.
        histograms, images = zip(*results, strict=True)
        areas = [torch.stack(parts).double() for parts in zip(*histograms, strict=True)]  # (images, classes)
        totals = [area.sum(0) for area in areas]
        found = self.total_area_to_metrics(*totals, self.metrics, self.nan_to_num, self.beta)
        metrics = {
            name if name == 'aAcc' else f'm{name}': 100 * float(np.nanmean(values)) for name, values in found.items()
        }

        intersect, union, _, label = (np.asarray(total, dtype=np.float64) for total in totals)
        present = np.flatnonzero(label)
        names = tuple(self.dataset_meta['classes'])
        if 'mIoU' in metrics and self.nan_to_num is None:
            correct, _, predicted, labelled = map(np.asarray, areas)
            self.statistics[self.key('mIoU')] = SegmentationCounts(
                images=images, classes=names, intersection=correct, predicted=predicted, label=labelled
            )
        self.per_class = {
            names[i]: dict(IoU=100 * intersect[i] / union[i], Acc=100 * intersect[i] / label[i], pixels=int(label[i]))
            for i in present
        }
        if len(present):
            metrics['mIoU_present'] = float(np.mean([c['IoU'] for c in self.per_class.values()]))
        return metrics
