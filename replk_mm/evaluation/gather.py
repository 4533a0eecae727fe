"""Metrics that do not depend on the number of processes, and what they say about missing ground truth."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from replk_mm.errors import UserError, format_list
from replk_mm.evaluation.per_image import PerImageScores
from replk_mm.text import class_table


class GatheringMetric(BaseMetric):
    """A metric that rank 0 computes from the results of all processes, with each image once.

    mmengine's samplers repeat some images, so that all processes have the same number; mmengine drops the repetitions.

    Args:
        collect_device: As in mmengine's metrics: ``'gpu'`` uses the process group of the run, with any backend;
            ``'cpu'`` uses files in ``collect_dir``.
    """

    results: list
    per_class: dict[str, dict[str, float]]  #: scores of every class on rank 0; see the subclass
    #: what the scores are made of, image by image, on rank 0, by the name of the score
    statistics: dict[str, PerImageScores]

    def __init__(self, *args, collect_device: str = 'gpu', **kwargs) -> None:
        super().__init__(*args, collect_device=collect_device, **kwargs)
        self.per_class, self.statistics = {}, {}

    def key(self, name: str) -> str:
        """The name of a score as mmengine reports it."""
        return f'{self.prefix}/{name}' if self.prefix else name

    def evaluate(self, size: int) -> dict[str, float]:
        """Scores of a data set, the same in every process, with ``prefix`` before their names.

        Args:
            size: Number of samples.

        Raises:
            UserError: If samples were not evaluated.
        """
        self.per_class, self.statistics = {}, {}
        fewest = torch.tensor(len(self.results))
        all_reduce(fewest, 'min')
        evaluated = int(fewest) * get_world_size()
        if evaluated < size and not getattr(self, 'format_only', False):
            raise UserError(
                f'evaluation: {evaluated} of {size} images were evaluated by {get_world_size()} processes\n'
                f"Use sampler=dict(type='DefaultSampler') without round_up=False, and no drop_last, in "
                f'val_dataloader and test_dataloader.'
            )
        scores = super().evaluate(size)
        if self.per_class:
            absent = absent_classes([self])
            heading = f'{len(self.per_class)} of {len(self.per_class) + len(absent)} classes are in the labels'
            print_log(f'{heading}:\n{class_table(self.per_class, absent)}', logger='current')
        return scores


def absent_classes(metrics: Iterable[BaseMetric]) -> list[str]:
    """The classes that occur in no ground truth of the last evaluation; known on rank 0, by our metrics."""
    ours = [metric for metric in metrics if isinstance(metric, GatheringMetric) and metric.per_class]
    names = dict.fromkeys(name for metric in ours for name in metric.dataset_meta['classes'])
    return [name for name in names if not any(name in metric.per_class for metric in ours)]


def require_ground_truth(scores: Mapping[str, Any], split: str) -> None:
    """Raise a ``UserError`` if no score of ``'val'`` or ``'test'`` data is a number: NaN, or -1 in mmdet's metrics."""
    values = {name: value for name, value in scores.items() if isinstance(value, Real) and 'time' not in name}
    if values and all(math.isnan(value) or value == -1 and 'mAP' in name for name, value in values.items()):
        raise UserError(
            f'{split}_dataloader.dataset: the ground truth has nothing to score; no number: {format_list(values)}\n'
            f'Check the labels, the classes and reduce_zero_label of this data set.'
        )
