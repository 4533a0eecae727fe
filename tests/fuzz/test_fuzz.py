"""A few hundred hostile inputs for every reader; ``run.py`` runs more. What fails is made small by hypothesis."""
import contextlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from tiny import ROOT, tool_environment

from fuzz.guard import Failure, Guard
from fuzz.mutate import RAW, Choices
from fuzz.readers import READERS, clean, executor
from replk_mm.errors import UserError


@pytest.fixture(scope='module', autouse=True)
def _scratch():
    yield
    clean(os.getpid())


def run(reader: str, count: int) -> dict[str, int]:
    execute, outcomes = executor(READERS[reader]), {}

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(RAW)
    def test(raw: bytes) -> None:
        outcome = execute(READERS[reader].build(Choices(raw)))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    test()
    return outcomes


@pytest.mark.parametrize('reader', READERS)
def test_hostile_input_is_read_or_refused(reader):
    outcomes = run(reader, 40 if reader == 'images' else 200)
    # Input that is all refused alike, or never, would show nothing.
    assert outcomes.get('accepted', 0) > 0 and (len(outcomes) > 3 or reader == 'report')


@pytest.mark.slow
@pytest.mark.parametrize('reader', READERS)
def test_much_hostile_input_is_read_or_refused(reader, tmp_path):
    """In a process of its own, as crashes need it."""
    done = subprocess.run([sys.executable, ROOT / 'tests/fuzz/run.py', reader, '--executions', '3000', '--failures', tmp_path],
                          capture_output=True, text=True, check=False, env=tool_environment())
    assert done.returncode == 0, done.stdout[-3000:]
    assert '3,000 executions' in done.stdout


# ---- what the harness notices

@pytest.fixture
def guard(tmp_path):
    return Guard(tmp_path, seconds=0.5, memory=64 << 20)


def loops(data: bytes) -> None:
    while True:
        pass


def takes(data: bytes) -> None:
    pages = mmap.mmap(-1, 300 << 20)  # not of the allocator, which may have memory to hand that was counted before
    pages[::4096] = b'x' * (len(pages) // 4096)


def writes(data: bytes) -> None:
    with contextlib.suppress(OSError):
        Path('no_such_folder/x').write_bytes(data)


BAD = {
    'runs a program': (lambda data: subprocess.run(['true'], check=True), 'subprocess.Popen'),
    'executes a text': (lambda data: exec('1'), 'exec'),
    'writes elsewhere': (writes, 'open'),
    'imports': (lambda data: __import__('this_is_no_module'), 'ModuleNotFoundError'),
    'raises': (lambda data: {}['x'], 'KeyError instead of a message'),
    'hangs': (loops, 'too long'),
    'takes memory': (takes, 'more memory'),
    'sends control characters': (lambda data: (_ for _ in ()).throw(Raw('\x1b[2J')), 'that a terminal obeys'),
    'says nothing': (lambda data: (_ for _ in ()).throw(UserError('')), 'empty'),
    'says too much': (lambda data: (_ for _ in ()).throw(UserError('x' * 30_000)), 'a message of 30,000'),
}


class Raw(UserError):
    """A message that nothing has cleaned."""

    def __str__(self) -> str:
        return '\x1b[2J'


@pytest.mark.parametrize('what', BAD)
def test_guard_notices_a_reader_that(what, guard):
    reader, named = BAD[what]
    with pytest.raises(Failure, match=named):
        guard.run(reader, b'')


def test_guard_lets_readers_refuse(guard, tmp_path):
    def reader(data: bytes) -> None:
        (tmp_path / 'own').write_bytes(data)
        raise UserError(f'/some/file: 12 of 34 {"x" * 9} are wrong')

    assert guard.run(lambda data: None, b'') == 'accepted'
    assert guard.run(reader, b'x') == 'FILE N of N xxxxxxxxx are wrong'


PROGRAM = """
import ctypes, sys
sys.path.insert(0, {tests!r})
from fuzz import readers, run

def fails(folder, file):
    def read():
        data = file.read_bytes()
        if data[0] % 16 == 3:
            raise KeyError('odd')
        if {dies} and data[0] == 7:
            ctypes.string_at(0)
    return read

run.__file__ = __file__  # children are this program too
readers.READERS['records'] = readers.Reader(fails, lambda: lambda choices: choices.raw)
sys.exit(run.main())
"""


@pytest.mark.parametrize('dies', [False, True])
def test_runner_tells_failures_and_crashes(dies, tmp_path):
    """Of a reader that fails on some inputs, and one that dies of some: the status says so, and the inputs are kept."""
    script, kept = tmp_path / 'program.py', tmp_path / 'kept'
    script.write_text(PROGRAM.format(tests=str(ROOT / 'tests'), dies=dies))
    done = subprocess.run([sys.executable, script, 'records', '--executions', '900', '--failures', kept], capture_output=True,
                          text=True, check=False, env=tool_environment())
    assert done.returncode == 1, done.stderr
    first = [path.read_bytes()[0] for path in sorted(kept.iterdir())]
    if dies:
        assert 'the process ended with -' in done.stdout and 7 in first
    else:
        assert 'KeyError instead of a message' in done.stdout and {n % 16 for n in first} == {3}
