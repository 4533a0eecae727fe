"""Run the remaining rows of a suite, each row and seed in a process of its own, so that a crash affects no other."""

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import replk_mm
from replk_mm.bench import records
from replk_mm.bench.report.tables import FIGURE_NAMES
from replk_mm.bench.suites.progress import read_progress, time_left
from replk_mm.bench.suites.task import Task, utc_now
from replk_mm.bench.suites.worker import BUSY, DISTRIBUTED, SUITE_PID
from replk_mm.engine.config import usable_cores
from replk_mm.errors import printable
from replk_mm.files import write_atomic
from replk_mm.text import format_duration

#: Measurements that a busy machine would falsify.
ALONE = ('speed', 'memory')
#: Seconds that processes have to end after SIGTERM, in which a training writes a checkpoint.
_GRACE = 30.0
_SECONDS_BETWEEN_ESTIMATES = 2.0


@dataclass(frozen=True)
class Settings:
    """How to run tasks."""

    jobs: int = 1  # tasks at a time
    launcher: str = 'none'  # of training and test of a row: 'none', 'pytorch' or 'slurm'
    processes: int = 1  # of each row, under a launcher
    module: str = 'replk_mm.bench.suites.worker'  # what a process runs, python -m


def schedule(tasks: Sequence[Task], settings: Settings) -> list[tuple[int, list[Task]]]:
    """The stages of a run: the number of processes at a time, and their tasks.

    Measurements that the processes of a launcher make together come first, those that need a quiet machine at the end.
    """
    if settings.jobs == 1 and settings.launcher == 'none':
        return [(1, list(tasks))]
    first, last = [], []
    for task in tasks:
        together = tuple(
            m for m in task.measures if (m not in ALONE if settings.launcher == 'none' else m in DISTRIBUTED)
        )
        rest = tuple(m for m in task.measures if m not in together)
        if together:
            first.append(task.subset(together, settings.launcher))
        if rest:
            last.append(task.subset(rest))
    return [(jobs, part) for jobs, part in ((settings.jobs, first), (1, last)) if part]


