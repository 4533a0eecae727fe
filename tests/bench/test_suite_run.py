"""Running a suite: rows that crash, hang, die and are killed, with the suite itself, at any moment."""

import collections
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import suite_fake
from filelock import FileLock
from rich.console import Console

from replk_mm.bench.records import append_record, write_json
from replk_mm.bench.schema import read_suite
from replk_mm.bench.suites import plan, runner, slurm
from replk_mm.bench.suites.progress import time_left
from replk_mm.bench.suites.runner import Settings, SuiteRunner
from replk_mm.bench.suites.task import utc_now
from replk_mm.errors import UserError

MEASURES = ('train', 'complexity', 'metric', 'speed')
FORK = multiprocessing.get_context('fork')


@pytest.fixture(autouse=True)
def _fake_rows(monkeypatch):
    """Processes of rows find the module that pretends."""
    path = [str(Path(__file__).parents[1] / 'helpers'), os.environ.get('PYTHONPATH')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, path)))
    monkeypatch.setenv('OMP_NUM_THREADS', '2')


def write_suite(folder: Path, rows: dict[str, dict], seeds=(0,)) -> Path:
    """A suite of rows that pretend as told: ``{name: {measurement: how}}``."""
    (folder / 'config.py').write_text('model = dict()\ntest_dataloader = dict()\n')
    path = folder / 'suite.yaml'
    path.write_text(
        json.dumps(
            dict(
                name='pretended',
                defaults=dict(
                    config='config.py', iterations=12, seeds=list(seeds), measure=[m for m in MEASURES if m != 'train']
                ),
                rows=[dict(name=name, options=dict(fake=fake)) for name, fake in rows.items()],
            )
        )
    )
    return path


def tasks_of(suite: Path, work_dir: Path, resume: bool = True, only=()):
    return plan.remaining_tasks(read_suite(suite), plan.SuiteOptions(work_dir, resume, only), build=False)


def run(suite: Path, work_dir: Path, resume: bool = True, only=(), **settings):
    console = Console(file=io.StringIO())
    result = SuiteRunner(Settings(module='suite_fake', **settings), suite_fake.environment, console).run(
        tasks_of(suite, work_dir, resume, only)
    )
    return [(task.name, reason) for task, reason in result], console.file.getvalue()


def lines(work_dir: Path) -> list[dict]:
    """All records, read by hand."""
    return [
        json.loads(line)
        for path in sorted((work_dir / 'results').glob('*'))
        for line in path.read_text().splitlines()
        if line
    ]


def counts(work_dir: Path, status: str) -> dict[tuple, int]:
    found = [one for one in lines(work_dir) if one['status'] == status]
    return collections.Counter((one['row'], one['seed'], one['measurement']) for one in found)


