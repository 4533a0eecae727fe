"""Stopping when asked to: the iteration under way is finished, the state saved, and the exit status says what to do next."""
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, is_distributed

#: Ctrl-C; what Slurm, Kubernetes and spot machines send before they kill; what Slurm sends earlier if told to (``--signal``).
SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1') if hasattr(signal, name))
_asked: list[int] = []


class Asked(Exception):
    """A signal has asked to stop, in the middle of something that is done again later.

    Attributes:
        signal: Which.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def listening() -> Iterator[None]:
    """Remember the first of :data:`SIGNALS` instead of dying of it; the second Ctrl-C interrupts at once."""
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread listen
        yield
        return
    before = {number: signal.signal(number, _remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remember(number: int, _frame: object) -> None:
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    if not _asked:
        print(f'\n{signal.Signals(number).name}: finishing this iteration, then saving'
              + (' (again: stop at once)' if number == signal.SIGINT else ''), file=sys.stderr, flush=True)
    _asked.append(number)


def asked() -> signal.Signals | None:
    """The signal by which any process of the run was asked to stop; the same answer in all of them.

    Call it at the same point in every process: they wait for one another.
    """
    number = _asked[0] if _asked else 0
    if is_distributed():
        flag = torch.tensor(number, device=get_device())
        all_reduce(flag, 'max')
        number = int(flag)
    return signal.Signals(number) if number else None
