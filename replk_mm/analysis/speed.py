"""Wall time and memory, measured so that two networks can be compared on a noisy machine."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

Call = Callable[[], object]

#: Rounds of every measurement, whatever its time budget: fewer have no quartiles.
MIN_ROUNDS = 3


@dataclass
class Timing:
    """Milliseconds of one call, or a ratio of two."""

    median: float  #: over all rounds
    low: float  #: first quartile
    high: float  #: third quartile

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Timing':
        """Median and quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, low, high)

    def __str__(self) -> str:
        return f'{self.median:.1f} ({self.low:.1f}-{self.high:.1f})'


@dataclass
class Measurement:
    """Result of :func:`measure`."""

    milliseconds: dict[str, list[float]]  #: of every call, by name; equal indices belong to the same round
    warmup: int  #: rounds before, which do not count

    @property
    def rounds(self) -> int:
        """Rounds that count."""
        return len(next(iter(self.milliseconds.values())))

    def timing(self, name: str) -> Timing:
        """Milliseconds of one call."""
        return Timing.of(self.milliseconds[name])

    def times_as_fast(self, name: str, reference: str) -> Timing:
        """How many times as fast as ``reference`` a call is: paired ratios, so that slow rounds cancel."""
        pairs = zip(self.milliseconds[reference], self.milliseconds[name], strict=True)
        return Timing.of([slow / fast for slow, fast in pairs])


def measure(
    calls: Mapping[str, Call],
    repeats: int = 15,
    warmup: int = 2,
    seconds: float | None = None,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    before: Mapping[str, Call] | None = None,
) -> Measurement:
    """Time several calls in turns, so that other load on the machine affects all of them alike.

    Args:
        calls: What to time, by name.
        repeats: Rounds that count, at most.
        warmup: Rounds that do not, at most.
        seconds: Start no further round that would probably end later, except one warm-up and :data:`MIN_ROUNDS`. A
            quarter is for the warm-up. Defaults to no limit.
        pause: Seconds of rest before every call, in which threads of another library go to sleep.
        clock: Seconds.
        before: Untimed calls before each call, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin, longest, warmed, done = clock(), 0.0, 0, 0

    def fits(share: float) -> bool:
        return seconds is None or clock() - begin + longest <= share * seconds

    def one_round() -> dict[str, float]:
        nonlocal longest
        start = clock()
        times = {}
        for name, call in calls.items():
            if before and name in before:
                before[name]()
            if pause:
                time.sleep(pause)
            called = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name] = 1e3 * (clock() - called)
        longest = max(longest, clock() - start)
        return times

    while warmed < warmup and (warmed == 0 or fits(0.25)):
        one_round()
        warmed += 1
    while done < repeats and (done < MIN_ROUNDS or fits(1.0)):
        for name, milliseconds in one_round().items():
            found[name].append(milliseconds)
        done += 1
    return Measurement(found, warmed)


def matrix_product(dtype: torch.dtype, device: str = 'cpu', side: int = 2048, seconds: float = 1.0) -> float:
    """GFLOP/s of the product of two square matrices: the roofline with the present number of threads.

    Args:
        dtype: Of both matrices.
        device: Of both matrices.
        side: Rows and columns.
        seconds: Approximate duration of the measurement.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found = measure({'product': lambda: a @ b}, repeats=50, seconds=seconds)
    return 2 * side**3 / found.timing('product').median / 1e6


def say(line: str) -> None:
    """Print progress to standard error; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def memory_growth(call: Call, device: str = 'cpu') -> int | None:
    """Bytes that ``call`` needs at its peak beyond what is in use before it.

    On CPUs as the kernel counts for the whole process. Call it in a fresh process: memory that earlier calls returned
    to the allocator only would not be counted.

    Returns:
        None where the system does not tell, or if the growth is too small to be seen.
    """
    gc.collect()
    if device != 'cpu':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before or None
    if not Path('/proc/self/clear_refs').exists():
        return None
    trim()
    Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    before, peak = _resident()
    call()
    reached = _resident()[1]
    return reached - before if reached > peak else None


def trim() -> None:
    """Return freed memory to the system (glibc)."""
    give_back = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
    if give_back is not None:
        give_back(0)


def _resident() -> tuple[int, int]:
    """Resident memory of this process and its peak, in bytes."""
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines['VmRSS'].split()[0]) * 1024, int(lines['VmHWM'].split()[0]) * 1024
