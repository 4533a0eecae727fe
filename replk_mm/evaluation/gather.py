"""Metrics that do not depend on the number of processes."""

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.evaluator import BaseMetric

from replk_mm.errors import UserError


class GatheringMetric(BaseMetric):
    """A metric that rank 0 computes from the results of all processes, with each image once.

    mmengine's samplers repeat some images, so that all processes have the same number; mmengine drops the repetitions.

    Args:
        collect_device: As in mmengine's metrics: ``'gpu'`` uses the process group of the run, with any backend;
            ``'cpu'`` uses files in ``collect_dir``.

    Attributes:
        per_class: Scores of every class on rank 0; see the subclass.
    """

    results: list
    per_class: dict[str, dict[str, float]]

    def __init__(self, *args, collect_device: str = 'gpu', **kwargs) -> None:
        super().__init__(*args, collect_device=collect_device, **kwargs)

    def evaluate(self, size: int) -> dict[str, float]:
        """Scores of a data set, the same in every process, with ``prefix`` before their names.

        Args:
            size: Number of samples.

        Raises:
            UserError: If samples were not evaluated.
        """
        self.per_class = {}
        fewest = torch.tensor(len(self.results))
        all_reduce(fewest, 'min')
        evaluated = int(fewest) * get_world_size()
        if evaluated < size and not getattr(self, 'format_only', False):
            raise UserError(
                f'evaluation: {evaluated} of {size} images were evaluated by {get_world_size()} processes\n'
                f"Use sampler=dict(type='DefaultSampler') without round_up=False, and no drop_last, in "
                f'val_dataloader and test_dataloader.'
            )
        return super().evaluate(size)
