"""Trainings that are stopped at an iteration of choice, here or in a fork, and compared bit by bit."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import Tiny

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.engine.config import load_config
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import STOPPED_STATUS, Stopped

CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['signal_hook'], allow_failed_imports=False)
custom_hooks = [dict(type='SignalHook'), {hooks}]
"""


def config_with_signals(folder: Path, base: str | Path, hooks: str = '', more: str = '') -> Path:
    """A config file that inherits ``base`` and in which ``TEST_SIGNAL=NAME:train|val:ITERATION`` has its effect."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'with_signals.py'
    path.write_text(CONFIG.format(base=str(base), hooks=hooks) + more)
    return path


def forked(train: Callable[[], object]) -> int:
    """Exit status of a training in a fork of this process; of one that a signal has ended, minus its number."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # threads do not outlive a fork
        status = 1
        try:
            train()
            status = 0
        except Stopped:
            status = STOPPED_STATUS
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(one: Path, other: Path) -> list[str]:
    """Where two checkpoints differ in a single bit: of weights, statistics, optimizer, schedules, averaged weights."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    keys = ('state_dict', 'optimizer', 'param_schedulers', 'ema_state_dict')
    assert [key in first for key in keys] == [key in second for key in keys]
    found: list[str] = []
    for key in keys:
        _compare(first.get(key), second.get(key), key, found)
    return found


def _compare(a: object, b: object, path: str, found: list[str]) -> None:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            _compare(a[key], b[key], f'{path}.{key}', found)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _compare(x, y, f'{path}.{i}', found)
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)
        ):
            found.append(path)
    elif a != b:
        found.append(path)


#: Everything that draws random numbers: augmentation, stochastic depth, dropout.
RANDOM = """
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
                  dict(type='RandomResize', scale=(96, 96), ratio_range=(0.8, 1.5), keep_ratio=True),
                  dict(type='RandomCrop', crop_size=(64, 64), cat_max_ratio=0.75), dict(type='RandomFlip', prob=0.5),
                  dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(backbone=dict(drop_path_rate=0.3), decode_head=dict(dropout_ratio=0.3))
"""


EMA = "dict(type='EMAHook', momentum=0.1)"


def run(
    config: Path, tiny: Tiny, work: Path, iterations: int = 8, interval: int = 3, options: dict | None = None, **changes
) -> Path:
    """Train in this process."""
    cfg = load_config(str(config), {'default_hooks.checkpoint.interval': interval, **(options or {})})
    cfg.experiment_name = work.name
    notes = prepare_training(cfg, tiny.options(work, max_iters=iterations, **{'seed': 5, **changes}))
    cfg.train_cfg.val_interval = 4
    cfg.default_hooks.checkpoint.interval = interval
    return train(cfg, notes, preflight=False)


EPOCHS = """
train_dataloader = dict(sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
train_cfg = dict(_delete_=True, type='replk_mm.EpochBasedTrainLoop', max_epochs=3, val_interval=1)
param_scheduler = [dict(type='PolyLR', power=1.0, by_epoch=True, begin=0, end=3)]
default_hooks = dict(checkpoint=dict(_delete_=True, type='replk_mm.CheckpointHook', by_epoch=True, interval=1,
                                     max_keep_ckpts=2))
"""
