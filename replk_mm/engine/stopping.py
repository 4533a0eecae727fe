"""Stopping on a signal: the current iteration is finished and the state saved; the exit status says to try again."""

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

#: Ctrl-C; what Slurm, Kubernetes and spot machines send before they kill; what Slurm sends earlier if told to
#: (``--signal``); what a closing terminal sends.
SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP') if hasattr(signal, name))
_received: list[int] = []


class StopRequested(Exception):
    """A signal has asked to stop, in the middle of something that is done again later.

    Attributes:
        signal: Which.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def catch_signals() -> Iterator[None]:
    """Remember the first of :data:`SIGNALS` instead of dying of it; the second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread listen
        yield
        return
    # What is ignored stays so: nohup's SIGHUP, Ctrl-C of jobs in the background.
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
        # Ctrl-C also ends the program that the output is piped to; a handler must not call `print`.
        with contextlib.suppress(OSError):
            os.write(2, text.encode())


def requested_signal() -> signal.Signals | None:
    """The signal by which any process of the run was asked to stop; the same answer in all of them.

    Call it at the same point in every process: they wait for one another.
    """
    number = _received[0] if _received else 0
    if is_distributed():
        flag = torch.tensor(number, device=get_device())
        all_reduce(flag, 'max')
        number = int(flag)
    return signal.Signals(number) if number else None


def ignore_signals_in_workers(loader: DataLoader) -> DataLoader:
    """Let a loader's workers ignore :data:`SIGNALS`, which terminals and Slurm send to every process of a job.

    The training process still needs the workers until it has finished its iteration.
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
    # After an exception workers may still run. Python then sends them SIGTERM and waits, which would be for ever.
    def kill() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    atexit.register(kill)
