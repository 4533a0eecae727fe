"""Python threads that work on blocks of a tensor, each with one thread of torch's own.

A dozen small operators on a block that stays in one core's cache are much faster in a thread of their own than each of
them spread over all cores, which then wait for each other after every operator.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def parallel_for(work: Callable[[int], None], count: int, spread: bool) -> None:
    """Call ``work(0) .. work(count - 1)``; gradients are not recorded.

    Args:
        work: Must write to places that no other call touches: results then do not depend on the number of threads.
        count: Number of calls.
        spread: Make the calls in as many threads as torch has, rather than here.
    """
    threads = min(torch.get_num_threads(), count) if spread else 1
    inference = torch.is_inference_mode_enabled()

    def share(numbers: Iterable[int]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for i in numbers:
                work(i)

    if threads < 2:
        share(range(count))
        return
    # The calls are dealt out in turns rather than on demand: blocks take equally long.
    for done in [_pool(threads).submit(share, range(i, count, threads)) for i in range(threads)]:
        done.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)  # threads do not survive a fork
    with _lock:
        if key not in _pools:
            ready = threading.Barrier(threads + 1)

            def start() -> None:
                torch.get_num_threads()  # the first question in a thread sets what the process was told last
                torch.set_num_threads(1)
                ready.wait()

            before = torch.get_num_threads()
            pool = ThreadPoolExecutor(threads, 'replk_mm', initializer=start)
            for _ in range(threads):
                pool.submit(int)
            ready.wait()
            torch.set_num_threads(before)  # it counts for threads to come as well as for the one that calls it
            _pools[key] = pool
        return _pools[key]