class SuiteRunner:
    """Runs each task in a process of its own, and shows the progress and the time left.

    Args:
        settings: How to run tasks.
        environment: Returns versions and hardware, for the records of processes that died.
        console: Where progress is shown. Defaults to standard error.
    """

    def __init__(
        self, settings: Settings, environment: Callable[[], dict[str, Any]], console: Console | None = None
    ) -> None:
        self.settings, self.environment = settings, environment
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._running: set[subprocess.Popen] = set()
        self._lock, self._interrupted = threading.Lock(), False
        self._stages: list[tuple[int, list[Task]]] = []  # with the tasks that have not ended
        self._ended = self._count = 0
        self._announce = math.inf  # when the time left is printed: the first iterations are slow

    def run(self, tasks: Sequence[Task]) -> list[tuple[Task, str]]:
        """Run tasks to their end.

        Args:
            tasks: From :func:`replk_mm.bench.suites.plan.remaining_tasks`.

        Returns:
            Tasks that failed, with the reason.

        Raises:
            KeyboardInterrupt: On Ctrl-C or SIGTERM, after all processes have ended.
        """
        failed: list[tuple[Task, str]] = []
        self._stages, self._announce = schedule(tasks, self.settings), time.monotonic() + 60
        self._count = sum(len(part) for _, part in self._stages)
        self._overall = self.progress.add_task('all rows', total=self._count)
        with _sigterm_interrupts(), self.progress:
            for jobs, part in self._stages:
                untrained = {task.name for task, reason in failed if reason.startswith('train: ')}
                self._count -= sum(task.name in untrained for task in part)
                part[:] = [task for task in part if task.name not in untrained]
                failed += self._run_stage(list(part), jobs)
        return failed

    def _run_stage(self, tasks: list[Task], jobs: int) -> list[tuple[Task, str]]:
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            slots.put(slot)
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(self._run_one, task, jobs, slots): task for task in tasks}
            running = set(futures)
            try:
                while running:
                    ended, running = wait(running, _SECONDS_BETWEEN_ESTIMATES, FIRST_COMPLETED)
                    for future in ended:
                        future.result()
                    self._show_time_left()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._end()
                raise
        return [(task, reason) for future, task in futures.items() for reason in future.result()]

    def _show_time_left(self) -> None:
        """Update the estimate in the progress bar; print the first one."""
        left = self._time_left()
        if left:
            self.progress.update(self._overall, description=f'all rows, {left}')
            if time.monotonic() > self._announce:
                self._announce = math.inf
                self._print(left)

    def _time_left(self) -> str:
        stages = [(jobs, list(part)) for jobs, part in self._stages]
        tasks = [task for _, part in stages for task in part]
        return time_left(tasks[0].work_dir, stages) if tasks else ''

    def _print(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _run_one(self, task: Task, jobs: int, slots: 'queue.SimpleQueue[int]') -> list[str]:
        """Run a task in a process; returns why measurements failed, ``'MEASUREMENT: why'`` each."""
        slot, started = slots.get(), utc_now()
        offset, logged = (path.stat().st_size if path.exists() else 0 for path in (task.results, task.log))
        bar = self.progress.add_task(task.name, total=None)
        with self._lock:
            if self._interrupted:
                return []
            process = self._start(task, jobs, slot)
            self._running.add(process)
        while process.poll() is None:
            time.sleep(0.1)
            training = read_progress(task, 'train')
            self.progress.update(bar, total=training.get('iterations'), completed=training.get('iteration', 0))
        with self._lock:
            self._running.discard(process)
            if self._interrupted:
                return []
        _kill(process, signal.SIGKILL)  # its data loaders may have survived it
        new = {record['measurement']: record for record in records.records_since(task.results, offset)}
        reasons = self._failures(task, process.returncode, new, started, logged)
        slots.put(slot)
        self.progress.remove_task(bar)
        for _, part in self._stages:
            part[:] = [other for other in part if other is not task]
        self._ended += 1
        self.progress.update(self._overall, completed=self._ended)
        left = self._time_left()
        line = f'FAILED: {"; ".join(r.splitlines()[0] for r in reasons)} ({task.log})' if reasons else summarize(new)
        took = format_duration((utc_now() - started).total_seconds())
        self._print(f'[{self._ended}/{self._count}] {task.name}: {line} [{took}{left and f", {left}"}]')
        return reasons

    def _start(self, task: Task, jobs: int, slot: int) -> subprocess.Popen:
        file = write_atomic(task.folder / 'task.json', task.model_dump_json(indent=1))
        processes = self.settings.processes if task.launcher != 'none' else 1
        # Under Slurm a process may be on another machine, and ends with its job step.
        environment = {
            **os.environ,
            SUITE_PID: '' if task.launcher == 'slurm' else str(os.getpid()),
            'PYTHONPATH': python_path(),
        }
        if task.launcher == 'slurm':  # several rows may train on one machine
            job = int(os.environ.get('SLURM_JOB_ID', 0))
            environment.setdefault('MASTER_PORT', str(20_000 + (job * 8 + slot) % 10_000))
        if jobs * processes > 1:
            threads = min(usable_cores(), int(os.environ.get('OMP_NUM_THREADS') or 1 << 16))
            environment['OMP_NUM_THREADS'] = str(max(1, threads // (jobs * processes)))
        visible = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
        if jobs > 1 and len(visible) > processes and task.launcher != 'slurm':  # which assigns them itself
            environment['CUDA_VISIBLE_DEVICES'] = ','.join(devices_of(visible, slot, processes))
        with task.log.open('ab') as log:
            return subprocess.Popen(
                command(task, file, self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _failures(self, task: Task, status: int, new: Mapping[str, dict], started: Any, logged: int) -> list[str]:
        """Reasons of a process's failed measurements; records the failure of a process that died."""
        if status == BUSY:
            return ['another process is running this row and seed']
        reasons = [f'{name}: {record["reason"]}' for name, record in new.items() if record['status'] == 'failed']
        missing = [name for name in task.unfinished() if name not in new]
        # A process stops by itself after a failed training, and after any failure under a launcher.
        stopped = any(reason.startswith('train: ') for reason in reasons) or (reasons and task.launcher != 'none')
        if missing and not stopped:
            reason = describe_exit(status, task.log, logged)
            task.append_failure(missing[0], started, self.environment(), reason)
            reasons.append(f'{missing[0]}: {reason}')
        return reasons

    def _end(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends more of them to a job that it requeues
        with self._lock:
            self._interrupted = True
            running = list(self._running)
        for process in running:
            _kill(process, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            _kill(process, signal.SIGKILL)


def python_path() -> str:
    """``PYTHONPATH`` of processes that import this package."""
    return os.pathsep.join(filter(None, [str(Path(replk_mm.__file__).parents[1]), os.environ.get('PYTHONPATH')]))


def devices_of(visible: Sequence[str], slot: int, count: int) -> list[str]:
    """The devices of one of several tasks that run at a time: ``count`` of the visible ones, in turn."""
    return [visible[(slot * count + i) % len(visible)] for i in range(count)]


def command(task: Task, file: Path, settings: Settings) -> list[str]:
    """The command line of a task's process or processes."""
    worker = ['-m', settings.module, str(file)]
    if task.launcher == 'pytorch':
        return [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            str(settings.processes),
            *worker,
        ]
    if task.launcher == 'slurm':
        return ['srun', '--ntasks', str(settings.processes), '--kill-on-bad-exit=1', sys.executable, *worker]
    return [sys.executable, *worker]


def describe_exit(status: int, log: Path, start: int = 0) -> str:
    """Describe the end of a process that left no record of its failure.

    Args:
        status: Exit status; negative for a signal.
        log: Output of the process, whose last lines are quoted.
        start: Size of the log when the process began.
    """
    number = -status if status < 0 else status - 128
    reason = f'ended with status {status}'
    if number in {*signal.Signals}:
        why = {signal.SIGKILL: ' (killed: out of memory?)', signal.SIGBUS: ' (shared memory full?)'}
        reason = f'ended by signal {number}, {signal.Signals(number).name}{why.get(signal.Signals(number), "")}'
    output = log.read_bytes()[start:].decode(errors='replace') if log.exists() else ''
    lines = [line.strip()[-300:] for line in output.splitlines() if line.strip()]
    return '\n'.join([reason, *lines[-3:]])


def summarize(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of a row in one line, from its records by measurement."""
    values = {name: record['values'] for name, record in found.items() if record['status'] == 'done'}
    words = []
    if metric := values.get('metric'):
        words.append(f'{metric["primary"]} {metric["metrics"][metric["primary"]]:.2f}')
    if counts := values.get('complexity'):
        parameters = counts.get('merged_parameters', counts['inference_parameters'])
        macs = counts.get('merged_macs', counts['macs'])
        words.append(f'{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} G MACs')
    for form, times in values.get('speed', {}).get('forms', {}).items():
        words.append(f'{FIGURE_NAMES[form]} {times["median_ms"]:.1f} ms{" ?" if times.get("unreliable") else ""}')
    for name in ('inference_bytes', 'training_bytes'):
        if size := values.get('memory', {}).get(name):
            words.append(f'{FIGURE_NAMES[name]} {size / 2**20:.0f} MiB')
    return '; '.join(words) or ', '.join(values) or 'nothing measured'


def _kill(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, which Slurm sends at the time limit, end the suite as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
