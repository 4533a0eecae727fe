"""Which implementation runs: forced or chosen, said once, in whatever thread or process; and what none of them may cost."""
import logging
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import MMLogger
from test_ops import CASES, DRAWN, LAYOUTS, SPECS, assert_close, convolutions, draw, ours, reference

from replk_mm.errors import UserError
from replk_mm.models import RepLKNet
from replk_mm.ops import (
    IMPLEMENTATIONS,
    DepthwiseConv2d,
    Problem,
    choice,
    depthwise,
    depthwise_conv2d,
    implementation,
    spatial,
    spectral,
    workers,
)

PAIRS = [(computation, name) for computation, names in IMPLEMENTATIONS.items() for name in names]


def problem(shape=(2, 4, 12, 12), kernel=(9, 9), stride=(1, 1), padding=None, dilation=(1, 1), dtype=torch.float32,
            channels_last=False, threads=2) -> Problem:
    padding = padding or tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
    return Problem(shape[0], shape[1], tuple(shape[2:]), kernel, stride, padding, dilation, dtype, channels_last, threads)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No decision known yet, nothing forced from outside, two threads."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, '_announced', set())
    caches = choice._plan, spectral._blocks
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    [cache.cache_clear() for cache in caches]
    yield
    [cache.cache_clear() for cache in caches]
    torch.set_num_threads(before)


@pytest.fixture
def worker_threads(monkeypatch):
    """Every problem counts as large enough for threads of our own; the names of the threads that transform."""
    names = set()
    rfft2 = torch.fft.rfft2
    monkeypatch.setattr(spectral, 'THREADS_PAY', 0)
    monkeypatch.setattr(torch.fft, 'rfft2', lambda *a, **k: names.add(threading.current_thread().name) or rfft2(*a, **k))
    return names


@pytest.fixture
def used(monkeypatch):
    """Names of the implementations that run, in order."""
    calls = []

    def spied(name, function):
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    for name, function in depthwise._FORWARD.items():
        monkeypatch.setitem(depthwise._FORWARD, name, spied(name, function))
    for name, function in depthwise._GRAD_WEIGHT.items():
        monkeypatch.setitem(depthwise._GRAD_WEIGHT, name, spied(name, function))
    monkeypatch.setattr(spatial, 'native_gradients', spied('native', spatial.native_gradients))
    # Where spectra are kept the operator calls these by their own names.
    monkeypatch.setattr(spectral, 'forward', spied('fft', spectral.forward))
    monkeypatch.setattr(spectral, 'gradients', spied('fft', spectral.gradients))
    return calls


# forcing

@pytest.mark.parametrize('computation, name', PAIRS)
def test_the_forced_implementation_is_the_one_that_runs(computation, name, used):
    x, weight, _, grad = draw((2, 3, 10, 9), (5, 5))
    others = {c: next(n for n in ('native', 'padded', 'grad_kernel') if n in names and n != name)
              for c, names in IMPLEMENTATIONS.items()}
    spec = ','.join(f'{c}={n}' for c, n in {**others, computation: name}.items())
    out = depthwise_conv2d(x.requires_grad_(computation == 'grad_input'), weight.requires_grad_(computation == 'grad_weight'),
                           implementation=spec)
    if computation != 'forward':
        used.clear()
        out.backward(grad)
    assert used == [name]


def test_argument_before_context_before_environment(used, monkeypatch):
    x, weight = draw((1, 2, 8, 8), (5, 5))[:2]

    def runs(**kwargs):
        used.clear()
        depthwise_conv2d(x, weight, **kwargs)
        return used[0]

    chosen = choice.plan(problem(x.shape, (5, 5))).forward
    assert runs() == chosen
    monkeypatch.setenv(choice.VARIABLE, 'forward=fft')
    assert runs() == 'fft'
    with implementation('padded'):
        assert runs() == 'padded'
        assert runs(implementation='channels_last') == 'channels_last'
        assert runs(implementation='auto') == chosen
        with implementation(None):
            assert runs() == 'fft'
        with implementation('auto'):
            assert runs() == chosen
        assert runs() == 'padded'
    assert runs() == 'fft'
    used.clear()
    DepthwiseConv2d(2, 5, implementation='native')(x)
    assert used[0] == 'native'


