"""Processes that load data: they end with the process that they load for, and with it only."""
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable

from torch.utils.data import DataLoader

from replk_mm.engine.stopping import outlive_signals


def tie(loader: DataLoader) -> DataLoader:
    """Let a loader's workers end with this process, in whatever way it ends, and not by signals to all of the job."""
    loader.worker_init_fn = functools.partial(_start, os.getpid(), loader.worker_init_fn)
    return loader


def _start(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    # A worker with samples of some size in hand waits until they are taken: for ever, with its memory and its locks, if the
    # process that would take them was killed. Linux can end it then.
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before this was said
            os._exit(1)
    outlive_signals()
    if then is not None:
        then(worker)
