"""Running a suite: rows that crash, hang, die and are killed, with the suite itself, at any moment."""
import collections
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import suite_fake

from replk_mm.bench.suites import plan, progress
from replk_mm.bench.suites import run as runner
from replk_mm.bench.suites.definition import read_suite
from replk_mm.bench.suites.row import BusyError, alone
from replk_mm.bench.suites.run import Settings

MEASURES = ('train', 'complexity', 'metric', 'speed')
FAKE = 'suite_fake'


@pytest.fixture(autouse=True)
def _fake_rows(monkeypatch):
    """Rows' processes find the module that pretends."""
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')])))
    monkeypatch.setenv('OMP_NUM_THREADS', '2')


def write_suite(folder: Path, rows: dict[str, dict], seeds=(0,)) -> Path:
    """A suite of rows that pretend as told: ``{name: {measurement: how}}``."""
    (folder / 'config.py').write_text('model = dict()\ntest_dataloader = dict()\n')
    path = folder / 'suite.yaml'
    path.write_text(json.dumps(dict(
        name='pretended', defaults=dict(config='config.py', iterations=12, seeds=list(seeds),
                                        measure=[m for m in MEASURES if m != 'train']),
        rows=[dict(name=name, options=dict(fake=fake)) for name, fake in rows.items()])))
    return path


def run(suite: Path, work_dir: Path, resume: bool = False, **settings):
    tasks, failed = plan.tasks_left(read_suite(suite), plan.Choice(work_dir, resume))
    assert not failed
    out = io.StringIO()
    result = runner.run(tasks, Settings(module=FAKE, **settings), suite_fake.environment, out)
    return [(task.name, reason) for task, reason in result], out.getvalue()


def lines(work_dir: Path) -> list[dict]:
    """All records that there are, read by hand."""
    return [json.loads(line) for path in sorted((work_dir / 'results').glob('*')) for line in path.read_text().splitlines()
            if line]


def counts(work_dir: Path, status: str) -> dict[tuple, int]:
    return collections.Counter((r['row'], r['seed'], r['measurement']) for r in lines(work_dir) if r['status'] == status)


def test_rows_fail_each_in_its_way_and_the_rest_goes_on(tmp_path):
    suite = write_suite(tmp_path, {
        'good': {}, 'refused': {'metric': 'user error'}, 'crashes': {'train': 'crash'}, 'exits': {'complexity': 'exit'},
        'killed': {'metric': 'kill'}, 'no-number': {'metric': 'nan'}, 'last': {}})
    failed, said = run(suite, tmp_path / 'w')
    reasons = {name: reason.splitlines() for name, reason in failed}
    assert list(reasons) == [f'{row} seed 0' for row in ('refused', 'crashes', 'exits', 'killed', 'no-number')]
    assert reasons['refused seed 0'] == ['metric: it cannot be', 'Do something else.']
    assert reasons['crashes seed 0'] == ['train: ZeroDivisionError: division by nothing']
    assert reasons['exits seed 0'][0] == 'complexity: ended with status 7' and reasons['exits seed 0'][-1] == 'the last words'
    assert reasons['killed seed 0'][0] == 'metric: ended by signal 9, SIGKILL (killed: out of memory?)'
    assert reasons['killed seed 0'][-1] == 'a line before the end'
    assert 'values.metrics.mIoU is not a finite number' in reasons['no-number seed 0'][0]
    done = {row: {m for r, _, m in counts(tmp_path / 'w', 'done') if r == row} for row in (
        'good', 'refused', 'crashes', 'exits', 'killed', 'no-number', 'last')}
    everything, rest = set(MEASURES), {'train', 'complexity', 'speed'}
    assert done == dict(good=everything, refused=rest, crashes=set(), exits={'train'}, killed={'train', 'complexity'},
                        last=everything, **{'no-number': rest})
    assert counts(tmp_path / 'w', 'failed') == {
        ('refused', 0, 'metric'): 1, ('crashes', 0, 'train'): 1, ('exits', 0, 'complexity'): 1, ('killed', 0, 'metric'): 1,
        ('no-number', 0, 'metric'): 1}
    assert '[1/7] good seed 0: mIoU 2.50' in said and '[5/7] killed seed 0: FAILED: metric: ended by signal 9' in said


