"""What training with several processes needs at every step, so that it is the training of one."""
from typing import Any

import torch
from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from replk_mm.engine.gather import mean_of_processes
from replk_mm.registry import HOOKS


@HOOKS.register_module()
class ProcessesHook(Hook):
    """Log the losses of the whole batch, and validate the network that checkpoints hold.

    Every process computes the losses of its own images, and the first one's would be logged. BatchNorm that is not
    synchronized has other running statistics in every process; checkpoints hold those of the first, which all of them
    therefore validate with. What the first process has is never changed, so that a run goes on as it would without validation.
    """

    priority = 'HIGHEST'  # before the hook that notes the losses

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        """Put the means over all processes into ``outputs``."""
        if outputs and get_world_size() > 1:
            means = mean_of_processes({name: float(torch.as_tensor(value).detach()) for name, value in outputs.items()})
            outputs.update({name: torch.tensor(value) for name, value in means.items()})

    def before_val(self, runner: Runner) -> None:
        """Give every process the first one's buffers."""
        if get_world_size() > 1:
            for buffer in runner.model.buffers():
                broadcast(buffer)
