"""A dead or hung process ends the whole run, which names it."""
import re

import pytest
from rank_cases import in_new_python

from replk_mm.engine.ranks import LOST_STATUS, watching_ranks
from replk_mm.errors import UserError

SILENT = 4.
SCRIPT = f"""
import json, logging, os, pathlib, signal, sys, threading, time
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.hooks import Hook
from replk_mm.engine.ranks import watching_ranks
from replk_mm.errors import Stopped
from rank_cases import start

folder = pathlib.Path(sys.argv[1])


class Runner:
    '''As much of one as the watch needs.'''
    iter = 0
    logger = logging.getLogger('run')
    def register_hook(self, hook):
        self.hook = hook


def train(at_five=lambda rank: None, **watch):
    '''Ten thousand iterations that wait for each other; the fifth is the fault's.'''
    def work(rank):
        runner = Runner()
        cfg = Config(dict(train_dataloader={{}}, work_dir=str(folder), rank_watch={{**dict(silent={SILENT}), **watch}}))
        with watching_ranks(cfg, runner):
            while runner.iter < 10_000:
                runner.hook.before_train_iter(runner, runner.iter)
                if runner.iter == 5:
                    at_five(rank)
                dist.all_reduce(torch.ones(1))
                runner.hook.after_train_iter(runner, runner.iter)
                runner.iter += 1
                print(runner.iter, flush=True)
                time.sleep(.02)
    return work


def of(rank, act):
    return lambda r: act() if r == rank else None


def fail():
    raise ValueError('file 7 is damaged')


def finish(rank):
    '''All leave in order, the first one later, and nobody misses the others.'''
    runner = Runner()
    with watching_ranks(Config(dict(rank_watch=dict(silent=1.5))), runner):
        dist.barrier()
    time.sleep(3 if rank == 0 else 0)
    print('in order', flush=True)


def stop_in_order(rank):
    runner = Runner()
    with watching_ranks(Config(dict(rank_watch=dict(silent=1.5))), runner):
        dist.barrier()
        time.sleep(3 if rank == 0 else 0)  # the first one saves
        if rank:
            raise Stopped(signal.SIGTERM, 'iter_5.pth')
    print('saved', flush=True)


kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)
pause = lambda: (os.system(f'(sleep 2; kill -CONT {{os.getpid()}}) &'), stop())
groups = dict(
    kill1=start(3, train(of(1, kill)), folder / 'kill1'),
    kill0=start(3, train(of(0, kill)), folder / 'kill0'),
    kill01=start(3, train(lambda rank: kill() if rank < 2 else None), folder / 'kill01'),
    stop1=start(3, train(of(1, stop)), folder / 'stop1'),
    stop0=start(2, train(of(0, stop)), folder / 'stop0'),
    hang1=start(3, train(of(1, threading.Event().wait), hang=3), folder / 'hang1'),
    fail1=start(2, train(of(1, fail)), folder / 'fail1'),
    finish=start(2, finish, folder / 'finish'),
    stopped=start(2, stop_in_order, folder / 'stopped'),
)
# A process that stands still for less than it may, and goes on.
paused = start(2, train(of(1, pause), hang=60), folder / 'pause1')
found = {{}}
for name, group in groups.items():
    statuses = group.wait(40, dict(stop1=1, stop0=0).get(name))
    for pid, status in zip(group.pids, statuses):
        if status is None:
            os.kill(pid, signal.SIGKILL)
    found[name] = dict(statuses=statuses, pids=group.pids, printed=[group.printed(r) for r in range(len(group.pids))])
paused.lines(0, 40)
found['pause1'] = dict(printed=[paused.printed(r) for r in range(2)])
for pid in paused.pids:
    os.kill(pid, signal.SIGKILL)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> dict:
    return in_new_python(SCRIPT, tmp_path_factory.mktemp('ranks') / 'runs')


def without_names(message: str) -> str:
    return re.sub(r'process \d+ on [^)\s]+\)', 'process 4242 on node1)', message)


def ended(run: dict, lost: dict[int, int | None], speaker: int) -> str:
    """The message, if the processes that were left have ended as they should and one of them has spoken."""
    assert run['statuses'] == [lost.get(rank, LOST_STATUS) for rank in range(len(run['statuses']))], run
    assert not any('Traceback' in text for rank, text in enumerate(run['printed']) if rank not in lost), run
    said = [re.findall(r'error: (rank.*(?:\n.+)*)', text) for text in run['printed']]
    assert [len(one) for one in said] == [rank == speaker for rank in range(len(said))], run
    message = said[speaker][0]
    for rank in lost:
        assert f'rank {rank} (process {run["pids"][rank]} on ' in message
    assert f'status {LOST_STATUS}' in message and 'Start again' in message
    assert 'at iteration 5' in message or speaker == 2, 'the first two ranks hear of every iteration'
    return message


@pytest.mark.parametrize(('name', 'lost', 'speaker', 'what'), [
    ('kill1', {1: -9}, 0, 'rank 1 of three is killed'), ('kill0', {0: -9}, 1, 'rank 0 of three is killed'),
    ('kill01', {0: -9, 1: -9}, 2, 'two ranks of three are killed at once')])
def test_a_killed_rank_is_named(runs, name, lost, speaker, what):
    message = ended(runs[name], lost, speaker)
    assert message.count(' died, last heard of at iteration ') == len(lost)


@pytest.mark.parametrize(('name', 'lost', 'speaker'), [('stop1', 1, 0), ('stop0', 0, 1)])
def test_a_stopped_rank_is_named(runs, name, lost, speaker):
    message = ended(runs[name], {lost: None}, speaker)
    assert re.search(r'is stopped, last heard of at iteration 5, [45] s ago', message), message


def test_a_rank_that_stands_still_is_named_with_the_line_that_it_stands_in(runs):
    run = runs['hang1']
    # It lives, so that it ends as the others do.
    assert run['statuses'] == [LOST_STATUS] * 3, run
    message = ''.join(run['printed'])
    assert message.count('error: ') == 1, run
    assert re.search(r'rank 1 \(.*\) hangs at iteration 5: no progress for [345] s, in .*threading.py:\d+ wait', message), run
    assert 'rank 0' not in message and 'rank 2' not in message


def test_a_rank_that_fails_of_itself_is_named_by_the_others(runs):
    run = runs['fail1']
    assert run['statuses'] == [LOST_STATUS, 1]
    assert 'ValueError: file 7 is damaged' in run['printed'][1], 'it says itself what happened'
    message = run['printed'][0][run['printed'][0].index('error: '):]
    assert 'failed at iteration 5: file 7 is damaged' in message and 'Traceback' not in run['printed'][0]


def test_ranks_that_leave_in_order_are_not_missed(runs):
    assert runs['finish']['statuses'] == [0, 0], runs['finish']
    assert [text.count('in order') for text in runs['finish']['printed']] == [1, 1]
    # One that was asked to stop leaves another the time to save.
    assert 'saved' in runs['stopped']['printed'][0] and 'error: ' not in runs['stopped']['printed'][0]


def test_a_short_pause_of_a_rank_is_no_end(runs):
    assert all('error' not in text and '40' in text for text in runs['pause1']['printed']), runs['pause1']


@pytest.mark.parametrize('given', [dict(silent=0), dict(silent='long'), dict(quiet=3)])
def test_seconds_that_are_none_are_refused(given):
    with pytest.raises(UserError, match='rank_watch=.*SECONDS') as info, watching_ranks(dict(rank_watch=given), None):
        pass
    if 'quiet' in given:
        pass
