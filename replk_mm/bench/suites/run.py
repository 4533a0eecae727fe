"""Run what is left of a suite: every row and seed in a process of its own, so that one that dies takes no other along."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import replk_mm
from replk_mm.bench import records
from replk_mm.bench.suites.progress import Progress, figures
from replk_mm.bench.suites.row import BUSY, DISTRIBUTED, SUITE_PID
from replk_mm.bench.suites.task import Task, now

#: What a busy machine would falsify.
ALONE = ('speed', 'memory')
#: Lines of a process's output that go into the reason why it died, at most, and their characters.
_LINES, _CHARACTERS = 3, 300
#: Bytes at the end of its output in which they are looked for.
_TAIL = 2**16
#: Seconds that processes get to end by themselves.
_GRACE = 30.


@dataclass(frozen=True)
class Settings:
    """How to run tasks.

    Attributes:
        jobs: Processes at a time.
        launcher: ``'none'``, ``'pytorch'`` or ``'slurm'``: how training and test of a row are started.
        processes: Of each row, under a launcher.
        module: What a process runs, ``python -m``.
    """

    jobs: int = 1
    launcher: str = 'none'
    processes: int = 1
    module: str = 'replk_mm.bench.suites.row'


@dataclass
class _Process:
    task: Task
    popen: subprocess.Popen
    slot: int
    offset: int
    said: int
    started: datetime = field(default_factory=now)
    clock: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.clock


def stages(tasks: Sequence[Task], settings: Settings) -> list[tuple[int, list[Task]]]:
    """What runs one after the other: how many processes at a time, and their tasks.

    What several processes of a launcher do together comes first, and what needs a quiet machine by itself at the end.
    """
    if settings.jobs == 1 and settings.launcher == 'none':
        return [(1, list(tasks))]
    spread = settings.launcher != 'none'
    first, last = [], []
    for task in tasks:
        together = tuple(m for m in task.measures if (m in DISTRIBUTED if spread else m not in ALONE))
        rest = tuple(m for m in task.measures if m not in together)
        if together:
            first.append(task.part(together, settings.launcher))
        if rest:
            last.append(task.part(rest, 'none'))
    return [(jobs, part) for jobs, part in ((settings.jobs, first), (1, last)) if part]


def run(tasks: Sequence[Task], settings: Settings, environment: Callable[[], dict[str, Any]],
        out: TextIO | None = None) -> list[tuple[Task, str]]:
    """Run tasks to their end.

    Args:
        tasks: From :func:`replk_mm.bench.suites.plan.tasks_left`.
        settings: How.
        environment: Tells versions and hardware, for the records of processes that died.
        out: Where progress goes. Defaults to standard error.

    Returns:
        What failed, with the reason.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after all processes were ended.
    """
    parts = stages(tasks, settings)
    progress = Progress(sum(len(part) for _, part in parts), settings.jobs, out)
    failed: list[tuple[Task, str]] = []
    with _terminable():
        for jobs, part in parts:
            untrained = {task.name for task, reason in failed if reason.startswith('train: ')}
            left = [task for task in part if task.name not in untrained]
            progress.count -= len(part) - len(left)
            progress.jobs = jobs
            failed += _together(left, jobs, settings, environment, progress)
    return failed


def _together(tasks: list[Task], jobs: int, settings: Settings, environment: Callable[[], dict[str, Any]],
              progress: Progress) -> list[tuple[Task, str]]:
    waiting, running, failed = list(tasks), list[_Process](), list[tuple[Task, str]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                slot = min({*range(jobs)} - {process.slot for process in running})
                running.append(_start(waiting.pop(0), slot, jobs, settings))
            time.sleep(0.2)
            for process in [process for process in running if process.popen.poll() is not None]:
                running.remove(process)
                _signal(process, signal.SIGKILL)  # what it may have left behind, of data loaders
                reasons = _outcome(process, environment)
                failed += [(process.task, reason) for reason in reasons]
                line = f'FAILED: {"; ".join(r.splitlines()[0] for r in reasons)} ({process.task.log})' if reasons else \
                    figures(records.since(process.task.results, process.offset))
                progress.ended(f'{process.task.name}: {line}', process.seconds)
            if running:
                progress.update([(process.task, process.seconds) for process in running])
    finally:  # an interruption; otherwise none is left
        _end(running)
    return failed


def _start(task: Task, slot: int, jobs: int, settings: Settings) -> _Process:
    file = task.write()
    (task.folder / 'stage.json').unlink(missing_ok=True)
    # Under Slurm a process may be on another machine, and ends with its job step.
    environment = {**os.environ, SUITE_PID: '' if task.launcher == 'slurm' else str(os.getpid()),
                   'PYTHONPATH': os.pathsep.join(filter(None, [str(Path(replk_mm.__file__).parents[1]),
                                                               os.environ.get('PYTHONPATH')]))}
    processes = settings.processes if task.launcher != 'none' else 1
    if jobs * processes > 1:
        environment['OMP_NUM_THREADS'] = str(max(1, _threads() // (jobs * processes)))
    visible = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    if jobs > 1 and len(visible) > processes and task.launcher != 'slurm':  # which deals them out itself
        environment['CUDA_VISIBLE_DEVICES'] = ','.join(devices_of(visible, slot, processes))
    offset = task.results.stat().st_size if task.results.exists() else 0
    said = task.log.stat().st_size if task.log.exists() else 0
    with task.log.open('ab') as log:
        popen = subprocess.Popen(command(task, file, settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 env=environment, start_new_session=True)
    return _Process(task, popen, slot, offset, said)


def devices_of(visible: Sequence[str], slot: int, count: int) -> list[str]:
    """The devices of one of several tasks that run at a time: so many of those there are, in turn."""
    return [visible[(slot * count + i) % len(visible)] for i in range(count)]


def command(task: Task, file: Path, settings: Settings) -> list[str]:
    """The command line of a task's process or processes."""
    row = ['-m', settings.module, str(file)]
    if task.launcher == 'pytorch':
        return [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                '--nproc-per-node', str(settings.processes), *row]
    if task.launcher == 'slurm':
        return ['srun', '--ntasks', str(settings.processes), '--kill-on-bad-exit=1', sys.executable, *row]
    return [sys.executable, *row]


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    told = os.environ.get('OMP_NUM_THREADS', '')
    return min(cores, int(told)) if told.isdigit() and int(told) else cores