def test_a_name_forces_every_computation_that_has_it():
    assert choice.plan(problem(), 'fft') == ('fft', 'fft', 'fft')
    auto = choice.plan(problem())
    assert choice.plan(problem(), 'padded') == ('padded', 'padded', auto.grad_weight)
    assert choice.plan(problem(), 'grad_kernel') == (auto.forward, auto.grad_input, 'grad_kernel')
    assert choice.plan(problem(), ' forward = padded , grad_weight=native ')[::2] == ('padded', 'native')


@pytest.mark.parametrize('kwargs', [dict(stride=(2, 2)), dict(dilation=(2, 1)), dict(padding=(9, 9))], ids=str)
def test_what_does_not_apply_is_left_to_the_choice(kwargs):
    given_, auto = problem(**kwargs), choice.plan(problem(**kwargs))
    for computation, name in PAIRS:
        found = choice.plan(given_, f'{computation}={name}')
        applies = name in choice.milliseconds(given_)[computation]
        assert getattr(found, computation) == (name if applies else getattr(auto, computation))
    assert ('fft' in choice.milliseconds(given_)['forward']) == ('padding' in kwargs)
    assert ('padded' in choice.milliseconds(given_)['grad_input']) == ('dilation' in kwargs)


def test_the_context_is_one_threads_own_and_ends_with_an_error():
    seen = []
    with implementation('fft'):
        thread = threading.Thread(target=lambda: seen.append(choice.plan(problem((1, 1, 4, 4), (3, 3)))))
        thread.start()
        thread.join()
        assert choice.plan(problem((1, 1, 4, 4), (3, 3))).forward == 'fft'
    assert seen == [choice.plan(problem((1, 1, 4, 4), (3, 3)), 'auto')] and seen[0].forward != 'fft'
    with pytest.raises(KeyError), implementation('fft'):
        raise KeyError
    assert choice.plan(problem((1, 1, 4, 4), (3, 3))) == seen[0]


def test_the_backward_pass_does_what_was_planned_with_the_forward_pass(used):
    x, weight = (t.requires_grad_() for t in draw((1, 2, 8, 8), (5, 5))[:2])
    with implementation('forward=fft,grad_input=padded,grad_weight=grad_kernel'):
        out = depthwise_conv2d(x, weight)
    used.clear()
    with implementation('native'):
        out.sum().backward()
    assert used == ['padded', 'grad_kernel']


@pytest.mark.parametrize('spec', ['fastest', 'forward=grad_kernel', 'backward=fft', 'fft,=', 'grad_weight=channels_last', ','])
def test_bad_names_are_refused(spec, monkeypatch):
    x, weight = draw((1, 2, 8, 8), (5, 5))[:2]
    message = r'REPLK_MM_DEPTHWISE.*names nothing that exists.*forward: native, channels_last, padded, fft; .*grad_kernel'
    with pytest.raises(ValueError, match=message), implementation(spec):
        pytest.fail('the context must not be entered')
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(x, weight, implementation=spec)
    monkeypatch.setenv(choice.VARIABLE, spec)
    with pytest.raises(UserError, match=message) as caught:
        depthwise_conv2d(x, weight)
    assert repr(spec) in str(caught.value)


# choosing

@settings(DRAWN, max_examples=150)
@given(convolutions(st.integers(1, 2000)), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans(),
       st.integers(1, 64))
