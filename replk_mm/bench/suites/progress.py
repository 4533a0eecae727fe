"""How far the rows of a suite are, and how long the rest takes."""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from replk_mm.bench import records
from replk_mm.bench.suites.task import Task
from replk_mm.registry import HOOKS
from replk_mm.text import format_duration

#: Folder of the progress file of each measurement that has one.
PROGRESS_FOLDERS = {'train': 'train', 'metric': 'test'}
_ANY_ROW = ''


@HOOKS.register_module()
class ProgressFileHook(Hook):
    """Write the number of iterations done to a file.

    Args:
        path: JSON file with ``iteration``, ``iterations`` and ``seconds``; the seconds of resumed trainings add up.
        loop: ``'train'`` or ``'test'``. A training saves its config, which may serve for other runs.
    """

    priority = 'NORMAL'

    def __init__(self, path: str, loop: str) -> None:
        self.path, self.loop = Path(path), loop
        self._seconds_before = 0.0
        self._started = self._written = time.monotonic()

    def before_train(self, runner: Runner) -> None:
        """Write the file."""
        self._seconds_before = records.read_json(self.path).get('seconds', 0.0)
        self._started = time.monotonic()
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
        if self.loop == 'test' and time.monotonic() - self._written >= 1:
            self._write(batch_idx + 1, len(runner.test_dataloader))

    def _write(self, iteration: int, iterations: int) -> None:
        self._written = time.monotonic()
        seconds = round(self._seconds_before + self._written - self._started, 3)
        if get_rank() == 0:
            records.write_json(self.path, dict(iteration=iteration, iterations=iterations, seconds=seconds))


def add_progress_hook(cfg: Config, path: Path, loop: str) -> None:
    """Let the ``'train'`` or ``'test'`` loop of a config write its progress to a file."""
    hook = dict(type='replk_mm.ProgressFileHook', path=str(path), loop=loop)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]


def read_progress(task: Task, measurement: str) -> dict[str, Any]:
    """``iteration``, ``iterations`` and ``seconds`` of a running training or test; empty if it has not started."""
    folder = PROGRESS_FOLDERS.get(measurement)
    return records.read_json(task.folder / folder / 'progress.json') if folder else {}


def time_left(work_dir: Path, stages: Sequence[tuple[int, Sequence[Task]]]) -> str:
    """Time until tasks have ended, such as ``'about 12 min left'``.

    A running training or test is extrapolated from its iterations. Other measurements take as long as for another seed
    of the row, or else for the other rows; trainings of other rows are scaled by their iterations.

    Args:
        work_dir: Of the suite.
        stages: What runs one after the other: how many tasks at a time, and those of them that have not ended.

    Returns:
        ``'at least ...'`` if some measurement was not timed for any row; empty if no training or test was timed.
    """
    done, durations = set(), defaultdict[tuple[str, str], list[float]](list)
    for record in records.read_records([work_dir])[0]:
        if record['status'] == 'done':
            done.add(record['key'])
            for row in (record['row'], _ANY_ROW):
                durations[row, record['measurement']].append(record['seconds'])
    left = [
        (jobs, task, name, read_progress(task, name))
        for jobs, tasks in stages
        for task in tasks
        for name in task.measures
        if task.keys[name] not in done
    ]
    paces = defaultdict[str, list[float]](list)  # seconds an iteration
    for _, _, name, progress in left:
        if progress.get('iteration'):
            paces[name].append(progress['seconds'] / progress['iteration'])
    total, untimed = 0.0, set()
    for jobs, task, name, progress in left:
        if progress.get('iteration'):
            pace = progress['seconds'] / progress['iteration']
            total += pace * (progress['iterations'] - progress['iteration']) / jobs
        elif durations[task.row.name, name]:
            total += fmean(durations[task.row.name, name]) / jobs
        elif name == 'train' and paces[name] and task.row.iterations:
            total += fmean(paces[name]) * task.row.iterations / jobs
        elif durations[_ANY_ROW, name]:
            total += fmean(durations[_ANY_ROW, name]) / jobs
        else:
            untimed.add(name)
    if not left or (untimed & PROGRESS_FOLDERS.keys() and not any(paces.values())):
        return ''
    return f'{"at least" if untimed else "about"} {format_duration(total)} left'
