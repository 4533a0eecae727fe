"""What a user sees of a suite that runs: a line for each row that ends, and one that tells how far the others are."""
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from replk_mm.bench.suites.task import Task
from replk_mm.errors import printable

#: Seconds between lines of progress where they cannot be written over.
_EVERY = 60.


class Progress:
    """Lines of progress with the time that is left.

    Args:
        count: Processes that will have run at the end.
        jobs: Processes at a time.
        out: Where to.
    """

    def __init__(self, count: int, jobs: int, out: TextIO | None = None) -> None:
        self.count, self.jobs, self.out = count, jobs, out or sys.stderr
        self.seconds: list[float] = []
        self._said, self._width = time.monotonic(), 0

    def say(self, line: str) -> None:
        """A line that stays."""
        self._wipe()
        print(printable(line), file=self.out, flush=True)

    def ended(self, line: str, seconds: float) -> None:
        """Say how a process ended that took ``seconds``."""
        self.seconds.append(seconds)
        self.say(f'[{len(self.seconds)}/{self.count}] {line}  [{duration(seconds)}]')

    def update(self, running: Sequence[tuple[Task, float]]) -> None:
        """Tell how far tasks are that run since so many seconds: at once on a terminal, else now and then."""
        terminal = self.out.isatty()
        if not terminal and time.monotonic() - self._said < _EVERY:
            return
        self._said = time.monotonic()
        parts = [f'{task.name} {_place(task)}' for task, _ in running]
        line = f'[{len(self.seconds)}/{self.count}] {"; ".join(parts)}; {self._left(running)}'
        if terminal:
            self._wipe()
            line = line[:119]
            self._width = len(line)
        print(line, end='' if terminal else '\n', file=self.out, flush=True)

    def _wipe(self) -> None:
        if self._width:
            print(f'\r{" " * self._width}\r', end='', file=self.out)
        self._width = 0

    def _left(self, running: Sequence[tuple[Task, float]]) -> str:
        left = time_left(self.seconds, [_way(task, seconds) for task, seconds in running],
                         self.count - len(self.seconds) - len(running), self.jobs)
        return 'time left: not known yet' if left is None else f'about {duration(left)} left'


def time_left(ended: Sequence[float], running: Sequence[tuple[float, float]], waiting: int, jobs: int) -> float | None:
    """Seconds that a suite still needs, as far as can be told.

    Args:
        ended: Seconds that processes took.
        running: Of processes that run, the seconds of the training and the part of it that is done, 0 to 1; or their own.
        waiting: Processes that have not begun.
        jobs: Processes at a time.

    Returns:
        None if nothing has ended and no training is under way.
    """
    # A training that has come through a part of its iterations tells more than what other rows took.
    whole = [seconds / part if part else None for seconds, part in running]
    known = [*ended, *(max(of, 0.) for of in whole if of)]
    if not known:
        return None
    mean = sum(known) / len(known)
    rest = [max((of if of else mean) - seconds, 0.) for of, (seconds, _) in zip(whole, running, strict=True)]
    return max([*rest, (sum(rest) + waiting * mean) / jobs])


def _way(task: Task, seconds: float) -> tuple[float, float]:
    """Seconds and part of a training; it may have been begun by an earlier process, whose seconds count in."""
    found = task.training() if task.stage() == 'train' else {}
    return (found['seconds'], found['iteration'] / found['iterations']) if found.get('iterations') else (seconds, 0.)


def _place(task: Task) -> str:
    stage = task.stage() or 'starts'
    found = task.training() if stage == 'train' else {}
    return f'train {found["iteration"]}/{found["iterations"]}' if found else stage


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def figures(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures of a row in one line."""
    found = {record['measurement']: record['values'] for record in records if record['status'] == 'done'}
    words = []
    if 'metric' in found:
        name = found['metric']['primary']
        words.append(f'{name} {found["metric"]["metrics"][name]:.2f}')
    if 'complexity' in found:
        of = found['complexity']
        words.append(f'{of["inference_parameters"] / 1e6:.2f} M parameters, {of["macs"] / 1e9:.2f} G MACs')
    if 'speed' in found:
        words.append(', '.join(f'{form} {of["median_ms"]:.1f} ms' for form, of in found['speed']['forms'].items()))
    if 'memory' in found:
        words += [f'{name.removesuffix("_bytes")} {size / 2**20:.0f} MiB' for name, size in found['memory'].items()
                  if name.endswith('_bytes') and size]
    if 'shape_bias' in found and found['shape_bias'].get('shape_bias') is not None:
        words.append(f'shape bias {found["shape_bias"]["shape_bias"]:.2f}')
    return ', '.join(words) or ', '.join(found) or 'nothing measured'