def test_every_problem_has_a_plan_and_always_the_same(shapes, dtype, channels_last, threads):
    shape, kernel, kwargs = shapes
    given_ = problem(shape, kernel, **kwargs, dtype=dtype, channels_last=channels_last, threads=threads)
    for computation, times in choice.milliseconds(given_).items():
        assert times and set(times) <= set(IMPLEMENTATIONS[computation])
        assert all(0 <= ms < math.inf for ms in times.values())
    found = choice.plan(given_)
    choice._plan.cache_clear()
    assert choice.plan(problem(shape, kernel, **kwargs, dtype=dtype, channels_last=channels_last, threads=threads)) == found
    for computation, name in found._asdict().items():
        assert name in choice.milliseconds(given_)[computation]


@settings(DRAWN, max_examples=100)
@given(convolutions(st.just(1)))
def test_rows_on_the_map_are_counted(shapes):
    shape, kernel, kwargs = shapes
    given_ = problem(shape, kernel, **kwargs)
    step, pad, dilation = kwargs['stride'][0], kwargs['padding'][0], kwargs['dilation'][0]
    rows = F.conv2d(torch.ones(1, 1, *shape[2:]), torch.ones(1, 1, *kernel), None, **kwargs).shape[2]
    met = [0 <= i * step + k * dilation - pad < shape[2] for i in range(rows) for k in range(kernel[0])]
    assert choice._rows_inside(given_) == pytest.approx(sum(met) / len(met))


@settings(DRAWN, max_examples=100)
@given(convolutions(st.integers(1, 3)))
def test_shapes_of_a_problem(shapes):
    shape, kernel, kwargs = shapes
    given_ = problem(shape, kernel, **kwargs)
    out = F.conv2d(torch.ones(shape), torch.ones(shape[1], 1, *kernel), None, **kwargs, groups=shape[1])
    assert given_.out == tuple(out.shape[2:]) and given_.macs == out.numel() * math.prod(kernel)
    transform = spectral.transform_size(given_)
    for size, k, o, s, p in zip(transform, kernel, given_.out, shape[2:], kwargs['padding'], strict=True):
        assert size % 2 == 0 and size >= s + p
        assert not spectral.supports(given_) or max(k, o) <= size


@pytest.mark.parametrize('n, expected', [(1, 2), (7, 8), (11, 12), (13, 16), (31, 32), (45, 48), (91, 96), (241, 250)])
def test_good_size(n, expected):
    assert spectral.good_size(n) == expected


@pytest.mark.parametrize('batch', [1, 2, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_torchs_loop_over_weight_gradients_is_never_chosen_for_replknet(batch, dtype):
    """It is twenty to fifty times slower than the others, and what training on CPUs would spend its time in."""
    arch = RepLKNet.arch_settings['31B']
    for channels, kernel, size in zip(arch['channels'], arch['large_kernel_sizes'], (128, 64, 32, 16), strict=True):
        for side in (kernel, arch['small_kernel']):
            given_ = problem((batch, channels, size, size), (side, side), dtype=dtype, channels_last=True)
            assert choice.plan(given_).grad_weight != 'native', choice.milliseconds(given_)


@pytest.fixture
def log():
    """What mmengine's current logger is told."""
    name, records = 'test_ops_choice', []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record)

    logger = MMLogger.get_instance(name)
    logger.addHandler(Handler())
    yield records
    MMLogger._instance_dict.pop(name)


def test_one_line_for_each_decision(log):
    conv = DepthwiseConv2d(4, 9)
    for shape in ((2, 4, 12, 12), (2, 4, 12, 12), (3, 4, 12, 12)):
        conv(torch.randn(shape))
        conv(torch.randn(shape)).sum().backward()
    assert len({choice.plan(problem(shape)) for shape in ((2, 4, 12, 12), (3, 4, 12, 12))}) == 1
    record, = log
    assert record.levelno == logging.INFO
    assert 'depthwise convolution 9x9 on 2x4x12x12 float32 default layout, 2 threads: forward ' in record.getMessage()
    assert 'expected ms forward' in record.getMessage()
    # Another decision, another kernel, another layout: a line each.
    conv(torch.randn(2, 4, 12, 12).contiguous(memory_format=torch.channels_last))
    DepthwiseConv2d(4, 7)(torch.randn(2, 4, 12, 12))
    with implementation('forward=fft,grad_weight=native'):
        conv(torch.randn(2, 4, 12, 12))
        conv(torch.randn(2, 4, 12, 12))
    assert len(log) == 4 and '(forward=fft,grad_weight=native)' in log[-1].getMessage()


# threads

def test_work_is_done_once_whoever_does_it():
    for spread in (False, True):
        for count in (0, 1, 2, 7):
            done = []
            workers.run(done.append, count, spread)
            assert sorted(done) == list(range(count))


def test_threads_have_one_thread_of_torch_each_and_leave_the_others_alone():
    ready = threading.Barrier(2)
    seen = []

    def work(i):
        if i < 2:
            ready.wait(30)  # so that each thread has one of them
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))

    workers.run(work, 4, True)
    assert len({name for name, *_ in seen}) == 2 and threading.current_thread().name not in {name for name, *_ in seen}
    assert {(threads, grad) for _, threads, grad in seen} == {(1, False)}
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    other = ThreadPoolExecutor(1).submit(torch.get_num_threads)  # a thread made later has what the process was told
    assert other.result(30) == 2
    torch.set_num_threads(3)
    workers.run(work, 0, True)
    assert torch.get_num_threads() == 3


