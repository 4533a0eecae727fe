"""Stop on a signal: finish the current iteration, save the state, and exit with a status that means "try again"."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, is_distributed
from torch.utils.data import DataLoader

#: Sent by Ctrl-C; by Slurm, Kubernetes and spot machines before a kill; by Slurm's ``--signal``; by a closing terminal.
SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP') if hasattr(signal, name))
_received: list[int] = []


class StopRequested(Exception):
    """A signal requested a stop during work that will be repeated.

    Attributes:
        signal: The signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def catch_signals() -> Iterator[None]:
    """Record the first of :data:`SIGNALS` instead of exiting. A second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    # Keep ignoring ignored signals: SIGHUP under nohup, Ctrl-C of background jobs.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _remember) for number in heard}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _remember(number: int, _frame: object) -> None:
    if _received and number == signal.SIGINT:
        raise KeyboardInterrupt
    _received.append(number)
    if len(_received) == 1:
        text = f'\n{signal.Signals(number).name}: finishing this iteration, then saving' + (
            ' (again: stop at once)\n' if number == signal.SIGINT else '\n'
        )
        # Ctrl-C also ends the program at the other end of a pipe; a handler must not call `print`.
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def requested_signal() -> signal.Signals | None:
    """The signal that requested a stop in any process of the run, or None. All processes get the same answer.

    A collective: call it at the same point in every process.
    """
    number = _received[0] if _received else 0
    if is_distributed():
        flag = torch.tensor(number, device=get_device())
        all_reduce(flag, 'max')
        number = int(flag)
    return signal.Signals(number) if number else None


def ignore_signals_in_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader ignore :data:`SIGNALS`, which terminals and Slurm send to all processes of a job.

    The training process needs them until its iteration ends.
    """
    _kill_workers_at_exit()
    loader.worker_init_fn = functools.partial(_ignore_signals, loader.worker_init_fn)
    return loader


def _ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


@functools.cache
def _kill_workers_at_exit() -> None:
    # Workers may still run after an exception. Python would send them SIGTERM, which they ignore, and wait forever.
    def kill() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    atexit.register(kill)
