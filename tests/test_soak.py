"""The soak finds nothing lost, and would find what is."""
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from tiny import run_tool

from replk_mm.bench.soak import Soaker, _option, _same


@pytest.mark.slow
def test_two_minutes_of_soak_lose_nothing(tmp_path):
    found = run_tool('soak', '--minutes', 2, '--work-dir', tmp_path, timeout=900)
    assert found.returncode == 0, found.stdout + found.stderr
    *_, counts, verdict = found.stdout.strip().splitlines()
    assert verdict == 'nothing was lost'
    done = {what: int(count) for count, what in re.findall(r'(\d+) x ([^,]+)', counts)}
    assert done['compared'] >= 1
    assert sum(done.get(name, 0) for name in ('SIGKILL', 'SIGTERM', 'SIGINT')) >= 1


class Scripted(Soaker):
    """A soak of trainings that only pretend: each step writes what it is told."""

    def __init__(self, folder: Path, steps: list[tuple[int, int, float]]) -> None:
        super().__init__(['config.py'], folder, 0, lambda line: None)
        self.steps = iter(steps)

    def _train(self, work, number=None, delay=0.):
        work.mkdir(parents=True, exist_ok=True)
        status, iteration, weight = (0, 4, 1.) if work == self.straight else next(self.steps)
        if iteration < 0:
            (work / f'iter_{-iteration}.pth').unlink()
        else:
            torch.save(dict(meta=dict(iter=iteration), state_dict={'w': torch.tensor([weight])}, optimizer={},
                            param_schedulers=[]), work / f'iter_{iteration}.pth')
        return -number if status == -1 and number is not None else status

    def _harm(self, reached):
        return reached

    def _test(self, work):
        return json.loads('{"mIoU": 1.0}')


@pytest.mark.parametrize(('steps', 'lost'), [
    ([(-1, 2, 1.), (0, 4, 1.)], None),
    ([(0, 4, 2.)], 'state_dict differs'),
    ([(1, 2, 1.)], 'ended with status 1'),
    ([(-1, 3, 1.), (-1, -3, 1.)], 'there was a checkpoint of iteration 3'),
])
def test_what_is_lost_is_found(steps, lost, tmp_path):
    soaker = Scripted(tmp_path, steps)
    soaker.straight.mkdir()
    soaker._train(soaker.straight)
    soaker.reference, soaker.score = soaker.straight / 'iter_4.pth', soaker._test(soaker.straight)
    soaker._one_training(0., float('inf'))
    assert ([*soaker.done.losses, ''][0] == '') if lost is None else lost in soaker.done.losses[0]


def test_a_test_that_fails_after_interruptions_is_found(tmp_path):
    class Failing(Scripted):
        _test = Soaker._test

    soaker = Failing(tmp_path, [(0, 4, 1.)])  # its config does not exist
    soaker.straight.mkdir()
    soaker._train(soaker.straight)
    soaker.reference, soaker.score = soaker.straight / 'iter_4.pth', {}
    soaker._one_training(0., float('inf'))
    assert re.match(r'the test of .*interrupted ends with status [1-9]', soaker.done.losses[0])


def test_one_training_at_least_is_interrupted_and_compared(tmp_path):
    soaker = Scripted(tmp_path, [(-1, 2, 1.), (0, 4, 1.)])
    soaker.work.mkdir()
    done = soaker.run(0)
    assert done.counts['compared'] == 1 and done.counts.total() == 3 and not done.losses


def test_checkpoints_that_cannot_be_read_are_found(tmp_path):
    soaker = Scripted(tmp_path, [])
    soaker.work.mkdir()
    torch.save(dict(meta=dict(iter=6)), soaker.work / 'iter_6.pth')
    assert soaker._iteration() == 6
    (soaker.work / 'iter_8.pth').write_bytes(b'PK')
    assert soaker._iteration() == 6
    assert 'iter_8.pth: cannot be read, and was not harmed' in soaker.done.losses[0]


def test_the_signals_and_what_they_must_end_with():
    from replk_mm.bench.soak import _STATUS
    assert _STATUS == {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}
    assert _option(['--a', '1', '2', '--b', '3'], '--a') == ['--a', '1', '2']
    assert _option(['--a'], '--b') == []
    assert _same({'x': [torch.ones(2), float('nan')]}, {'x': [torch.ones(2), float('nan')]})
    assert not _same({'x': torch.ones(2)}, {'x': torch.ones(2) + 1e-7})
