"""Time and memory: known times, known memory."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from replk_mm.analysis import timing


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, seconds: list[float]):
        passing = iter(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(passing)

        return call


def test_calls_take_turns_and_warmup_does_not_count() -> None:
    clock = Clock()
    found = timing.time_interleaved(
        {'a': clock.spend('a', [9.0, 1.0, 2.0, 3.0]), 'b': clock.spend('b', [9.0, 4.0, 4.0, 4.0])},
        repeats=3,
        warmup=1,
        clock=clock,
    )
    assert clock.calls == ['a', 'b'] * 4
    assert found.milliseconds == {'a': [1000, 2000, 3000], 'b': [4000, 4000, 4000]}
    assert (found.rounds, found.warmup) == (3, 1)
    assert vars(found.summary('a')) == pytest.approx(dict(low=1500, median=2000, high=2500))


def test_pauses_and_preparations_are_not_timed(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, 'sleep', lambda seconds: setattr(clock, 'now', clock.now + seconds))
    found = timing.time_interleaved(
        {'a': clock.spend('a', [1.0] * 4)},
        repeats=3,
        warmup=1,
        pause=5.0,
        before={'a': clock.spend('prepare', [7.0] * 4)},
        clock=clock,
    )
    assert found.milliseconds == {'a': [1000] * 3} and clock.calls == ['prepare', 'a'] * 4


def test_events_start_after_the_flush_and_end_after_the_call(monkeypatch) -> None:
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append('event')

        def synchronize(self) -> None:
            log.append('synchronize')

        def elapsed_time(self, end: 'Event') -> float:
            return 7.0 if end is not self else 0.0

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(timing.torch, 'empty', lambda size, **_: SimpleNamespace(zero_=lambda: log.append(size)))
    found = timing.time_interleaved({'a': lambda: log.append('a')}, 3, 0, 0.0, device='cuda', events=True)
    assert log == 3 * [2**29, 'event', 'a', 'event', 'synchronize']
    assert found.milliseconds == {'a': 3 * [7.0]} and found.clock == timing.CUDA_EVENTS


def test_a_copy_reads_and_writes(monkeypatch) -> None:
    monkeypatch.setattr(timing, 'time_interleaved', lambda *args, **options: timing.Timings({'copy': [4.0] * 3}, 0))
    assert timing.copy_gbytes() == pytest.approx(2 * 2**28 / 4e-3 / 1e9)


def test_a_multiply_add_of_the_roofline_is_two_operations(monkeypatch) -> None:
    monkeypatch.setattr(timing, 'time_interleaved', lambda *args, **options: timing.Timings({'product': [4.0] * 3}, 0))
    assert timing.matmul_gflops(torch.float32) == pytest.approx(2 * 2048**3 / 4e-3 / 1e9)


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """A round in which everything is slow has the ratio of the others; the ratio of medians would be 12 / 2."""
    found = timing.Timings({'slow': [4.0, 12.0, 90.0], 'fast': [2.0, 2.0, 30.0]}, 0)
    assert vars(found.speedup('fast', 'slow')) == pytest.approx(dict(low=2.5, median=3.0, high=4.5))
    assert vars(found.speedup('slow', 'slow')) == dict(low=1.0, median=1.0, high=1.0)


@pytest.mark.parametrize('seconds, rounds, warmup', [(None, 10, 2), (100, 10, 2), (21, 6, 1), (1, 3, 1)])
def test_a_budget_lowers_the_rounds_but_not_below_three(seconds, rounds, warmup) -> None:
    """Rounds of 3 s: into a quarter of 21 s goes one to warm up, and six follow; a budget of 1 s has room for none."""
    clock = Clock()
    found = timing.time_interleaved(
        {'a': clock.spend('a', [3.0] * 12)}, repeats=10, warmup=2, seconds=seconds, clock=clock
    )
    assert (found.rounds, found.warmup) == (rounds, warmup)


@pytest.mark.parametrize(
    ('quartiles', 'load', 'fragment'),
    [((9.0, 11.0), 0.0, ''), ((9.0, 11.1), 0.0, '21%'), ((9.9, 10.1), 0.1, ''), ((9.9, 10.1), 0.5, '50%')],
)
def test_wide_quartiles_and_a_loaded_machine_are_problems(quartiles, load, fragment) -> None:
    problem = timing.Timing(10.0, *quartiles).problem(load)
    assert fragment in problem and bool(problem) == bool(fragment)


def test_load_is_that_of_other_processes_on_the_usable_cpus(monkeypatch) -> None:
    """This process uses one of two usable CPUs; another one uses both to a quarter, and a third CPU is not usable."""
    monkeypatch.setattr(timing.os, 'sched_getaffinity', lambda pid: {0, 2}, raising=False)
    monkeypatch.setattr(timing.psutil, 'cpu_percent', lambda percpu: [100.0, 100.0, 50.0])
    monkeypatch.setattr(timing.psutil.Process, 'cpu_percent', lambda self: 100.0)
    found = timing.time_interleaved({'a': lambda: None}, 3, 0, 0.0)
    assert found.load == pytest.approx(0.25) and '25%' in found.problem('a')


@pytest.mark.slow
def test_a_busy_neighbour_is_measured() -> None:
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(timing.psutil.cpu_count())]
    try:
        time.sleep(0.5)
        assert timing.time_interleaved({'a': lambda: time.sleep(0.2)}, 5, 0).load > timing.MAX_LOAD
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_resident_memory_is_that_of_psutil() -> None:
    if not timing.Path('/proc/self/status').exists():
        pytest.skip('this system does not tell of its memory')
    resident, peak = timing._resident_memory()
    assert resident == pytest.approx(timing.psutil.Process().memory_info().rss, rel=5e-3) and peak >= resident


def test_memory_growth_is_the_peak() -> None:
    mib = 2**20
    growth = timing.memory_growth(lambda: torch.ones(96 * mib // 4).sum())
    if growth is None:
        pytest.skip('this system does not tell of its peak memory')
    assert 90 * mib < growth < 130 * mib


@pytest.mark.gpu
def test_a_product_on_a_gpu() -> None:
    """Times are positive, and the peak of memory is the output."""
    a = torch.randn(2048, 2048, device='cuda')
    assert min(timing.time_interleaved({'': lambda: a @ a}, 3, 1, device='cuda', events=True).milliseconds['']) > 0
    assert timing.memory_growth(lambda: a + 1, 'cuda') == a.nbytes
    assert timing.matmul_gflops(torch.float16, 'cuda') > 0 and timing.copy_gbytes('cuda') > 0
