"""Parallel loops over blocks of a tensor, in Python threads that each use one torch thread.

A dozen small operators on a block in one core's cache are much faster in one thread than spread over all cores, which
wait for each other after every operator.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def parallel_for(work: Callable[[int], None], count: int, spread: bool) -> None:
    """Call ``work(0)``, ..., ``work(count - 1)`` without recording gradients.

    Args:
        work: Function of the block number. It must write only to memory that no other call uses, so that results do not
            depend on the number of threads.
        count: Number of calls.
        spread: Use as many threads as torch has; otherwise run in the calling thread.
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
    # Static assignment: all blocks take the same time.
    for done in [_pool(threads).submit(share, range(i, count, threads)) for i in range(threads)]:
        done.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)  # threads do not survive a fork
    with _lock:
        if key not in _pools:
            ready = threading.Barrier(threads + 1)

            def start() -> None:
                torch.get_num_threads()  # the first call in a thread resets its number of threads
                torch.set_num_threads(1)
                ready.wait()

            before = torch.get_num_threads()
            pool = ThreadPoolExecutor(threads, 'replk_mm', initializer=start)
            for _ in range(threads):
                pool.submit(int)
            ready.wait()
            torch.set_num_threads(before)  # the pool's initializers changed the default of new threads
            _pools[key] = pool
        return _pools[key]