def processes_at(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names a folder."""
    return [
        process
        for process in psutil.process_iter(['cmdline'])
        if any(str(folder) in part for part in process.info['cmdline'] or ())
    ]


def wait_for(condition, seconds: float = 50) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_rows_fail_independently(tmp_path):
    suite = write_suite(
        tmp_path,
        {
            'good': {},
            'refused': {'metric': 'user error'},
            'crashes': {'train': 'crash'},
            'exits': {'complexity': 'exit'},
            'killed': {'metric': 'kill'},
            'no-number': {'metric': 'nan'},
            'last': {},
        },
    )
    failed, said = run(suite, tmp_path / 'w')
    reasons = {name.split()[0]: reason.splitlines() for name, reason in failed}
    assert list(reasons) == ['refused', 'crashes', 'exits', 'killed', 'no-number']
    assert reasons['refused'] == ['metric: it cannot be', 'Do something else.']
    assert reasons['crashes'] == ['train: ZeroDivisionError: division by nothing']
    assert reasons['exits'][0] == 'complexity: ended with status 7' and reasons['exits'][-1] == 'the last words'
    assert reasons['killed'][0] == 'metric: ended by signal 9, SIGKILL (killed: out of memory?)'
    assert reasons['killed'][-1] == 'a line before the end'
    assert 'values.metrics.mIoU is not a finite number' in reasons['no-number'][0]
    done = collections.defaultdict(set)
    for row, _, measurement in counts(tmp_path / 'w', 'done'):
        done[row].add(measurement)
    everything, rest = set(MEASURES), {'train', 'complexity', 'speed'}
    assert done == {
        'good': everything,
        'refused': rest,
        'exits': {'train'},
        'killed': {'train', 'complexity'},
        'last': everything,
        'no-number': rest,
    }
    assert counts(tmp_path / 'w', 'failed') == {
        ('refused', 0, 'metric'): 1,
        ('crashes', 0, 'train'): 1,
        ('exits', 0, 'complexity'): 1,
        ('killed', 0, 'metric'): 1,
        ('no-number', 0, 'metric'): 1,
    }
    assert '[1/7] good seed 0: mIoU 2.50; 2.00 M parameters' in said
    assert '[5/7] killed seed 0: FAILED: metric: ended by signal 9' in said


@pytest.mark.slow
def test_resume_repeats_failures_and_nothing_else(tmp_path):
    suite = write_suite(tmp_path, {'a': {'metric': 'kill once'}, 'b': {'train': 'crash once'}, 'c': {}})
    failed, _ = run(suite, tmp_path / 'w', jobs=3)
    assert sorted(name for name, _ in failed) == ['a seed 0', 'b seed 0']
    assert not run(suite, tmp_path / 'w', jobs=3)[0]
    before = lines(tmp_path / 'w')
    assert run(suite, tmp_path / 'w') == ([], '')  # nothing is left
    assert lines(tmp_path / 'w') == before
    assert counts(tmp_path / 'w', 'done') == {(row, 0, m): 1 for row in 'abc' for m in MEASURES}


def _suite_process(suite: Path, work_dir: Path, jobs: int) -> None:
    os.setsid()
    run(suite, work_dir, jobs=jobs)


@pytest.mark.slow
@pytest.mark.parametrize('jobs', [1, 3])
def test_killed_at_random_moments_nothing_is_lost_or_repeated(tmp_path, jobs):
    suite = write_suite(tmp_path, {'a': {'seconds': 0.1}, 'b': {'seconds': 0.05}}, seeds=(0, 1, 2))
    work_dir, rng = tmp_path / 'w', random.Random(jobs)
    wanted = {(row, seed, m): 1 for row in 'ab' for seed in (0, 1, 2) for m in MEASURES}
    kept: list[dict] = []
    for _ in range(4):
        process = FORK.Process(target=_suite_process, args=(suite, work_dir, jobs))
        process.start()
        time.sleep(rng.uniform(0.5, 2.5))
        for row in processes_at(work_dir)[:1]:
            row.kill()
        process.kill()
        process.join()
        done = [one for one in lines(work_dir) if one['status'] == 'done'] if work_dir.exists() else []
        assert [one for one in done if one in kept] == kept  # no finished one is lost
        kept = done
    while counts(work_dir, 'done') != wanted:
        assert max(counts(work_dir, 'done').values(), default=1) == 1
        failed, _ = run(suite, work_dir, jobs=jobs)
        assert not failed, failed
    assert all(one['reason'].startswith('ended by signal 9') for one in lines(work_dir) if one['status'] == 'failed')


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_rows_and_records_nothing(tmp_path, number):
    suite = write_suite(tmp_path, {'a': {'train': 'hang'}, 'b': {'train': 'hang'}, 'c': {}})
    logs = [tmp_path / f'w/runs/{row}/0/log.txt' for row in 'ab']

    def interrupt() -> None:
        wait_for(lambda: all(log.exists() and 'train' in log.read_text() for log in logs))
        os.kill(os.getppid(), number)

    process = FORK.Process(target=interrupt)
    process.start()
    with pytest.raises(KeyboardInterrupt):
        run(suite, tmp_path / 'w', jobs=2)
    process.join()
    assert not processes_at(tmp_path / 'w')
    assert not list((tmp_path / 'w').glob('results/*'))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_speed_is_measured_last_and_jobs_share_the_cores(tmp_path):
    suite = write_suite(tmp_path, {'a': {}, 'b': {'train': 'crash'}, 'c': {}})
    first, last = runner.schedule(tasks_of(suite, tmp_path / 'w'), Settings(jobs=2))
    assert first[0] == 2 and [task.measures for task in first[1]] == [('train', 'complexity', 'metric')] * 3
    assert last[0] == 1 and [task.measures for task in last[1]] == [('speed',)] * 3
    assert [name for name, _ in run(suite, tmp_path / 'w', jobs=2)[0]] == ['b seed 0']
    found = lines(tmp_path / 'w')
    speed = [one for one in found if one['measurement'] == 'speed']
    assert {one['row'] for one in speed} == {'a', 'c'}  # b has no weights
    assert max(one['started'] for one in found if one not in speed) < min(one['started'] for one in speed)
    threads = {one['measurement']: one['facts']['threads'] for one in found if one['status'] == 'done'}
    assert threads['metric'] == '1' and threads['speed'] == '2'


def _array_task(suite: Path, work_dir: Path, number: int) -> None:
    assert not run(suite, work_dir, only=[str(number)])[0]


@pytest.mark.slow
def test_tasks_of_a_job_array_add_up(tmp_path):
    suite = write_suite(tmp_path, {'a': {}, 'b': {}}, seeds=(5, 7))
    processes = [FORK.Process(target=_array_task, args=(suite, tmp_path / 'w', number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert counts(tmp_path / 'w', 'done') == {(row, seed, m): 1 for row in 'ab' for seed in (5, 7) for m in MEASURES}


@pytest.mark.parametrize(
    ('launcher', 'start'),
    [
        ('pytorch', ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '4']),
        ('slurm', ['srun', '--ntasks', '4']),
    ],
)
def test_launchers_start_training_and_test_only(tmp_path, launcher, start):
    tasks = tasks_of(write_suite(tmp_path, {'a': {}}), tmp_path / 'w')
    settings = Settings(launcher=launcher, processes=4, module='some.module')
    (_, [first]), (_, [last]) = runner.schedule(tasks, settings)
    assert (first.measures, last.measures) == (('train', 'metric'), ('complexity', 'speed'))
    line = runner.command(first, Path('task.json'), settings)
    assert line[line.index(start[0]) :][: len(start)] == start and line[-3:] == ['-m', 'some.module', 'task.json']
    assert runner.command(last, Path('task.json'), settings) == [sys.executable, '-m', 'some.module', 'task.json']


def test_time_left_is_extrapolated_from_iterations_and_other_rows(tmp_path):
    work_dir = tmp_path / 'w'
    a, b = tasks_of(write_suite(tmp_path, {'a': {}, 'b': {}}), work_dir)
    assert time_left(work_dir, [(1, [a, b])]) == ''  # nothing was timed
    write_json(a.folder / 'train' / 'progress.json', dict(iteration=3, iterations=12, seconds=6.0))
    assert time_left(work_dir, [(1, [a, b])]) == f'at least {2 * 9 + 2 * 12} s left'
    assert time_left(work_dir, [(2, [a, b])]) == f'at least {2 * 9 // 2 + 2 * 12 // 2} s left'
    for name, seconds in (('train', 30.0), ('complexity', 1.0), ('metric', 500.0), ('speed', 9.0)):
        append_record({**a.record(name, utc_now(), {}), 'seconds': seconds}, a.results)
    assert time_left(work_dir, [(1, [a, b])]) == 'about 9 min 0 s left'
    assert time_left(work_dir, [(1, [a])]) == ''


def test_other_seeds_tell_how_long_a_row_takes(tmp_path):
    """Measurements of 100 s for its first seed, two at a time; those of another row take longer."""
    first, second, other, _ = tasks_of(write_suite(tmp_path, {'a': {}, 'b': {}}, seeds=(0, 1)), tmp_path / 'w')
    for task, seconds in ((first, 100.0), (other, 700.0)):
        for name in task.measures:
            append_record({**task.record(name, utc_now(), {}), 'seconds': seconds}, task.results)
    assert len(second.measures) == 4 and time_left(tmp_path / 'w', [(2, [second])]) == 'about 3 min 20 s left'


def test_devices_are_assigned_in_turn():
    devices = [str(i) for i in range(8)]
    assert [runner.devices_of(devices, slot, 1) for slot in (0, 3, 9)] == [['0'], ['3'], ['1']]
    assert [''.join(runner.devices_of(devices, slot, 4)) for slot in range(3)] == ['0123', '4567', '0123']


@pytest.mark.slow
def test_a_second_process_of_a_row_gives_way(tmp_path, monkeypatch):
    suite = write_suite(tmp_path, {'a': {}})
    [task] = tasks_of(suite, tmp_path / 'w')
    task.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(task.folder / 'lock'):
        monkeypatch.setenv('SUITE_FAKE_PATIENCE', '0.2')
        [(_, reason)], _ = run(suite, tmp_path / 'w')
        assert reason == 'another process is running this row and seed'
    assert not lines(tmp_path / 'w')
    again = SuiteRunner(Settings(module='suite_fake'), suite_fake.environment, Console(file=io.StringIO()))
    assert again.run([task]) == again.run([task]) == []  # the second time it is done
    assert set(counts(tmp_path / 'w', 'done').values()) == {1}


def test_death(tmp_path):
    log = tmp_path / 'log.txt'
    log.write_text('one\n\n  two\nthree ' + 'x' * 1000 + '\nfour\n')
    killed = 'ended by signal 9, SIGKILL (killed: out of memory?)'
    assert [runner.describe_exit(status, log).splitlines()[0] for status in (3, -11, 137)] == [
        'ended with status 3',
        'ended by signal 11, SIGSEGV',
        killed,
    ]
    quoted = runner.describe_exit(-9, log).splitlines()[1:]
    assert quoted[0] == 'two' and quoted[2] == 'four' and len(quoted[1]) == 300
    before = log.stat().st_size
    assert runner.describe_exit(3, log, before) == 'ended with status 3'  # the words of an earlier process
    log.write_bytes(log.read_bytes() + b'five\n')
    assert runner.describe_exit(3, log, before).splitlines()[1:] == ['five']
    assert runner.describe_exit(-9, tmp_path / 'absent') == killed


# Slurm jobs

SBATCH = """#!{python}
# Pretend to be sbatch, and keep the path of the script.
import pathlib, sys
pathlib.Path({log!r}).write_text(sys.argv[1])
print('Submitted batch job 17')
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Programs of Slurm at the front of PATH; the file that sbatch writes to."""
    log = tmp_path / 'submitted.txt'
    for name in ('sbatch', 'srun'):
        program = tmp_path / 'bin' / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(SBATCH.format(python=sys.executable, log=str(log)))
        program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}')
    return log


@pytest.mark.slow
@pytest.mark.extras('submitit')
def test_batch_script_runs_each_row_and_seed(tmp_path, cluster, monkeypatch):
    """submitit's own batch script, run as Slurm would, but with rows that pretend."""
    monkeypatch.setattr(slurm, 'Settings', lambda **kwargs: Settings(module='suite_fake', **kwargs))
    tasks = tasks_of(write_suite(tmp_path, {'a': {}, 'b': {'metric': 'crash once'}}), tmp_path / 'w')
    assert slurm.submit(tasks, 1, 1, dict(partition='gpu', gpus='2', exclusive=None, time='30')) == '17'
    script = cluster.read_text()
    options = {line for line in Path(script).read_text().splitlines() if line.startswith('#SBATCH')}
    assert options > {
        f'#SBATCH --{option}'
        for option in (
            *('array=0-1%1', 'partition=gpu', 'gpus=2', 'exclusive', 'time=30', 'requeue', 'job-name=pretended'),
            *('ntasks=1', 'signal=B:USR2@120'),
        )
    }
    job = dict(os.environ, SLURM_JOB_ID='17', SLURM_ARRAY_JOB_ID='17')

    def start(number: int) -> int:
        return subprocess.run(['bash', script], env=job | {'SLURM_ARRAY_TASK_ID': str(number)}).returncode

    assert [start(1), start(1)] == [1, 0]  # the second is a requeued job
    assert counts(tmp_path / 'w', 'done') == {('b', 0, m): 1 for m in MEASURES}
    assert counts(tmp_path / 'w', 'failed') == {('b', 0, 'metric'): 1}


@pytest.fixture
def fake_submitit(monkeypatch):
    """What is given to submitit, which need not be installed; ``error`` is what its sbatch says."""
    asked = types.SimpleNamespace(error='')
    failed = type('FailedJobError', (Exception,), {})

    class SlurmExecutor:
        def __init__(self, folder, *args, **kwargs):
            asked.folder = folder

        def update_parameters(self, **parameters):
            asked.parameters = parameters

        def submit_array(self, jobs):
            if asked.error:
                raise failed(asked.error)
            asked.jobs = jobs
            return [types.SimpleNamespace(job_id=f'17_{i}') for i in range(len(jobs))]

    environment = types.SimpleNamespace(USR_SIG='USR2')
    for name, content in {
        'submitit': dict(SlurmExecutor=SlurmExecutor, JobEnvironment=environment),
        'submitit.core': {},
        'submitit.core.utils': dict(FailedJobError=failed),
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content, __spec__=types.SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.mark.parametrize('processes', [1, 4])
def test_one_job_a_row_and_seed(tmp_path, fake_submitit, processes):
    tasks = tasks_of(write_suite(tmp_path, {'a': {}, 'b': {}}, seeds=(5, 7)), tmp_path / 'w')
    assert slurm.submit(tasks, processes, None, {}) == '17' and fake_submitit.folder == tmp_path / 'w' / 'slurm'
    assert [job.task.name for job in fake_submitit.jobs] == ['a seed 5', 'a seed 7', 'b seed 5', 'b seed 7']
    # srun is needed for several processes only
    assert {job.settings.launcher for job in fake_submitit.jobs} == {'none' if processes == 1 else 'slurm'}
    assert fake_submitit.parameters['additional_parameters']['ntasks'] == processes
    assert fake_submitit.parameters['array_parallelism'] == 4 and fake_submitit.parameters['time'] == 240


def test_error_of_sbatch_is_shown(tmp_path, fake_submitit):
    fake_submitit.error = 'sbatch: error: invalid partition specified: absent\n'
    tasks = tasks_of(write_suite(tmp_path, {'a': {}}), tmp_path / 'w')
    with pytest.raises(UserError, match='invalid partition specified: absent\n.*--resume'):
        slurm.submit(tasks, 1, None, {})


def test_each_start_of_a_job_does_what_is_left(tmp_path, monkeypatch):
    """The first start fails at the metric; the second repeats it, as after a requeue; the third has nothing to do."""
    [task] = tasks_of(write_suite(tmp_path, {'a': {}}), tmp_path / 'w')
    started, failures = [], [[(task, 'metric: no')], []]

    class Runner:
        def __init__(self, *args):
            pass

        def run(self, tasks):
            [one] = tasks
            started.append(one.measures)
            for name in one.measures:
                if (name, len(failures)) != ('metric', 2):
                    append_record(one.record(name, utc_now(), {}), one.results)
            return failures.pop(0)

    monkeypatch.setattr(slurm, 'SuiteRunner', Runner)
    job = slurm.RowJob(task, Settings())
    for status in (1, 0, 0):
        with pytest.raises(SystemExit) as caught:
            job()
        assert caught.value.code == status
    assert started == [MEASURES, ('metric',)]


def test_a_second_sigterm_leaves_the_rows_time_to_save(monkeypatch):
    """Slurm sends one when it requeues a job, which is ending already."""

    class Process:
        pid, ended = 0, False

        def wait(self, seconds):
            os.kill(os.getpid(), signal.SIGTERM)
            self.ended = True

    process = Process()
    monkeypatch.setattr(runner, '_kill', lambda *args: None)
    suite = SuiteRunner(Settings(), dict)
    suite._running.add(process)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with runner._sigterm_interrupts():
            suite._end()
    except KeyboardInterrupt:
        pytest.fail('the suite ends before its rows')
    assert process.ended and signal.getsignal(signal.SIGTERM) is before
