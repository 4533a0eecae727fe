"""Segmentation metrics that keep the figures of every class."""
import numpy as np
from mmseg.evaluation.metrics import IoUMetric as MMSegIoUMetric

from replk_mm.registry import METRICS


@METRICS.register_module()
class IoUMetric(MMSegIoUMetric):
    """mmseg's IoU metric, which also reports ``mIoU_present`` and leaves every class's figures in :attr:`per_class`.

    ``mIoU`` averages over the classes that occur in the labels or in the predictions; ``mIoU_present`` over those in the
    labels, which is what compares on a data set that holds a few of the classes only.

    Attributes:
        per_class: ``{class: {'IoU', 'Acc', 'pixels'}}`` of the classes in the labels; percentages, and the number of
            labelled pixels.
    """

    per_class: dict[str, dict[str, float]]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics in percent from the histograms of all images."""
        metrics = super().compute_metrics(results)
        intersect, union, _, label = (np.sum([np.asarray(r[i], dtype=np.float64) for r in results], axis=0) for i in range(4))
        present = np.flatnonzero(label)
        self.per_class = {
            self.dataset_meta['classes'][i]: dict(IoU=100 * intersect[i] / union[i], Acc=100 * intersect[i] / label[i],
                                                  pixels=int(label[i])) for i in present}
        if len(present):
            metrics['mIoU_present'] = round(float(np.mean([c['IoU'] for c in self.per_class.values()])), 4)
        return metrics
