"""Images, layers and weights that are not finite, for tests of what a training does then."""

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, MODELS, TRANSFORMS


@TRANSFORMS.register_module()
class PoisonImage(BaseTransform):
    """Some pixels of the image of one name are NaN."""

    def __init__(self, name: str) -> None:
        self.name = name

    def transform(self, results: dict) -> dict:
        if results['img_path'].endswith(self.name):
            results['img'] = results['img'].astype(np.float32)
            results['img'][3, 4:6] = np.nan
        return results


@MODELS.register_module()
class RootNeck(BaseModule):
    """Returns its inputs; the gradient of the last one is NaN, as that of a root at 0."""

    def forward(self, inputs):
        return [*inputs[:-1], inputs[-1] + torch.sqrt(inputs[-1] * 0)]


@HOOKS.register_module()
class SpoilHook(Hook):
    """Make one value of a weight infinite before an iteration, counted from 1."""

    priority = 'HIGHEST'

    def __init__(self, weight: str, before: int) -> None:
        self.weight, self.before = weight, before

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.before:
            with torch.no_grad():
                runner.model.get_parameter(self.weight).view(-1)[0] = float('inf')
