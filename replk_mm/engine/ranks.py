"""A run of several processes ends when one of them is dead or hangs, and says which.

Without this the others wait in a collective: half an hour for gloo, then with a traceback that names an address at best.
"""
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner

from replk_mm.engine.heartbeat import Line, Peer
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import Stopped, UserError, message_of

#: Exit status of the processes that were left, once one is dead or hangs.
LOST_STATUS = 76
#: Seconds of silence after which a process is given up, and of standing still, unless the config's ``rank_watch`` says others.
SILENT, HANG = 30., 600.
#: Seconds in which the other processes may end by the same error, each with its own message.
_GRACE = 3.


class RankWatch:
    """Hears the other processes, and ends this one when one of them is lost.

    Building one is for all processes of the run at once.

    Args:
        silent: Seconds without a sign of life after which a process counts as lost. A process of the same machine that does
            not exist any more is found at once.
        hang: Seconds without progress in any process, while some wait for others, after which the run counts as hung.
        remedy: Called for what to do, a line for the message.
        logger: Gets the message too, if there is one.
    """

    def __init__(self, silent: float, hang: float, remedy: Callable[[], str], logger: logging.Logger | None = None) -> None:
        self.silent, self.hang, self.remedy, self.logger = silent, hang, remedy, logger
        self.interval = min(1., silent / 5)
        self.line = Line()
        self.started = time.monotonic()
        self._left = threading.Event()
        self._dead: dict[int, int] = {}  # how often a process was found gone: its farewell may be on the way
        self._unheard: set[int] = set()
        self._decided: float | None = None
        self._thread = threading.Thread(target=self._watch, name='rank-watch', daemon=True)
        self._thread.start()

    def moved(self, iteration: int) -> None:
        """This process has finished a step of iteration ``iteration``."""
        before, own = self.line.own.iteration, self.line.own
        own.iteration, own.moved = iteration, time.monotonic()
        if iteration != before:
            self.line.step()

    def leave(self, failure: str = '') -> None:
        """This process ends, in order or because of ``failure``; nobody needs to miss it."""
        for _ in range(3):  # a datagram may be lost
            self.line.send(end=failure)
        self._left.set()  # now the thread closes the line

    def await_verdict(self, seconds: float) -> None:
        """Wait for the thread to end this process; returns if it finds no reason to."""
        self._thread.join(seconds)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._left.is_set():
            self.line.beat()
            while (said := self.line.receive(last + self.interval)) is not None:
                if 'over' in said:
                    self._exit()
            now = time.monotonic()
            if now > last + 2 * self.interval + 1:  # this process itself was stopped; what was said meanwhile is unread
                for peer in self.line.peers:
                    peer.heard = now if peer.heard is not None else None
            last = now
            lost = self._lost(now)
            if lost and not self._left.is_set():
                self._decided = self._decided or now
                # One speaks for all; the next one does if it does not.
                if self._speaks(now) or now - self._decided > 5 * self.interval + 2:
                    self._say(lost)
                    self.line.send(over=True)
                    self._exit()
        self.line.close()

    def _lost(self, now: float) -> list[str]:
        """Lines that name the processes that are dead or hang, none if all is well."""
        found = []
        for peer in self.line.peers:
            state = peer.state()
            self._dead[peer.rank] = self._dead.get(peer.rank, 0) + 1 if state in 'XZ' else 0
            at = f'last heard of at iteration {peer.iteration}'
            if peer.end is not None:
                if peer.end and now - peer.ended > _GRACE:
                    found.append(f'{peer} failed at iteration {peer.iteration}: {peer.end}')
            elif self._dead[peer.rank] > 1:
                found.append(f'{peer} died, {at}')
            elif peer.heard is None:
                self._warn_of_unheard(peer, now)
            elif now - peer.heard > self.silent:
                how = 'is stopped' if state == 'T' else 'gives no sign of life'
                found.append(f'{peer} {how}, {at}, {now - peer.heard:.0f} s ago')
        return found or self._hung(now)

    def _hung(self, now: float) -> list[str]:
        own = self.line.own
        place, waiting = own.place()
        rows = [(f'rank {self.line.rank} (this process, {os.getpid()})', own.iteration, now - own.moved, place, waiting)]
        rows += [(str(peer), peer.iteration, peer.still + now - peer.heard, peer.place, peer.waiting)
                 for peer in self.line.peers if peer.end is None and peer.heard is not None]
        # A GPU waits for others without a line of Python that says so.
        waits = torch.cuda.is_initialized() or any(row[-1] for row in rows)
        if len(rows) < 2 or not waits or min(row[2] for row in rows) < self.hang:
            return []
        suspects = [row for row in rows if not row[-1]] or rows
        return [f'{name} hangs at iteration {iteration}: no progress for {still:.0f} s, in {place}'
                for name, iteration, still, place, _ in suspects]

    def _warn_of_unheard(self, peer: Peer, now: float) -> None:
        if now - self.started > self.silent and peer.rank not in self._unheard:
            self._unheard.add(peer.rank)
            print(f'warning: {peer} is not watched: its datagrams (UDP) do not arrive', file=sys.stderr, flush=True)

    def _speaks(self, now: float) -> bool:
        lower = [peer for peer in self.line.peers if peer.rank < self.line.rank and peer.end is None]
        return not any(peer.heard is not None and now - peer.heard < 4 * self.interval and not self._dead[peer.rank]
                       for peer in lower)

    def _say(self, lost: list[str]) -> None:
        message = f'{"; ".join(lost)}\nThe processes that are left end with status {LOST_STATUS}. {self.remedy()}'
        os.write(2, f'\nerror: {message}\n'.encode())
        files = [h for h in self.logger.handlers if isinstance(h, logging.FileHandler)] if self.logger else []

        def log() -> None:
            for handler in files:
                handler.emit(logging.LogRecord('rank-watch', logging.ERROR, __file__, 0, message, None, None))

        # The training thread may hold a lock of the log, for ever.
        writer = threading.Thread(target=log, daemon=True)
        writer.start()
        writer.join(2)

    def _exit(self) -> None:
        flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
        flush.start()
        flush.join(1)
        os._exit(LOST_STATUS)  # the training thread may be in a collective, which nothing else ends


