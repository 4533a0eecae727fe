"""Signals to a whole job, as terminals and Slurm send them: data workers outlive them, the state is saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, tiny, tool_environment  # noqa: F401

from replk_mm.errors import INTERRUPTED_STATUS

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_ctrl_c_to_all_processes_saves_the_state(tiny, tmp_path):
    arguments = [tiny.config, '--data-root', tiny.data, '--work-dir', tmp_path, '--device', 'cpu', '--no-preflight']
    arguments += ['--cfg-options', 'default_hooks.checkpoint.interval=5', 'train_cfg.val_interval=2000']
    process = subprocess.Popen(
        [sys.executable, ROOT / 'tools/train.py', *map(str, arguments), 'train_dataloader.num_workers=2'],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=tool_environment(),
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not (tmp_path / 'last_checkpoint').exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    workers = [int(path.name) for path in Path('/proc').glob('[0-9]*') if parent(path) == process.pid]
    assert workers
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED_STATUS, error
    assert f'stopped by SIGINT; --resume continues from {(tmp_path / "last_checkpoint").read_text()}' in error
    assert 'Traceback' not in error and all(gone(worker) for worker in workers)


def parent(process: Path) -> int:
    try:
        return int((process / 'stat').read_text().rpartition(')')[2].split()[1])
    except OSError:
        return -1


def gone(process: int) -> bool:
    """Whether a process has ended, though nobody has asked how."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True
