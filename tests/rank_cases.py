"""Processes of one run for tests: forked from a small new Python, which has imported once for all of them."""
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Group:
    """A run's processes."""

    folder: Path
    pids: list[int]

    def wait(self, seconds: float, but: int | None = None) -> list[int | None]:
        """Exit statuses (negative: the signal; None: still there after ``seconds``) of all ranks, ``but`` of one."""
        end, found = time.monotonic() + seconds, dict.fromkeys(self.pids)
        waits = [pid for rank, pid in enumerate(self.pids) if rank != but]
        while None in [found[pid] for pid in waits] and time.monotonic() < end:
            for pid in [pid for pid, status in found.items() if status is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                found[pid] = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(.02)
        return list(found.values())

    def printed(self, rank: int) -> str:
        """What a process has printed and said."""
        return (self.folder / f'{rank}.txt').read_text()

    def lines(self, rank: int, count: int, seconds: float = 60) -> None:
        """Wait until a process has printed so many lines."""
        end = time.monotonic() + seconds
        while self.printed(rank).count('\n') < count:
            assert time.monotonic() < end, self.printed(rank)
            time.sleep(.02)


def start(processes: int, work: Callable[[int], Any], folder: Path) -> Group:
    """Fork ``processes`` that are joined by gloo and run ``work(rank)``; an exception is printed, with status 1."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    pids = []
    sys.stdout.flush()
    for rank in range(processes):
        (folder / f'{rank}.txt').touch()
        pid = os.fork()
        if pid == 0:
            file = os.open(folder / f'{rank}.txt', os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os._exit(_run(rank, processes, port, work))
        pids.append(pid)
    return Group(folder, pids)


def _run(rank: int, processes: int, port: int, work: Callable[[int], Any]) -> int:
    import torch.distributed as dist
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    try:
        if processes > 1:
            dist.init_process_group('gloo')
        work(rank)
        if processes > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            return error.code
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def together(processes: int, work: Callable[[int], Any], folder: Path, seconds: float = 60) -> list[Any]:
    """What ``work(rank)`` returns in every process, as JSON has it."""
    def keep(rank: int) -> None:
        (folder / f'{rank}.json').write_text(json.dumps(work(rank)))

    group = start(processes, keep, folder)
    statuses = group.wait(seconds)
    if statuses != [0] * processes:
        raise AssertionError(f'{statuses}\n' + '\n'.join(group.printed(rank) for rank in range(processes)))
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(processes)]


def in_new_python(script: str, folder: Path, seconds: float = 120) -> Any:
    """Run ``script``, which finds ``folder`` in its arguments, in a new Python; its last line is JSON."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, str(Path(__file__).parent)]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(folder)], env=environment, timeout=seconds,
                          text=True, capture_output=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
