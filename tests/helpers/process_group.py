"""A process group in the process of a test."""

from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def single_process_group():
    """This process alone as a process group."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