def test_an_error_in_a_thread_surfaces(worker_threads, monkeypatch):
    def work(i):
        if i == 3:
            raise MemoryError('block 3')

    with pytest.raises(MemoryError, match='block 3'):
        workers.run(work, 5, True)
    tensors = draw((2, 8, 12, 12), (9, 9))
    with monkeypatch.context() as patch:
        patch.setattr(spectral, '_inverse', lambda *args: work(3))
        with pytest.raises(MemoryError, match='block 3'):
            depthwise_conv2d(*tensors[:2], implementation='fft')
    assert_close(ours(*tensors, 'fft'), reference(*tensors), 1e-5)
    assert all(name.startswith('replk_mm') for name in worker_threads) and torch.get_num_threads() == 2


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype, relative', [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str)
def test_our_own_threads_change_nothing(dtype, relative, layout, worker_threads):
    for case in ('kernel 9', 'kernel 31 over a map of 3x5', 'even kernel', 'tall kernel', 'padding larger than the kernel',
                 'batch 5', 'one channel', 'no padding'):
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
            monkeypatch.setattr(spectral, 'BLOCK_BYTES', maps * 4 * 18 * 18)
            spectral._blocks.cache_clear()
            blocks = spectral._blocks(Problem.of(x, tensors[1], (1, 1), (5, 5), (1, 1)))
            assert sum(len(range(7)[channels]) * sum(len(range(3)[p]) for p in parts) for channels, parts in blocks) == 21
            assert_close(ours(x, *tensors[1:], 'fft'), expected, 1e-5, what=f'{maps} maps')


@pytest.mark.parametrize('threaded', [False, True])
def test_thread_safe(threaded, monkeypatch):
    """Eight threads at once, on shapes of their own and on common ones, forwards and backwards, from cold caches."""
    if threaded:
        monkeypatch.setattr(spectral, 'THREADS_PAY', 0)
    shapes = ((2, 4, 12, 11), (9, 9)), ((1, 6, 7, 9), (13, 5))
    specs = 'fft', 'auto', 'channels_last,grad_weight=grad_kernel'
    cases = [(draw(*shape, layout=layout), spec) for shape in shapes for layout in LAYOUTS for spec in specs]
    expected = [ours(*tensors, spec) for tensors, spec in cases]
    choice._plan.cache_clear(), spectral._blocks.cache_clear()
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


# processes of their own: what could hang, or counts the memory of a process

