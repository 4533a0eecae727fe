"""The process of one row and seed of a suite: measure what its task says, and record every measurement when it is made.

    python -m replk_mm.bench.suites.row runs/ROW/SEED/task.json

It ends with the suite that started it. Of several processes under torchrun or Slurm the first one writes.
"""
import contextlib
import fcntl
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replk_mm.bench import records
from replk_mm.bench.suites.task import Task, now
from replk_mm.errors import INTERRUPTED_STATUS, UserError, message_of

#: Names the process of the suite to those that it starts.
SUITE_PID = 'REPLK_MM_SUITE_PID'
#: Exit status of a process whose row another process is at.
BUSY = 75
#: Seconds to wait for a process of an earlier run to end: those of a suite that was killed notice within one.
PATIENCE = 20.
#: What several processes do together.
DISTRIBUTED = ('train', 'metric')


@dataclass
class Found:
    """What a measurement found; plain data.

    Attributes:
        values: Of the record.
        protocol: What must be the same for values to be ranked together.
        facts: What else there is to know.
        files: Paths below the work dir, by what they are.
        checkpoint: The weights that were measured, None for none.
    """

    values: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, Any] | None = None


Measure = Callable[[Task], Found]


class BusyError(Exception):
    """Another process is at the same row and seed."""


def perform(task: Task, table: Mapping[str, Measure], environment: Mapping[str, Any], rank: int = 0) -> bool:
    """Measure what a task says; a measurement that fails is recorded with its reason, and the next one follows.

    Args:
        task: What to do.
        table: How each measurement is made.
        environment: Versions and hardware, for the records.
        rank: Of this process among those of the row; all but 0 write no records.

    Returns:
        Whether everything was measured.
    """
    whole = True
    for name in task.measures:
        started, reason = now(), ''
        if rank == 0:
            task.say_stage(name)
            print(f'== {task.name}: {name}', flush=True)
        try:
            found = table[name](task)
            if rank == 0:
                records.append(task.record(name, started, environment, **vars(found)), task.results)
        except Exception as error:  # whatever it is, the other rows go on
            traceback.print_exc()
            reason = reason_of(error)
        if reason:
            whole = False
            if rank == 0:
                print(f'failed: {reason}', flush=True)
                task.fail(name, started, environment, reason)
            if name == 'train' or rank or task.launcher != 'none':
                break  # without weights there is nothing more to measure; other processes may wait for this one's part
    return whole


def reason_of(error: BaseException) -> str:
    """An error in words for a table: the user's message, or the type and first line of another one."""
    if isinstance(error, UserError):
        return message_of(error)
    text = (str(error).strip() or 'no message').splitlines()[0]
    return f'{type(error).__name__}: {text}'


@contextlib.contextmanager
def alone(folder: Path, patience: float | None = None) -> Iterator[None]:
    """Keep other processes from the same row and seed.

    Args:
        folder: Of the row and seed.
        patience: Seconds to wait for another process; None for :data:`PATIENCE`.

    Raises:
        BusyError: If another one does not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('a') as file:
        end = time.monotonic() + (PATIENCE if patience is None else patience)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BusyError(f'{folder}: another process is at it') from None
                time.sleep(0.05)
        yield


def end_with_suite(interval: float = 0.3) -> None:
    """End this process, and those of its group, when the suite that started it is gone.

    A suite that is killed has no chance to end its processes, which would go on and be in the way of the next one's.
    """
    suite = os.environ.get(SUITE_PID)
    if not suite:
        return

    def end() -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def watch() -> None:
        while _runs(int(suite)):
            time.sleep(interval)
        end()

    if not _runs(int(suite)):
        end()
    threading.Thread(target=watch, daemon=True).start()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # where there is a /proc; one that nobody has waited for is gone all the same
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return True


def rank_of(launcher: str) -> int:
    """This process's place among those of its row, as its launcher announces it."""
    return int(os.environ.get({'pytorch': 'RANK', 'slurm': 'SLURM_PROCID'}.get(launcher, ''), 0))


def main(arguments: list[str], measures: str = 'replk_mm.bench.suites.measures') -> int:
    """Do what a task says.

    Args:
        arguments: The task's file.
        measures: Module with the functions ``TABLE`` and ``environment``.

    Returns:
        Status: 0 if all was measured, 1 if not, :data:`BUSY` if another process is at it, 130 if it was told to end.
    """
    end_with_suite()
    task = Task.read(Path(arguments[0]))
    rank = rank_of(task.launcher)
    try:
        with alone(task.folder) if rank == 0 else contextlib.nullcontext():
            # A process of a suite that was killed may have been at it until now, and have come further.
            left = task.left() if rank == 0 else task.measures
            if task.launcher != 'none' and left != task.measures:
                raise BusyError(f'{task.folder}: another process has just been at it')  # which the others do not know
            task = task.part(left, task.launcher)
            module = importlib.import_module(measures)  # imports torch
            return 0 if perform(task, module.TABLE, module.environment(), rank) else 1
    except BusyError as error:
        print(error, flush=True)
        return BUSY
    except KeyboardInterrupt as error:  # no failure: the row goes on when the suite does
        print(error or 'interrupted', flush=True)
        return INTERRUPTED_STATUS


if __name__ == '__main__':
    from replk_mm.cli import setup_process
    setup_process()
    sys.exit(main(sys.argv[1:]))
