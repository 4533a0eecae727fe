"""The process group of a run on CPUs."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch.distributed
from mmengine.config import Config
from rank_cases import free_port

from replk_mm.engine import process
from replk_mm.errors import UserError


def threads() -> set[str]:
    """The threads of this process; torch 2.5 does not name those of a process group."""
    return {path.name for path in Path('/proc/self/task').iterdir()}


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm'])
def test_launcher_names_the_processes(launcher, monkeypatch):
    named, found = dict(pytorch=('RANK', 'WORLD_SIZE'), slurm=('SLURM_PROCID', 'SLURM_NTASKS'))[launcher], {}
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # is restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: found.update(os.environ))
    monkeypatch.setattr(process.atexit, 'register', lambda function: None)
    with pytest.raises(UserError, match=f'--launcher {launcher}: no {named[0]}'):
        process.init_gloo(Config(dict(launcher=launcher)), 'cpu')
    for name, value in zip(named, ('3', '4'), strict=True):
        monkeypatch.setenv(name, value)
    process.init_gloo(Config(dict(launcher=launcher)), 'cpu')
    assert (found['RANK'], found['WORLD_SIZE']) == ('3', '4')  # what torch reads
    assert launcher == 'pytorch' or {'MASTER_ADDR', 'MASTER_PORT'} <= found.keys()


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for threads in /proc')
def test_no_thread_of_the_process_group_is_left_at_exit(monkeypatch):
    """A thread that still holds tensors when Python ends aborts it."""
    before = threads()
    values = dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR='localhost', MASTER_PORT=free_port())
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    registered = []
    monkeypatch.setattr(process.atexit, 'register', registered.append)
    process.init_gloo(Config(dict(launcher='pytorch')), 'cpu')
    cycle = {'group': torch.distributed.distributed_c10d._get_default_group()}  # as a runner does by its model
    cycle['self'] = cycle
    torch.distributed.barrier()
    started = threads() - before
    assert started
    del cycle
    for leave in registered:
        leave()
    end = time.monotonic() + 10  # the system lists a thread for a moment after it was joined
    while started & threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not started & threads()
    assert not torch.distributed.is_initialized()
