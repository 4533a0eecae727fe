"""The depthwise convolution in processes of its own: what could hang, forks, or takes memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ops_cases import SPECS, fresh  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('fresh')]


def isolated(code: str, timeout: float = 200, **environment: str) -> str:
    """What a new Python prints that runs ``code``."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([root, str(Path(__file__).parents[1] / 'helpers')]),
        'OMP_NUM_THREADS': '2',
        **environment,
    }
    try:
        done = subprocess.run(
            [sys.executable, '-c', code], env=environment, timeout=timeout, text=True, capture_output=True
        )
    except subprocess.TimeoutExpired as expired:
        printed = (expired.stdout or b'').decode().splitlines() or ['nothing']
        pytest.fail(f'does not return; printed last: {printed[-1]}')
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


HANGS = """
import torch
from ops_cases import *
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


@pytest.mark.parametrize('specs', [SPECS], ids=['all'])
def test_bfloat16_with_few_channels_returns(specs):
    isolated(HANGS.format(specs=specs), timeout=60 * len(specs))


def test_gradients_of_gradients_in_bfloat16_with_few_channels_return():
    isolated("""
import torch
import torch.nn.functional as F
from ops_cases import *
torch.manual_seed(0)
tensors = draw((1, 4, 40, 40), (31, 31), torch.bfloat16, 'channels_last')

def twice(x, weight, convolve):
    first, = torch.autograd.grad(convolve(x, weight).square().sum() / 961, x, create_graph=True)
    return torch.autograd.grad((first.contiguous(memory_format=CHANNELS_LAST) * tensors[3]).sum(), (x, weight))

expected = twice(*(t.double().requires_grad_() for t in tensors[:2]), lambda x, w: F.conv2d(x, w, padding=15, groups=4))
for spec in ('auto', 'native', 'fft'):
    print(spec, flush=True)
    found = twice(*(t.clone().requires_grad_() for t in tensors[:2]),
                  lambda x, w: depthwise_conv2d(x, w, implementation=spec))
    for a, b in zip(found, expected):
        assert (a - b).abs().max() <= 4e-2 * b.abs().max()
""")


def test_after_a_fork():
    """In a forked process that has two threads, and in the workers of a loader, which have one."""
    printed = isolated("""
import os, torch
from torch.utils.data import DataLoader
from replk_mm.ops import depthwise_conv2d
from replk_mm.ops.cpu import fft, threads
from ops_cases import *
fft.MIN_PIXELS_FOR_THREADS = 0
torch.manual_seed(0)
tensors = draw((2, 4, 12, 12), (9, 9))
expected = ours(*tensors, 'fft')
assert len(threads._pools) == 1

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
    same = torch.get_num_threads() == 2 and all(map(torch.equal, found, expected)) and len(threads._pools) == 2
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
for batch in DataLoader(Data(), batch_size=2, num_workers=2, multiprocessing_context='fork', timeout=50):
    assert_close([batch[0], batch[1]], [expected[0].double()] * 2, 1e-5)
print('both')
""")
    assert printed.splitlines()[-1] == 'both'


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

TYPES = (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
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
@pytest.mark.parametrize(
    'shapes',
    [
        '[((2, 128, 64, 64), 29, torch.float32, torch.channels_last)]',
        pytest.param(
            # Without bfloat16 instructions ours computes in float32: memory of float32, up to 2.2 times torch's, whose
            # own step takes minutes.
            '[((2, 256, 64, 64), 29, t, m) for m in (torch.channels_last, torch.contiguous_format) for t in TYPES]'
            ' + [((4, 512, 32, 32), 27, t, torch.channels_last) for t in TYPES]'
            ' + [((2, 64, 128, 128), 31, torch.float32, torch.channels_last)]',
            marks=pytest.mark.slow,
        ),
    ],
    ids=['one', 'more'],
)
def test_a_training_step_takes_at_most_twice_torchs_memory(shapes):
    # Every tensor is memory of its own, given back when it is freed.
    printed = isolated(MEMORY.format(shapes=shapes), timeout=300, MALLOC_MMAP_THRESHOLD_='65536')
    ratios = [line for line in printed.splitlines() if line.startswith('ratio ')]
    assert ratios
    for line in ratios:
        assert float(line.split()[1]) <= 2, line
