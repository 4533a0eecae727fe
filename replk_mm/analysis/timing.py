"""Wall time and memory of calls, measured so that a noisy machine affects all calls alike."""

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

Call = Callable[[], object]

#: Smallest number of rounds of a measurement, whatever its time budget. Fewer have no quartiles.
MIN_ROUNDS = 3
#: Interquartile range over the median, from which on a timing is not reliable.
MAX_SPREAD = 0.2
#: Share of the usable CPUs that other processes use, from which on a timing is not reliable.
MAX_LOAD = 0.1
#: Seconds in which that share is measured at least, or the budget if it is smaller: the system's ticks are 10 ms.
_LOAD_SECONDS = 0.5
#: Clocks of a measurement.
WALL_TIME, CUDA_EVENTS = 'wall time', 'CUDA events'
#: Bytes to write before a call that CUDA events time: more than the L2 cache of any GPU, and as this takes longer than
#: most launches from Python, the GPU does not wait for the call's first kernel.
_FLUSHED_BYTES = 2**29


@dataclass
class Timing:
    """Median and quartiles: milliseconds of a call, or a ratio of two calls."""

    median: float
    low: float  #: first quartile
    high: float  #: third quartile

    @classmethod
    def from_samples(cls, values: Sequence[float]) -> 'Timing':
        """Median and quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, low, high)

    def __str__(self) -> str:
        return f'{self.median:.1f} ({self.low:.1f}-{self.high:.1f})'

    def problem(self, load: float = 0.0) -> str:
        """Why the timing is not reliable and must not be ranked; ``''`` if it is reliable.

        Args:
            load: Share of the usable CPUs that other processes used.
        """
        if load > MAX_LOAD:
            return f'other processes used {load:.0%} of the CPUs'
        if self.high - self.low > MAX_SPREAD * self.median:
            return f'the quartiles are {(self.high - self.low) / self.median:.0%} of the median apart'
        return ''


@dataclass
class Timings:
    """Result of :func:`time_interleaved`."""

    milliseconds: dict[str, list[float]]  #: of each call, by name; equal indices belong to the same round
    warmup: int  #: number of warm-up rounds, which are not among ``milliseconds``
    load: float = 0.0  #: share of the usable CPUs that other processes used, 0 to 1
    clock: str = WALL_TIME  #: or :data:`CUDA_EVENTS`

    @property
    def rounds(self) -> int:
        """Number of measured rounds."""
        return len(next(iter(self.milliseconds.values())))

    def summary(self, name: str) -> Timing:
        """Milliseconds of one call."""
        return Timing.from_samples(self.milliseconds[name])

    def problem(self, name: str) -> str:
        """Why the time of one call is not reliable; ``''`` if it is."""
        return self.summary(name).problem(self.load)

    def speedup(self, name: str, reference: str) -> Timing:
        """Time of ``reference`` over time of ``name``, paired by round, so that slow rounds cancel."""
        pairs = zip(self.milliseconds[reference], self.milliseconds[name], strict=True)
        return Timing.from_samples([slow / fast for slow, fast in pairs])


def time_interleaved(
    calls: Mapping[str, Call],
    repeats: int = 15,
    warmup: int = 2,
    seconds: float | None = None,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    before: Mapping[str, Call] | None = None,
    device: str = 'cpu',
    events: bool = False,
) -> Timings:
    """Time several calls in turns, so that other load on the machine affects all of them alike.

    Args:
        calls: Calls to time, by name.
        repeats: Largest number of measured rounds.
        warmup: Largest number of warm-up rounds.
        seconds: Time budget, of which the warm-up takes at most a quarter. A round that would probably exceed it does
            not start, except one warm-up round and :data:`MIN_ROUNDS`. Defaults to None: no limit.
        pause: Seconds to sleep before each call, in which threads of other libraries become idle.
        clock: Returns seconds.
        before: Untimed calls to make before each call, by name.
        device: ``'cpu'``, or the CUDA device that the calls run on: a call ends when the device has finished.
        events: Time the work on the CUDA device by its own events, in place of the wall time. Each call starts with an
            empty L2 cache.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, longest, warmed, done, load = clock(), 0.0, 0, 0, _LoadMeter()
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device) if events else None

    def fits(share: float) -> bool:
        return seconds is None or clock() - begin + longest <= share * seconds

    def time_call(call: Call) -> float:
        if flushed is None:
            called = clock()
            call()
            if device != 'cpu':
                torch.cuda.synchronize()
            return 1e3 * (clock() - called)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def one_round() -> dict[str, float]:
        nonlocal longest
        start = clock()
        times = {}
        for name, call in calls.items():
            if before and name in before:
                before[name]()
            if pause:
                time.sleep(pause)
            times[name] = time_call(call)
        longest = max(longest, clock() - start)
        return times

    while warmed < warmup and (warmed == 0 or fits(0.25)):
        one_round()
        warmed += 1
    while done < repeats and (done < MIN_ROUNDS or fits(1.0)):
        for name, milliseconds in one_round().items():
            samples[name].append(milliseconds)
        done += 1
    measured = load.read(_LOAD_SECONDS if seconds is None else min(seconds, _LOAD_SECONDS))
    return Timings(samples, warmed, measured, CUDA_EVENTS if events else WALL_TIME)