def isolated(code: str, timeout: float = 100, **environment: str) -> str:
    """What a new Python prints that runs ``code``."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, str(Path(__file__).parent)]), 'OMP_NUM_THREADS': '2',
                   **environment}
    try:
        done = subprocess.run([sys.executable, '-c', code], env=environment, timeout=timeout, text=True, capture_output=True)
    except subprocess.TimeoutExpired as expired:
        printed = (expired.stdout or b'').decode().splitlines() or ['nothing']
        pytest.fail(f'does not return; printed last: {printed[-1]}')
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


HANGS = """
import torch
from test_ops import *
torch.manual_seed(0)
torch.set_num_threads(1)
for channels in (1, 2, 3, 8, 16, 17):
    for size, kernel, kwargs in (
            ((40, 41), (13, 13), dict()), ((40, 40), (12, 14), dict(padding=(4, 6))), ((40, 40), (31, 31), dict()),
            ((41, 40), (5, 5), dict(dilation=4)), ((66, 64), (15, 15), dict(stride=2))):
        for layout in LAYOUTS:
            tensors = draw((1, channels, *size), kernel, torch.bfloat16, layout, **kwargs)
            expected, scales = reference(*tensors, **kwargs), reference(*(t.double() ** 2 for t in tensors), **kwargs)
            for spec in {specs}:
                print(channels, size, kernel, kwargs, layout, spec, flush=True)
                assert_close(ours(*tensors, spec, **kwargs), expected, 2e-2, [t.sqrt() for t in scales])
"""


@pytest.mark.parametrize('specs', [['auto', 'channels_last'], pytest.param(SPECS, marks=pytest.mark.slow)],
                         ids=['some', 'all'])
def test_bfloat16_with_few_channels_returns(specs):
    isolated(HANGS.format(specs=specs), timeout=60 * len(specs))


def test_gradients_of_gradients_in_bfloat16_with_few_channels_return():
    isolated("""
import torch
import torch.nn.functional as F
from test_ops import *
torch.manual_seed(0)
tensors = draw((1, 4, 40, 40), (31, 31), torch.bfloat16, 'channels_last')

def twice(x, weight, convolve):
    first, = torch.autograd.grad(convolve(x, weight).square().sum() / 961, x, create_graph=True)
    return torch.autograd.grad((first.contiguous(memory_format=CHANNELS_LAST) * tensors[3]).sum(), (x, weight))

expected = twice(*(t.double().requires_grad_() for t in tensors[:2]), lambda x, w: F.conv2d(x, w, padding=15, groups=4))
for spec in ('auto', 'native', 'fft'):
    print(spec, flush=True)
    found = twice(*(t.clone().requires_grad_() for t in tensors[:2]), lambda x, w: depthwise_conv2d(x, w, implementation=spec))
    for a, b in zip(found, expected):
        assert (a - b).abs().max() <= 4e-2 * b.abs().max()
""", timeout=40)


def test_after_a_fork():
    """In a forked process that has two threads, and in the workers of a loader, which have one."""
    printed = isolated("""
import os, torch
from torch.utils.data import DataLoader
from replk_mm.ops import depthwise_conv2d, spectral, workers
from test_ops import *
spectral.THREADS_PAY = 0
torch.manual_seed(0)
tensors = draw((2, 4, 12, 12), (9, 9))
expected = ours(*tensors, 'fft')
assert len(workers._pools) == 1

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        found = ours(*tensors, SPECS[i])
        assert_close(found, reference(*tensors), 1e-5)
        return found[0]

child = os.fork()
if child == 0:
    # torch's own operators must not share out work here, where their threads are gone; ours are made anew.
    found = ours(*tensors, 'fft')
    os._exit(0 if torch.get_num_threads() == 2 and all(map(torch.equal, found, expected)) and len(workers._pools) == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
for batch in DataLoader(Data(), batch_size=2, num_workers=2, multiprocessing_context='fork', timeout=50):
    assert_close([batch[0], batch[1]], [expected[0].double()] * 2, 1e-5)
print('both')
""")
    assert printed.splitlines()[-1] == 'both'


def test_distributed_training_equals_training():
    isolated("""
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from replk_mm.ops import DepthwiseConv2d
torch.distributed.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)

