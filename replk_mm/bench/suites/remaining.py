"""Estimate how long the rest of a suite takes, from the measurements that were timed so far."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from replk_mm.bench import records
from replk_mm.bench.suites.task import Task

#: Folder of the progress file of each measurement that has one.
PROGRESS_FOLDERS = {'train': 'train', 'metric': 'test'}
_ANY_ROW = ''


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


def format_duration(seconds: float) -> str:
    """A duration to two digits or so: ``'40 s'``, ``'12 min'``, ``'3 h 20 min'``."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return f'{minutes} min' if minutes < 90 else f'{minutes // 60} h {minutes % 60} min'
