"""Processes that load data: they end with the process that they load for, and with it only."""
import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from replk_mm.engine.stopping import SIGNALS


def tie(loader: DataLoader) -> DataLoader:
    """Let a loader's workers end with this process, in whatever way it ends, and not by signals to all of the job.

    Those are for this process, which goes on for a while: it finishes an iteration and saves.
    """
    method = (loader.multiprocessing_context or multiprocessing).get_start_method()
    parent = os.getpid() if method == 'fork' else None
    loader.worker_init_fn = functools.partial(_start, parent, _ending(), loader.worker_init_fn)
    return loader


@functools.cache
def _ending() -> Any:
    """A byte that workers see: whether this process is ending, and the signals that come are its own."""
    byte = multiprocessing.Value('b', 0, lock=False)
    # Functions run in the reverse order of their registration: this one before Python's own, which sends SIGTERM and waits.
    atexit.register(functools.partial(setattr, byte, 'value', 1))
    return byte


def _start(parent: int | None, ending: Any, then: Callable[[int], None] | None, worker: int) -> None:
    # A worker with samples of some size in hand waits until they are taken: for ever, with its memory and its locks, if the
    # process that would take them was killed. A pipe tells when it ends; forked workers have the other end too, each of the
    # one before it, but there Linux tells.
    if parent is None:
        threading.Thread(target=_follow, daemon=True).start()
    elif sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before this was said
            os._exit(1)

    def end(_number: int, _frame: object) -> None:
        if ending.value:
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, end if number == signal.SIGTERM else signal.SIG_IGN)
    if then is not None:
        then(worker)


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