def train(wrap, spec):
    torch.manual_seed(0)
    network = wrap(nn.Sequential(DepthwiseConv2d(4, 13, implementation=spec), nn.GELU(), DepthwiseConv2d(4, 3, stride=2)))
    optimizer = torch.optim.SGD(network.parameters(), lr=.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(2, 4, 14, 14)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()]

for spec in ('fft', 'auto', 'native'):
    assert all(map(torch.equal, train(lambda m: m, spec), train(DistributedDataParallel, spec)))
    assert all(map(torch.equal, train(lambda m: m, spec),
                   train(lambda m: DistributedDataParallel(m, static_graph=True, gradient_as_bucket_view=True), spec)))
torch.distributed.destroy_process_group()
""")


MEMORY = """
import torch
import torch.nn as nn
from replk_mm.ops import DepthwiseConv2d

def of_process(field):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def peak(conv, x, grad):
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # the highest mark starts again from what is in use
    before = of_process('VmRSS')
    conv(x).backward(grad)
    x.grad, tensors = None, 2 * x.numel() * x.element_size()  # input and the output's gradient are there before
    return of_process('VmHWM') - before + tensors

for shape, kernel, dtype, layout in {shapes}:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    small, grad = torch.randn_like(x[..., :8, :8]), torch.ones_like(x)
    found = []
    for make in (lambda: nn.Conv2d(shape[1], shape[1], kernel, padding=kernel // 2, groups=shape[1]),
                 lambda: DepthwiseConv2d(shape[1], kernel)):
        conv = make().to(dtype)
        conv(small.requires_grad_()).sum().backward()  # code and threads are loaded
        found.append(peak(conv, x, grad))
    print('ratio', found[1] / found[0], found, shape, kernel, dtype, layout, flush=True)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs the memory counters of Linux')
@pytest.mark.parametrize('shapes', [
    '[((2, 128, 64, 64), 29, torch.float32, torch.channels_last)]',
    pytest.param('[((2, 256, 64, 64), 29, t, m) for t in (torch.float32, torch.bfloat16) for m in '
                 '(torch.channels_last, torch.contiguous_format)] + [((4, 512, 32, 32), 27, t, torch.channels_last) for t in '
                 '(torch.float32, torch.bfloat16)] + [((2, 64, 128, 128), 31, torch.float32, torch.channels_last)]',
                 marks=pytest.mark.slow)], ids=['one', 'more'])
def test_a_training_step_takes_at_most_twice_torchs_memory(shapes):
    # Every tensor is memory of its own, given back when it is freed.
    printed = isolated(MEMORY.format(shapes=shapes), timeout=300, MALLOC_MMAP_THRESHOLD_='65536')
    ratios = [line for line in printed.splitlines() if line.startswith('ratio ')]
    assert ratios
    for line in ratios:
        assert float(line.split()[1]) <= 2, line


def test_backward_within_autocast_returns():
    isolated("""
import torch
from test_ops import *
x, weight = (t.float().requires_grad_() for t in draw((1, 4, 40, 40), (31, 31), torch.float32, 'channels_last')[:2])
with torch.autocast('cpu', torch.bfloat16):
    depthwise_conv2d(x, weight).sum().backward()
    depthwise_conv2d(x, weight, implementation='channels_last').sum().backward()
assert x.grad.isfinite().all() and weight.grad.isfinite().all()
""", timeout=40)


def test_fewer_threads_are_expected_to_take_longer():
    one, two = (choice.milliseconds(replace(problem(), threads=n)) for n in (1, 2))
    for computation, times in one.items():
        for name, ms in times.items():
            assert 1 < ms / two[computation][name] <= 2.001, (computation, name)