def _outcome(process: _Process, environment: Callable[[], dict[str, Any]]) -> list[str]:
    """Why measurements of a process that has ended failed, ``'MEASUREMENT: why'`` each; if it died, that is recorded too."""
    task, status = process.task, process.popen.returncode
    if status == BUSY:
        return ['another process is at this row and seed']
    found = {record['measurement']: record for record in records.since(task.results, process.offset)}
    reasons = [f'{name}: {record["reason"]}' for name, record in found.items() if record['status'] == 'failed']
    missing = [name for name in task.left() if name not in found]
    # A process that has told why it stops has been through; one that ends before it is through has died.
    stopped = any(reason.startswith('train: ') for reason in reasons) or (reasons and task.launcher != 'none')
    if missing and not stopped:
        stage = task.stage()
        at = stage if stage in missing else missing[0]
        reason = death(status, task.log, process.said)
        task.fail(at, process.started, environment(), reason)
        reasons.append(f'{at}: {reason}')
    return reasons


def death(status: int, log: Path, start: int = 0) -> str:
    """Why a process died that could not say so itself.

    Args:
        status: Of its end; negative for a signal.
        log: Its output, whose last lines are quoted.
        start: Bytes of it that earlier processes have written.
    """
    number = -status if status < 0 else status - 128 if status > 128 else 0
    reason = f'ended with status {status}'
    if number in {*signal.Signals}:
        why = {signal.SIGKILL: ' (killed: out of memory?)', signal.SIGBUS: ' (no room in shared memory?)'}
        reason = f'ended by signal {number}, {signal.Signals(number).name}{why.get(signal.Signals(number), "")}'
    with contextlib.suppress(OSError):
        with log.open('rb') as file:
            file.seek(max(start, log.stat().st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors='replace').splitlines() if line.strip()]
        return '\n'.join([reason, *(line[-_CHARACTERS:] for line in lines[-_LINES:])])
    return reason


def _signal(process: _Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.popen.pid, number)


def _end(running: Sequence[_Process]) -> None:
    for process in running:
        _signal(process, signal.SIGTERM)
    end = time.monotonic() + _GRACE
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(max(0., end - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.popen.wait()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, which Slurm sends when the time is over, end the suite as Ctrl-C does."""
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
