"""A training that is interrupted at random moments and resumed loses nothing."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from resume_cases import differences
from tiny import ROOT, tiny, tool_environment  # noqa: F401

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.errors import STOPPED_STATUS

INTERRUPTIONS = 6


def train(tiny, work: Path, number: signal.Signals | None = None, delay: float = 0.0) -> int:  # noqa: F811
    """Exit status of a training that resumes, and gets a signal after ``delay`` seconds."""
    options = ['--max-iters', 24, '--resume', '--cfg-options', 'default_hooks.checkpoint.interval=4']
    command = [sys.executable, ROOT / 'tools/train.py', tiny.config, '--data-root', tiny.data, '--work-dir', work]
    command += ['--device', 'cpu', '--seed', 0, *options]
    with subprocess.Popen([*map(str, command)], env=tool_environment(), stdout=subprocess.DEVNULL) as process:
        try:
            return process.wait(delay if number else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(number or signal.SIGKILL)
            return process.wait(60)


def iteration(work: Path) -> int:
    """How far the newest checkpoint is; all of them must be whole."""
    return max((read_checkpoint(path)['meta']['iter'] for path in work.glob('iter_*.pth')), default=0)


@pytest.mark.slow
def test_interrupted_training_ends_with_the_same_bits(tiny, tmp_path):  # noqa: F811
    assert train(tiny, tmp_path / 'straight') == 0
    draw, work = random.Random(0), tmp_path / 'stopped'
    done = [0]
    status = 1
    for _ in range(INTERRUPTIONS):
        number = draw.choice([signal.SIGTERM, signal.SIGKILL])
        status = train(tiny, work, number, draw.uniform(3, 12))
        # A signal before training listens to it ends the process as it ends any other.
        assert status in (0, -number, STOPPED_STATUS)
        done.append(iteration(work))
        assert done[-1] >= done[-2], 'a checkpoint was lost'
    assert train(tiny, work) == 0
    assert differences(tmp_path / 'straight/iter_24.pth', work / 'iter_24.pth') == []