class _LoadMeter:
    """The share of the CPUs usable by this process that other processes use, from its construction on."""

    def __init__(self) -> None:
        self._process, self._begin = psutil.Process(), time.monotonic()
        self._process.cpu_percent()  # the next call returns the average since this one
        psutil.cpu_percent(percpu=True)

    def read(self, at_least: float) -> float:
        """The share, from 0 to 1, over a time of ``at_least`` so many seconds."""
        time.sleep(max(0.0, self._begin + at_least - time.monotonic()))
        busy, own = psutil.cpu_percent(percpu=True), self._process.cpu_percent()
        usable = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(len(busy))
        return max(0.0, (sum(busy[cpu] for cpu in usable if cpu < len(busy)) - own) / (100 * len(usable)))


def matmul_gflops(dtype: torch.dtype, device: str = 'cpu') -> float:
    """GFLOP/s of the product of two 2048x2048 matrices, on GPUs 8192x8192: the roofline of arithmetic."""
    side = 2048 if device == 'cpu' else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timings = time_interleaved({'product': lambda: a @ b}, 50, seconds=1.0, device=device, events=device != 'cpu')
    return 2 * side**3 / timings.summary('product').median / 1e6


def copy_gbytes(device: str = 'cpu') -> float:
    """GB/s of a copy of 256 MiB, read and written: the roofline of memory."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {'copy': lambda: target.copy_(source)}
    timings = time_interleaved(calls, 50, seconds=1.0, device=device, events=device != 'cpu')
    return 2 * source.numel() / timings.summary('copy').median / 1e6


def print_progress(line: str) -> None:
    """Print a line to standard error; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def memory_growth(call: Call, device: str = 'cpu') -> int | None:
    """Peak memory of ``call`` beyond the memory in use before it, in bytes.

    On CPUs this is the resident memory of the whole process. Use a fresh process: memory that earlier calls have
    returned to the allocator would not be counted.

    Returns:
        None where the system does not report it, or if the growth is too small to measure.
    """
    if device != 'cpu':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before or None
    if not Path('/proc/self/clear_refs').exists():
        return None
    gc.collect()
    trim_heap()
    Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    before, peak = _resident_memory()
    call()
    reached = _resident_memory()[1]
    return reached - before if reached > peak else None


def trim_heap() -> None:
    """Return freed memory to the system (glibc)."""
    malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
    if malloc_trim is not None:
        malloc_trim(0)


def _resident_memory() -> tuple[int, int]:
    """Resident memory of this process and its peak, in bytes; psutil does not report the peak."""
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines['VmRSS'].split()[0]) * 1024, int(lines['VmHWM'].split()[0]) * 1024