class ProgressHook(Hook):
    """Tells the watch of every step: batches come, are trained on, and are predicted."""

    priority = 'LOWEST'

    def __init__(self, watch: RankWatch) -> None:
        self.watch = watch

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        self.watch.moved(runner.iter)

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None,
                    mode: str = 'train') -> None:
        self.watch.moved(runner.iter)


@contextmanager
def watching_ranks(cfg: Config, runner: Runner) -> Iterator[None]:
    """End all processes of a run when one is dead or hangs, with one message that names it and status :data:`LOST_STATUS`.

    The config's ``rank_watch = dict(silent=30, hang=600)`` sets the seconds, see :class:`RankWatch`.

    Raises:
        UserError: If ``rank_watch`` is not that, or the processes have lost each other though all of them are there.
    """
    silent, hang = _seconds(cfg)
    if get_world_size() == 1:
        yield
        return

    def remedy() -> str:
        if 'train_dataloader' not in cfg:
            return 'Start the test again.'
        last = last_checkpoint(cfg.work_dir)
        return f'Start again with --resume, from {last}.' if last else 'Start again; no checkpoint was written yet.'

    watch = RankWatch(silent, hang, remedy, runner.logger)
    runner.register_hook(ProgressHook(watch))
    with _terminated_by_exception():
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            watch.leave()
            raise
        except SystemExit:
            # torchrun ends the others as soon as one is dead: that one is to be named first.
            watch.await_verdict(2 * watch.interval + 1)
            watch.leave()
            raise
        except Exception as error:
            if _lost_contact(error):
                watch.await_verdict(silent + 5)
                watch.leave('lost contact')
                raise UserError(f'the processes have lost each other at iteration {runner.iter}: '
                                f'{str(error).strip().splitlines()[0]}\n{remedy()}') from error
            watch.leave(message_of(error).strip().partition('\n')[0] or type(error).__name__)
            raise
        watch.leave()


def _seconds(cfg: Config) -> tuple[float, float]:
    given = cfg.get('rank_watch') or {}
    found = {'silent': SILENT, 'hang': HANG, **given}
    if set(found) != {'silent', 'hang'} or not all(isinstance(v, (int, float)) and v > 0 for v in found.values()):
        raise UserError(f'rank_watch={dict(given)}: it is dict(silent=SECONDS, hang=SECONDS), of more than 0\n'
                        f'For example --cfg-options rank_watch.silent={SILENT:.0f} rank_watch.hang={HANG:.0f}.')
    return found['silent'], found['hang']


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because of another process."""
    text = str(error)
    return is_distributed() and (isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and (
        'gloo' in text or 'by peer' in text or 'NCCL' in text)))


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM raise ``SystemExit`` where it would end the process at once."""
    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = None
    with suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
