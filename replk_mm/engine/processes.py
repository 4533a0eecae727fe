"""What training with several processes needs at every step, so that it equals the training of one."""

from typing import Any

import torch
from mmengine.dist import all_reduce_dict, broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from replk_mm.registry import HOOKS


@HOOKS.register_module()
class ProcessesHook(Hook):
    """Log the losses of the whole batch, and validate the network that checkpoints hold.

    Every process computes the losses of its own images, and mmengine would log those of rank 0. BatchNorm that is not
    synchronized has other running statistics in every process; checkpoints hold those of rank 0, so all validate with
    them.
    """

    priority = 'HIGHEST'  # before the hook that notes the losses

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Put the means over all processes into ``outputs``."""
        if outputs and get_world_size() > 1:
            means = {name: torch.as_tensor(value).detach().double() for name, value in outputs.items()}
            all_reduce_dict(means, 'mean')
            outputs.update(means)

    def before_val(self, runner: Runner) -> None:
        """Give every process the buffers of rank 0."""
        if get_world_size() > 1:
            for buffer in runner.model.buffers():
                broadcast(buffer)
