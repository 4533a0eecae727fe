"""What tests of values that are not finite share: images, labels, layers and hooks that make them."""
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, MODELS, TRANSFORMS

from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import UserError


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


@TRANSFORMS.register_module()
class PoisonBoxes(PoisonImage):
    """The first box of the image of one name is NaN."""

    def transform(self, results: dict) -> dict:
        if results['img_path'].endswith(self.name):
            results['gt_bboxes'].tensor[0, 2] = np.nan
        return results


class Switch:
    """The iteration, counted from 1, in which a fault is on; None for never, 0 for always."""

    at: int | None = None
    now = 0

    @classmethod
    def on(cls) -> bool:
        return cls.at == 0 or (cls.at is not None and cls.now == cls.at)


@MODELS.register_module()
class RootNeck(BaseModule):
    """Hands its inputs on; the gradient of the last one is NaN when the switch is on: that of a root at 0."""

    def forward(self, inputs):
        if not Switch.on():
            return inputs
        return [*inputs[:-1], inputs[-1] + torch.sqrt(inputs[-1] * 0)]


@HOOKS.register_module()
class FaultHook(Hook):
    """Counts for the switch, records the losses of the training itself, and may spoil a weight.

    Args:
        weight: Set one value of this parameter to ``value``.
        before: The iteration before which to do so.
        after: The iteration after which to do so, before anything is saved.
        value: The value.
    """

    priority = 'HIGHEST'
    losses: list[dict] = []

    def __init__(self, weight: str | None = None, before: int = 0, after: int = 0, value: float = float('inf')) -> None:
        self.weight, self.before, self.after, self.value = weight, before, after, value

    def before_train(self, runner) -> None:
        FaultHook.losses.clear()
        runner.model.register_forward_hook(self._record)

    @staticmethod
    def _record(model, args, output) -> None:
        if isinstance(output, dict):
            FaultHook.losses.append(dict(output))

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        Switch.now = runner.iter + 1
        if Switch.now == self.before:
            self._spoil(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if Switch.now == self.after:
            self._spoil(runner)

    def _spoil(self, runner) -> None:
        with torch.no_grad():
            runner.model.get_parameter(self.weight).view(-1)[0] = self.value


@pytest.fixture(autouse=True)
def switch_off():
    Switch.at, Switch.now = None, 0


def prepared(case, work: Path, iterations: int = 4, transform: dict | None = None, options: dict | None = None, **changes):
    """A config of ``case`` (a tiny segmentor or detector) with the fault's hook and transform; ``spoil`` goes to the hook."""
    spoil = changes.pop('spoil', {})
    cfg = case.cfg(options)
    cfg.custom_hooks = [dict(type='FaultHook', **spoil)]
    if transform:
        pipeline = cfg.train_dataloader.dataset.pipeline
        pipeline.insert(len(pipeline) - 1, transform)
    return cfg, prepare_training(cfg, case.options(work, max_iters=iterations, **{'seed': 1, **changes}))


def stopped(case, work: Path, *args, **changes) -> str:
    """The message of a training that stops at a value that is not finite."""
    cfg, notes = prepared(case, work, *args, **changes)
    with pytest.raises(UserError) as caught:
        train(cfg, notes, preflight=False)
    return str(caught.value)


def replay_file(work: Path) -> Path:
    found = sorted(work.glob('nonfinite_*.pth'))
    assert len(found) == 1
    return found[0]


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)
