"""Processes that load data end with the one that they load for."""
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tool_environment

# Samples larger than a pipe holds: a worker waits until one is taken.
CODE = """
import multiprocessing, os, signal, sys
import numpy as np
from torch.utils.data import Dataset
from replk_mm.engine.runner import Runner

class Large(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return np.full(2**20, os.getpid())

if __name__ == '__main__':
    multiprocessing.set_start_method(sys.argv[1])
    loader = Runner.build_dataloader(dict(
        dataset=Large(), sampler=dict(type='DefaultSampler', shuffle=False), batch_size=1, num_workers=2,
        collate_fn=dict(type='pseudo_collate')), seed=0)
    batches = iter(loader)
    print(*sorted({int(next(batches)[0][0]) for _ in range(4)}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the Linux kernel')
@pytest.mark.parametrize('start', ['fork', 'forkserver', 'spawn'])
def test_workers_end_when_their_process_is_killed(start, tmp_path):
    (tmp_path / 'program.py').write_text(CODE)
    ran = subprocess.run([sys.executable, str(tmp_path / 'program.py'), start], stdout=subprocess.PIPE, text=True, check=False,
                         timeout=120, env=tool_environment())
    workers = [int(word) for word in ran.stdout.split()]
    assert len(workers) == 2
    end = time.monotonic() + 20
    while (left := [worker for worker in workers if not gone(worker)]) and time.monotonic() < end:
        time.sleep(.1)
    assert not left


def gone(process: int) -> bool:
    """Whether a process has ended, though nobody has asked how."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True