def test_what_failed_is_tried_again_and_what_is_done_is_not(tmp_path):
    suite = write_suite(tmp_path, {'a': {'metric': 'kill once'}, 'b': {'train': 'crash once'}, 'c': {}})
    failed, _ = run(suite, tmp_path / 'w', jobs=3)
    assert sorted(name for name, _ in failed) == ['a seed 0', 'b seed 0']
    assert not run(suite, tmp_path / 'w', resume=True, jobs=3)[0]
    before = lines(tmp_path / 'w')
    assert run(suite, tmp_path / 'w', resume=True) == ([], '')  # nothing is left
    assert lines(tmp_path / 'w') == before
    assert counts(tmp_path / 'w', 'done') == {(row, 0, m): 1 for row in 'abc' for m in MEASURES}
    states = [state for _, _, _, state in plan.states(read_suite(suite), tmp_path / 'w')]
    assert states == ['done'] * 3


def _suite_process(suite: Path, work_dir: Path, jobs: int) -> None:
    os.setsid()
    run(suite, work_dir, True, jobs=jobs)


@pytest.mark.parametrize('jobs', [pytest.param(1, marks=pytest.mark.slow), 3])
def test_killed_at_random_moments_nothing_is_lost_and_nothing_done_twice(tmp_path, jobs):
    suite, work_dir = write_suite(tmp_path, {'a': {'seconds': 0.1}, 'b': {'seconds': 0.05}}, seeds=(0, 1, 2)), tmp_path / 'w'
    context, rng = multiprocessing.get_context('fork'), random.Random(jobs)
    wanted = {(row, seed, m): 1 for row in 'ab' for seed in (0, 1, 2) for m in MEASURES}
    kept: list[dict] = []
    for _ in range(4):
        process = context.Process(target=_suite_process, args=(suite, work_dir, jobs))
        process.start()
        time.sleep(rng.uniform(0.5, 2.5))
        stages = [json.loads(path.read_text()) for path in work_dir.glob('runs/*/*/stage.json')]
        for stage in rng.sample(stages, min(1, len(stages))):  # a row's process, if it still runs
            if _is_row(stage['pid']):
                os.kill(stage['pid'], signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done = [one for one in lines(work_dir) if one['status'] == 'done'] if work_dir.exists() else []
        assert [one for one in done if one in kept] == kept  # no finished one is lost
        kept = done
    while counts(work_dir, 'done') != wanted:
        assert max(counts(work_dir, 'done').values(), default=1) == 1
        failed, said = run(suite, work_dir, True, jobs=jobs)
        assert not failed, failed
    assert all(one['reason'].startswith('ended by signal 9') for one in lines(work_dir) if one['status'] == 'failed')


def _is_row(pid: int) -> bool:
    try:
        return FAKE in Path(f'/proc/{pid}/cmdline').read_text()
    except OSError:
        return False


def _processes_at(folder: Path) -> list[int]:
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if str(folder) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_rows_end_with_a_suite_that_is_killed(tmp_path):
    suite = write_suite(tmp_path, {'a': {'train': 'hang'}})
    process = multiprocessing.get_context('fork').Process(target=_suite_process, args=(suite, tmp_path / 'w', 1))
    process.start()
    wait_for(tmp_path / 'w' / 'runs' / 'a' / '0' / 'stage.json')
    assert _processes_at(tmp_path / 'w')
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    end = time.monotonic() + 10
    while _processes_at(tmp_path / 'w') and time.monotonic() < end:
        time.sleep(0.05)
    assert not _processes_at(tmp_path / 'w')


def wait_for(path: Path, seconds: float = 50) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_rows_and_records_nothing(tmp_path, number):
    suite = write_suite(tmp_path, {'a': {'train': 'hang'}, 'b': {'train': 'hang'}, 'c': {}})
    marks = [tmp_path / 'w' / 'runs' / row / '0' / 'stage.json' for row in 'ab']

    def interrupt() -> None:
        for mark in marks:
            wait_for(mark)
        os.kill(os.getppid(), number)

    process = multiprocessing.get_context('fork').Process(target=interrupt)
    process.start()
    with pytest.raises(KeyboardInterrupt):
        run(suite, tmp_path / 'w', jobs=2)
    process.join()
    assert not _processes_at(tmp_path / 'w')
    assert not list((tmp_path / 'w').glob('results/*'))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_speed_comes_alone_at_the_end_and_jobs_share_the_cores(tmp_path):
    suite = write_suite(tmp_path, {'a': {}, 'b': {'train': 'crash'}, 'c': {}})
    tasks, _ = plan.tasks_left(read_suite(suite), plan.Choice(tmp_path / 'w'))
    first, last = runner.stages(tasks, Settings(jobs=2))
    assert first[0] == 2 and [task.measures for task in first[1]] == [('train', 'complexity', 'metric')] * 3
    assert last[0] == 1 and [task.measures for task in last[1]] == [('speed',)] * 3
    failed, said = run(suite, tmp_path / 'w', resume=True, jobs=2)
    assert [name for name, _ in failed] == ['b seed 0']
    found = lines(tmp_path / 'w')
    assert not [one for one in found if one['row'] == 'b' and one['measurement'] == 'speed']  # has no weights
    assert max(one['started'] for one in found if one['measurement'] != 'speed') < min(
        one['started'] for one in found if one['measurement'] == 'speed')
    cores = min(2, len(os.sched_getaffinity(0)))
    assert {one['facts']['threads'] for one in found if one['status'] == 'done' and one['measurement'] == 'metric'} == {
        str(max(1, cores // 2))}
    assert {one['facts']['threads'] for one in found if one['measurement'] == 'speed'} == {'2'}


def _array_task(suite: Path, work_dir: Path, number: int) -> None:
    tasks, _ = plan.tasks_left(read_suite(suite), plan.Choice(work_dir, True, [str(number)]))
    assert not runner.run(tasks, Settings(module=FAKE), suite_fake.environment, io.StringIO())


def test_suites_by_number_at_the_same_time_add_up(tmp_path):
    suite = write_suite(tmp_path, {'a': {}, 'b': {}}, seeds=(5, 7))
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=_array_task, args=(suite, tmp_path / 'w', number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert counts(tmp_path / 'w', 'done') == {(row, seed, m): 1 for row in 'ab' for seed in (5, 7) for m in MEASURES}


def test_launchers_start_training_and_test_and_nothing_else(tmp_path):
    suite = write_suite(tmp_path, {'a': {}})
    tasks, _ = plan.tasks_left(read_suite(suite), plan.Choice(tmp_path / 'w'))
    for launcher, start in (('pytorch', ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '4']),
                            ('slurm', ['srun', '--ntasks', '4'])):
        settings = Settings(launcher=launcher, processes=4, module='some.module')
        (_, [first]), (_, [last]) = runner.stages(tasks, settings)
        assert (first.measures, last.measures) == (('train', 'metric'), ('complexity', 'speed'))
        line = runner.command(first, Path('task.json'), settings)
        assert line[line.index(start[0]):][:len(start)] == start and line[-3:] == ['-m', 'some.module', 'task.json']
        assert runner.command(last, Path('task.json'), settings) == [sys.executable, '-m', 'some.module', 'task.json']
    assert runner.stages(tasks, Settings()) == [(1, tasks)]


def test_devices_are_dealt_out():
    devices = [str(i) for i in range(8)]
    assert [runner.devices_of(devices, slot, 1) for slot in (0, 3, 9)] == [['0'], ['3'], ['1']]
    assert [''.join(runner.devices_of(devices, slot, 4)) for slot in range(3)] == ['0123', '4567', '0123']


def test_of_two_processes_at_one_row_the_second_gives_way(tmp_path, monkeypatch):
    suite = write_suite(tmp_path, {'a': {}})
    tasks, _ = plan.tasks_left(read_suite(suite), plan.Choice(tmp_path / 'w'))
    with alone(tasks[0].folder):
        with pytest.raises(BusyError, match='another process is at it'), alone(tasks[0].folder, 0.2):
            pass
        monkeypatch.setenv('SUITE_FAKE_PATIENCE', '0.2')
        [(_, reason)] = runner.run(tasks, Settings(module=FAKE), suite_fake.environment, io.StringIO())
        assert reason == 'another process is at this row and seed'
    assert not lines(tmp_path / 'w')
    assert runner.run(tasks, Settings(module=FAKE), suite_fake.environment, io.StringIO()) == []
    assert runner.run(tasks, Settings(module=FAKE), suite_fake.environment, io.StringIO()) == []  # it is done by now
    assert set(counts(tmp_path / 'w', 'done').values()) == {1}


def test_why_a_process_died(tmp_path):
    log = tmp_path / 'log.txt'
    log.write_text('one\n\n  two\nthree ' + 'x' * 1000 + '\nfour\n')
    assert runner.death(3, log).splitlines()[0] == 'ended with status 3'
    assert runner.death(-11, log).splitlines()[0] == 'ended by signal 11, SIGSEGV'
    assert runner.death(137, log).splitlines()[0] == 'ended by signal 9, SIGKILL (killed: out of memory?)'  # a shell's
    quoted = runner.death(-9, log).splitlines()[1:]
    assert quoted[0] == 'two' and quoted[2] == 'four' and len(quoted[1]) == 300
    before = log.stat().st_size
    assert runner.death(3, log, before) == 'ended with status 3'  # those are words of an earlier process
    log.write_bytes(log.read_bytes() + b'five\n')
    assert runner.death(3, log, before).splitlines()[1:] == ['five']
    assert runner.death(-9, tmp_path / 'absent') == 'ended by signal 9, SIGKILL (killed: out of memory?)'


def test_time_left_by_hand():
    assert progress.time_left([], [(10., 0.)], 3, 1) is None
    assert progress.time_left([100.], [], 3, 1) == 300.
    assert progress.time_left([100.], [(50., 0.5)], 0, 1) == 50.  # half of a training took 50
    assert progress.time_left([], [(50., 0.25)], 1, 1) == 150. + 200.
    assert progress.time_left([100.], [(150., 0.)], 2, 2) == 100.  # longer than the others already
    assert progress.time_left([10.], [(30., 0.5), (10., 0.5)], 0, 2) == 30.  # not sooner than the slowest
    assert [progress.duration(s) for s in (5, 65, 3661)] == ['0:05', '1:05', '1:01:01']


def test_progress_tells_stage_iteration_and_time_left(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    suite = write_suite(tmp_path, {'a': {}})
    task = plan.tasks_left(read_suite(suite), plan.Choice(tmp_path / 'w'))[0][0]
    shown = progress.Progress(2, 1, Terminal())
    shown.update([(task, 1.)])
    task.say_stage('train')
    (task.folder / 'train').mkdir()
    # this process goes on with a training that an earlier one has begun
    (task.folder / 'train' / 'progress.json').write_text('{"iteration": 3, "iterations": 12, "seconds": 30}')
    shown.update([(task, 2.)])
    shown.ended('a seed 0: fine', 60.)
    parts = [part for part in re.split(r'[\r\n]', shown.out.getvalue()) if part.strip()]
    assert parts == ['[0/2] a seed 0 starts; time left: not known yet',
                     '[0/2] a seed 0 train 3/12; about 3:30 left',  # 90 s for the rest of this one, 120 s for another
                     '[1/2] a seed 0: fine  [1:00]']
