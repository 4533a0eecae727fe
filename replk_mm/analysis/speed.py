"""Wall time, measured so that two networks can be compared on a noisy machine."""
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: Over all repeats.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.median:.1f} ({self.low:.1f}-{self.high:.1f})'


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Time several calls in turns, so that what the machine does besides falls on all of them alike.

    Args:
        calls: What to time, by name.
        repeats: Rounds that count.
        warmup: Rounds that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for i in range(warmup + repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    return {name: Timing(*(1e3 * q for q in (statistics.median(s), *statistics.quantiles(s, n=4)[::2])))
            for name, s in seconds.items()}
