"""Hook that tells the suite how far a training or a test is."""

import time
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from replk_mm.bench.records import read_json, write_json
from replk_mm.registry import HOOKS


@HOOKS.register_module()
class ProgressFileHook(Hook):
    """Write the number of iterations done to a file.

    Args:
        path: JSON file with ``iteration``, ``iterations`` and ``seconds``; the seconds of resumed trainings add up.
    """

    priority = 'NORMAL'

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._seconds_before = 0.0
        self._started = self._written = time.monotonic()

    def before_train(self, runner: Runner) -> None:
        """Write the file."""
        self._seconds_before = read_json(self.path).get('seconds', 0.0)
        self._write(runner.iter, runner.max_iters)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Write the file once a second."""
        if time.monotonic() - self._written >= 1:
            self._write(runner.iter + 1, runner.max_iters)

    def after_train(self, runner: Runner) -> None:
        """Write the file."""
        self._write(runner.iter, runner.max_iters)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the file once a second."""
        if time.monotonic() - self._written >= 1:
            self._write(batch_idx + 1, len(runner.test_dataloader))

    def _write(self, iteration: int, iterations: int) -> None:
        self._written = time.monotonic()
        seconds = round(self._seconds_before + self._written - self._started, 3)
        if get_rank() == 0:
            write_json(self.path, dict(iteration=iteration, iterations=iterations, seconds=seconds))


def add_progress_hook(cfg: Config, path: Path) -> None:
    """Let the run of a config write its progress to a file."""
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='replk_mm.ProgressFileHook', path=str(path))]
