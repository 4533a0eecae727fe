"""Wall time and memory, measured so that two networks can be compared on a noisy machine."""
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

#: Rounds of a measurement that a time budget cannot forbid: fewer have no quartiles.
MIN_ROUNDS = 3


@dataclass
class Timing:
    """Milliseconds of one call, or a ratio of two.

    Attributes:
        median: Over all repeats.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Timing':
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)

    def __str__(self) -> str:
        return f'{self.median:.1f} ({self.low:.1f}-{self.high:.1f})'


@dataclass
class Measurement:
    """What :func:`measure` found.

    Attributes:
        milliseconds: Of every call, by name; the ``i``-th of all calls are of the same round.
        warmup: Rounds before, which do not count.
    """

    milliseconds: dict[str, list[float]]
    warmup: int

    @property
    def rounds(self) -> int:
        """Rounds that count."""
        return len(next(iter(self.milliseconds.values())))

    def timing(self, name: str) -> Timing:
        """Milliseconds of one call."""
        return Timing.of(self.milliseconds[name])

    def times_as_fast(self, name: str, reference: str) -> Timing:
        """How many times as fast as ``reference`` a call is: ratios within a round, which what slows a round down spares."""
        pairs = zip(self.milliseconds[reference], self.milliseconds[name], strict=True)
        return Timing.of([slow / fast for slow, fast in pairs])


def measure(calls: Mapping[str, Call], repeats: int = 15, warmup: int = 2, seconds: float | None = None,
            pause: float = 0., clock: Callable[[], float] = time.perf_counter,
            before: Mapping[str, Call] | None = None) -> Measurement:
    """Time several calls in turns, so that what the machine does besides falls on all of them alike.

    Args:
        calls: What to time, by name.
        repeats: Rounds that count, at most.
        warmup: Rounds that do not, at most.
        seconds: Start no further round that would likely end later, but run one to warm up and :data:`MIN_ROUNDS`. A quarter
            of it is for the warm-up. None for no limit.
        pause: Seconds of rest before every call, in which threads of another library go to sleep.
        clock: Seconds.
        before: What to do, untimed, before each call, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin, longest, warmed, done = clock(), 0., 0, 0

    def fits(share: float) -> bool:
        return seconds is None or clock() - begin + longest <= share * seconds

    def one_round() -> dict[str, float]:
        nonlocal longest
        start = clock()
        times = {}
        for name, call in calls.items():
            (before or {}).get(name, int)()
            times[name] = 1e3 * _seconds(call, pause, clock)
        longest = max(longest, clock() - start)
        return times

    while warmed < warmup and (warmed == 0 or fits(0.25)):
        one_round()
        warmed += 1
    while done < repeats and (done < MIN_ROUNDS or fits(1.)):
        for name, milliseconds in one_round().items():
            found[name].append(milliseconds)
        done += 1
    return Measurement(found, warmed)


def _seconds(call: Call, pause: float, clock: Callable[[], float]) -> float:
    if pause:
        time.sleep(pause)
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def say(line: str) -> None:
    """Tell of progress on standard error, which leaves standard output to results."""
    print(line, file=sys.stderr, flush=True)


def interleaved(calls: Mapping[str, Call], repeats: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Time several calls without gradients in turns; see :func:`measure`."""
    with torch.no_grad():
        found = measure(calls, repeats, warmup)
    return {name: found.timing(name) for name in calls}


def matrix_product(dtype: torch.dtype, device: str = 'cpu', side: int = 2048, seconds: float = 1.) -> float:
    """GFLOP/s of the product of two square matrices: what this machine can do with the present threads.

    Args:
        dtype: Of both matrices.
        device: Where they are.
        side: Rows and columns.
        seconds: About how long to measure.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found = measure({'product': lambda: a @ b}, repeats=50, seconds=seconds)
    return 2 * side**3 / found.timing('product').median / 1e6


def memory_growth(call: Call, device: str = 'cpu') -> int | None:
    """Bytes that ``call`` needs at its peak beyond what is in use before it.

    On CPUs of the whole process, as the kernel counts; call it in a process of its own, for memory that earlier calls used
    and gave back to no one but the allocator would be missing.

    Returns:
        None where the system does not tell, or the growth is too small to be seen.
    """
    gc.collect()
    if device != 'cpu':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before or None
    trim()  # pages that the allocator keeps would be used again, unseen
    _forget_peak()
    in_use, peak = _status('VmRSS'), _status('VmHWM')
    call()
    reached = _status('VmHWM')
    if in_use is None or peak is None or reached is None or reached <= peak:
        return None  # below an earlier peak that could not be forgotten, there is nothing to see
    return reached - in_use


def trim() -> None:
    """Let the C library give freed memory back to the system. That of Alpine keeps none, and has no such call."""
    if sys.platform == 'linux':
        give_back = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        if give_back is not None:
            give_back(0)


def _forget_peak() -> None:
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f'{field}:')]
    return int(found[0][1]) * 1024 if found else None
