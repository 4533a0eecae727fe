"""Classification accuracy with per-class scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmpretrain.evaluation import Accuracy as MMPretrainAccuracy

from replk_mm.evaluation.gather import GatheringMetric
from replk_mm.evaluation.per_image import ClassificationScores
from replk_mm.registry import METRICS


@METRICS.register_module()
class Accuracy(GatheringMetric, MMPretrainAccuracy):
    """mmpretrain's accuracy, which also reports the accuracy of every class. Arguments are those of mmpretrain's class.

    Attributes:
        per_class: ``{class: {'accuracy/top1', 'instances'}}`` of the classes in the labels: top-1 accuracy in percent,
            and the number of images.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep the scores, the label and the name of each image."""
        before = len(self.results)
        super().process(data_batch, data_samples)
        for result, sample in zip(self.results[before:], data_samples, strict=True):
            result['image'] = str(sample.get('img_path') or '')

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Accuracy in percent over all images."""
        names = tuple(self.dataset_meta['classes'])
        label = np.array([int(result['gt_label']) for result in results])
        found = [int(r['pred_score'].argmax() if 'pred_score' in r else r['pred_label']) for r in results]
        images = tuple(result['image'] for result in results)
        scores = ClassificationScores(images=images, classes=names, label=label, correct=np.array(found) == label)
        key, counts = self.key('top1'), np.bincount(label, minlength=len(names))
        self.statistics[key] = scores
        self.per_class = {
            name: {key: float(value), 'instances': int(count)}
            for name, value, count in zip(names, scores.per_class()[0], counts, strict=True)
            if count
        }
        return super().compute_metrics(results)
