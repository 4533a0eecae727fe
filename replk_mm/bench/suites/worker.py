"""The process of one row and seed: makes the measurements of its task, and records each at once.

    python -m replk_mm.bench.suites.worker runs/ROW/SEED/task.json

Under torchrun or Slurm, the first process writes the records.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from replk_mm.bench import records
from replk_mm.bench.suites.task import Task, utc_now
from replk_mm.errors import INTERRUPTED_STATUS, UserError, user_message

#: Environment variable with the process id of the suite.
SUITE_PID = 'REPLK_MM_SUITE_PID'
#: Exit status of a process whose row another process is running.
BUSY = 75
#: Options of commands, and the fields of a row that set the same.
_FIELDS = {'--classes ': 'classes: ', '--cfg-options ': 'options: ', '--max-iters': 'iterations'}
#: Measurements that all processes of a launcher make together.
DISTRIBUTED = ('train', 'metric')


@dataclass
class MeasurementResult:
    """The result of a measurement; plain data."""

    values: dict[str, Any]  # the figures
    protocol: dict[str, Any] = field(default_factory=dict)  # what must be equal for values to be ranked together
    facts: dict[str, Any] = field(default_factory=dict)  # anything else
    files: dict[str, Any] = field(default_factory=dict)  # paths, by what they are
    checkpoint: dict[str, Any] | None = None  # the weights that were measured, None for random ones


Measure = Callable[[Task], MeasurementResult]


def run_task(task: Task, table: Mapping[str, Measure], environment: dict[str, Any], rank: int = 0) -> bool:
    """Make the measurements of a task; a failure is recorded, and the next measurement follows.

    Args:
        task: The row, seed and measurements.
        table: The function of each measurement.
        environment: Versions and hardware, for the records.
        rank: Of this process among those of the row.

    Returns:
        Whether everything was measured.
    """
    complete = True
    for name in task.measures:
        started = utc_now()
        if rank == 0:
            print(f'== {task.name}: {name}', flush=True)
        try:
            found = table[name](task)
            if rank == 0:
                records.append_record(task.record(name, started, environment, **vars(found)), task.results)
        except Exception as error:  # other measurements and rows go on
            traceback.print_exc()
            complete = False
            if rank == 0:
                task.append_failure(name, started, environment, describe_error(error))
            if name == 'train' or task.launcher != 'none':
                break  # nothing else can be measured without weights; other ranks may wait for this one
    return complete


def in_suite_terms(message: str) -> str:
    """Name the fields of a row instead of the options of a command that set the same."""
    return re.sub('|'.join(_FIELDS), lambda found: _FIELDS[found[0]], message)


def describe_error(error: BaseException) -> str:
    """The message of a user error, or type and first line of another error."""
    if isinstance(error, UserError):
        return in_suite_terms(user_message(error))
    return f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0]}'


def exit_with_suite() -> None:
    """End this process and its group when the suite that started it was killed."""
    suite = int(os.environ.get(SUITE_PID) or 0)

    def watch() -> None:
        while psutil.pid_exists(suite) and psutil.Process(suite).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.3)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if suite:
        threading.Thread(target=watch, daemon=True).start()


def main(path: str, measurements: str = 'replk_mm.bench.suites.measurements', patience: float = 20.0) -> int:
    """Run a task.

    Args:
        path: The task's file.
        measurements: Module with ``TABLE`` and ``environment()``.
        patience: Seconds to wait for another process, such as one whose suite was just killed.

    Returns:
        Status: 0 if all was measured, 1 if not, :data:`BUSY` if another process runs the row, 130 if interrupted.
    """
    exit_with_suite()
    task = Task.model_validate_json(Path(path).read_text())
    rank = int(os.environ.get(dict(pytorch='RANK', slurm='SLURM_PROCID').get(task.launcher, ''), 0))
    try:
        with FileLock(task.folder / 'lock', patience) if rank == 0 else contextlib.nullcontext():
            if task.launcher == 'none':  # the process of a killed suite may have recorded more meanwhile
                task = task.subset(task.unfinished())
            module = importlib.import_module(measurements)  # imports torch
            return 0 if run_task(task, module.TABLE, module.environment(), rank) else 1
    except Timeout:
        print(f'{task.folder}: another process is running this row and seed', flush=True)
        return BUSY
    except KeyboardInterrupt as error:  # not a failure: the row continues when the suite does
        print(error or 'interrupted', flush=True)
        return INTERRUPTED_STATUS


if __name__ == '__main__':
    from replk_mm.engine.process import setup_process

    setup_process()
    sys.exit(main(sys.argv[1]))
