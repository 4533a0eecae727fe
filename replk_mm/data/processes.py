"""Look at many files in several processes: a file that kills one of them is named, and none outlives its parent."""
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar

_Task = TypeVar('_Task')
_Result = TypeVar('_Result')
#: Tasks that a process is given at a time: enough that it does not wait, and few enough that all end together.
_CHUNK = 8


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


class _Worker(Generic[_Task]):
    """A process and what it has been given."""

    def __init__(self, work: Callable, others: Sequence['_Worker']) -> None:
        context = multiprocessing.get_context('fork')
        self.pipe, theirs = context.Pipe()
        # Whoever holds the parent's end of a pipe keeps the process at the other end waiting when the parent has gone.
        inherited = [self.pipe, *(other.pipe for other in others)]
        self.process: ForkProcess = context.Process(target=_serve, args=(work, theirs, inherited), daemon=True)
        # A Ctrl-C before the process has said that it ignores it would end it with a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        theirs.close()
        self.given: deque[tuple[int, _Task]] = deque()

    def give(self, waiting: deque[tuple[int, _Task]]) -> None:
        while waiting and len(self.given) < _CHUNK:
            self.given.append(waiting.popleft())
        if self.given:
            self.pipe.send([task for _, task in self.given])

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(work: Callable, pipe: Connection, inherited: Sequence[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells all of them; the parent ends them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    try:
        while True:
            for task in pipe.recv():
                pipe.send(work(task))
    except (EOFError, OSError):  # the parent has gone
        os._exit(0)


def each(work: Callable[[_Task], _Result], tasks: Sequence[_Task], jobs: int,
         crashed: Callable[[_Task, int], _Result]) -> Iterator[tuple[int, _Result]]:
    """Do ``work`` for every task, in ``jobs`` processes, or in this one if the system cannot fork.

    One process is another one, too: a file that kills it is named, and the others are looked at.

    Args:
        work: Anything; it and what it refers to is inherited by the processes, tasks and results are sent.
        tasks: What it is called with.
        jobs: Number of processes.
        crashed: What the result is of a task in which the process died, by task and exit status.

    Yields:
        Index and result of each task, as they come.
    """
    jobs = min(max(1, jobs), len(tasks))
    if 'fork' not in multiprocessing.get_all_start_methods():
        for i, task in enumerate(tasks):
            yield i, work(task)
        return
    waiting = deque(enumerate(tasks))
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.given for worker in workers):
            while waiting and len(workers) < jobs:
                workers.append(_Worker(work, workers))
                workers[-1].give(waiting)
            by_pipe = {worker.pipe: worker for worker in workers if worker.given}
            for ready in wait(list(by_pipe)):
                worker = by_pipe[ready]  # type: ignore[index]
                try:
                    result = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.end()
                    workers.remove(worker)
                    i, task = worker.given.popleft()
                    waiting.extendleft(reversed(worker.given))
                    yield i, crashed(task, worker.process.exitcode or 0)
                    continue
                yield worker.given.popleft()[0], result
                if not worker.given:
                    worker.give(waiting)
    finally:
        for worker in workers:
            worker.end()
