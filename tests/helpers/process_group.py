"""A process group in the process of a test."""

from contextlib import contextmanager

import pytest
import torch.distributed as dist

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:

    def fully_shard(module):
        pytest.skip('fully_shard of torch 2.5 does not run on CPUs')


__all__ = ['fully_shard', 'single_process_group']


@contextmanager
def single_process_group():
    """This process alone as a process group."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
