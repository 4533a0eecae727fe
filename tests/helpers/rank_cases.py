"""Processes of one run for tests: forked from a small new Python, which has imported once for all of them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def together(processes: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)`` returns in every process of a gloo group, as JSON has it."""
    folder.mkdir(parents=True)
    mp.start_processes(_run, (processes, free_port(), work, folder), processes, start_method='fork')
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(processes)]


def _run(rank: int, processes: int, port: int, work: Callable[[int], Any], folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    if processes > 1:
        dist.init_process_group('gloo')
    (folder / f'{rank}.json').write_text(json.dumps(work(rank)))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def in_new_python(script: str, folder: Path, seconds: float = 120) -> Any:
    """Run ``script``, which finds ``folder`` in its arguments, in a new Python; its last line is JSON."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, str(Path(__file__).parent)])
    environment = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script, str(folder)],
        env=environment,
        timeout=seconds,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
