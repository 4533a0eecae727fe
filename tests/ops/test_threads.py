"""Threads of our own: work is done once, errors surface, values are the same."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops_cases import CASES, LAYOUTS, assert_close, draw, fresh, ours, reference  # noqa: F401 (a fixture)

from replk_mm.ops import DepthwiseProblem, depthwise_conv2d
from replk_mm.ops.cpu import cost_model, fft, threads

pytestmark = pytest.mark.usefixtures('fresh')


@pytest.fixture
def worker_threads(monkeypatch):
    """Every problem counts as large enough for threads of our own; the names of the threads that transform."""
    names = set()
    rfft2 = torch.fft.rfft2
    monkeypatch.setattr(fft, 'MIN_PIXELS_FOR_THREADS', 0)
    monkeypatch.setattr(
        torch.fft, 'rfft2', lambda *a, **k: names.add(threading.current_thread().name) or rfft2(*a, **k)
    )
    return names


def test_each_item_is_done_once():
    for spread in (False, True):
        for count in (0, 1, 2, 7):
            done = []
            threads.parallel_for(done.append, count, spread)
            assert sorted(done) == list(range(count))


def test_threads_have_one_thread_of_torch_each_and_leave_the_others_alone():
    ready = threading.Barrier(2)
    seen = []

    def work(i):
        if i < 2:
            ready.wait(30)  # so that each thread has one of them
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))

    threads.parallel_for(work, 4, True)
    assert len({name for name, *_ in seen}) == 2 and threading.current_thread().name not in {name for name, *_ in seen}
    assert {(threads, grad) for _, threads, grad in seen} == {(1, False)}
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    other = ThreadPoolExecutor(1).submit(torch.get_num_threads)  # a thread made later has what the process was told
    assert other.result(30) == 2
    torch.set_num_threads(3)
    threads.parallel_for(work, 0, True)
    assert torch.get_num_threads() == 3


def test_an_error_in_a_thread_surfaces(worker_threads, monkeypatch):
    def work(i):
        if i == 3:
            raise MemoryError('block 3')

    with pytest.raises(MemoryError, match='block 3'):
        threads.parallel_for(work, 5, True)
    tensors = draw((2, 8, 12, 12), (9, 9))
    with monkeypatch.context() as patch:
        patch.setattr(fft, '_inverse', lambda *args: work(3))
        with pytest.raises(MemoryError, match='block 3'):
            depthwise_conv2d(*tensors[:2], implementation='fft')
    assert_close(ours(*tensors, 'fft'), reference(*tensors), 1e-5)
    assert all(name.startswith('replk_mm') for name in worker_threads) and torch.get_num_threads() == 2


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'dtype, relative', [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str
)
def test_our_own_threads_change_nothing(dtype, relative, layout, worker_threads):
    for case in (
        'kernel 9',
        'kernel 31 over a map of 3x5',
        'even kernel',
        'tall kernel',
        'padding larger than the kernel',
        'batch 5',
        'one channel',
        'no padding',
    ):
        (n, c, h, w), kernel, kwargs = CASES[case]
        tensors = draw((n, c + 17 if dtype == torch.bfloat16 else c, h, w), kernel, dtype, layout, **kwargs)
        found = ours(*tensors, 'fft', **kwargs)
        assert_close(found, reference(*tensors, **kwargs), relative, what=case)
        assert all(map(torch.equal, found, ours(*tensors, 'fft', **kwargs)))
        with torch.inference_mode():
            assert torch.equal(depthwise_conv2d(*tensors[:3], implementation='fft', **kwargs), found[0])
    assert {name for name in worker_threads if name.startswith('replk_mm')}


def test_small_blocks_change_nothing(monkeypatch):
    tensors = draw((3, 7, 12, 12), (11, 11))
    expected = reference(*tensors)
    for layout in LAYOUTS:
        x = tensors[0].contiguous(memory_format=LAYOUTS[layout])
        for maps in (1, 2, 7, 10, 14, 100):
            # A map is transformed as 18x18 numbers.
            monkeypatch.setattr(fft, 'BLOCK_BYTES', maps * 4 * 18 * 18)
            fft._blocks.cache_clear()
            blocks = fft._blocks(DepthwiseProblem.of(x, tensors[1], (1, 1), (5, 5), (1, 1)))
            sizes = [len(range(7)[channels]) * sum(len(range(3)[p]) for p in parts) for channels, parts in blocks]
            assert sum(sizes) == 21
            assert_close(ours(x, *tensors[1:], 'fft'), expected, 1e-5, what=f'{maps} maps')


@pytest.mark.parametrize('threaded', [False, True])
def test_thread_safe(threaded, monkeypatch):
    """Eight threads at once, on shapes of their own and on common ones, forwards and backwards, from cold caches."""
    if threaded:
        monkeypatch.setattr(fft, 'MIN_PIXELS_FOR_THREADS', 0)
    shapes = ((2, 4, 12, 11), (9, 9)), ((1, 6, 7, 9), (13, 5))
    specs = 'fft', 'auto', 'channels_last,grad_weight=grad_kernel'
    cases = [(draw(*shape, layout=layout), spec) for shape in shapes for layout in LAYOUTS for spec in specs]
    expected = [ours(*tensors, spec) for tensors, spec in cases]
    cost_model._plan.cache_clear(), fft._blocks.cache_clear()
    start = threading.Barrier(8)

    def work(first):
        torch.set_num_threads(2)  # torch's own is a number of each thread
        start.wait(30)
        order = cases[first:] + cases[:first]
        found = [ours(*tensors, spec) for _ in range(2) for tensors, spec in order]
        wanted = (expected[first:] + expected[:first]) * 2
        return all(all(map(torch.equal, one, other)) for one, other in zip(found, wanted, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8), timeout=100))
