"""Which implementation runs: forced or chosen, and said once."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import DRAWN, convolutions, draw, fresh  # noqa: F401 (a fixture)

from replk_mm.backbones import RepLKNet
from replk_mm.errors import UserError
from replk_mm.ops import (
    IMPLEMENTATIONS,
    DepthwiseConv2d,
    DepthwiseProblem,
    depthwise,
    depthwise_conv2d,
    force_implementation,
)
from replk_mm.ops.cpu import cost_model, direct, fft

pytestmark = pytest.mark.usefixtures('fresh')
PAIRS = [(computation, name) for computation, names in IMPLEMENTATIONS.items() for name in names]


def problem(
    shape=(2, 4, 12, 12),
    kernel=(9, 9),
    stride=(1, 1),
    padding=None,
    dilation=(1, 1),
    dtype=torch.float32,
    channels_last=False,
    threads=2,
) -> DepthwiseProblem:
    padding = padding or tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
    return DepthwiseProblem(
        shape[0], shape[1], tuple(shape[2:]), kernel, stride, padding, dilation, dtype, channels_last, threads
    )


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
    monkeypatch.setattr(direct, 'native_gradients', spied('native', direct.native_gradients))
    # Where spectra are kept the operator calls these by their own names.
    monkeypatch.setattr(fft, 'forward', spied('fft', fft.forward))
    monkeypatch.setattr(fft, 'gradients', spied('fft', fft.gradients))
    return calls


# forcing


@pytest.mark.parametrize('computation, name', PAIRS)
def test_the_forced_implementation_is_the_one_that_runs(computation, name, used):
    x, weight, _, grad = draw((2, 3, 10, 9), (5, 5))
    others = {
        c: next(n for n in ('native', 'padded', 'grad_kernel') if n in names and n != name)
        for c, names in IMPLEMENTATIONS.items()
    }
    spec = ','.join(f'{c}={n}' for c, n in {**others, computation: name}.items())
    out = depthwise_conv2d(
        x.requires_grad_(computation == 'grad_input'),
        weight.requires_grad_(computation == 'grad_weight'),
        implementation=spec,
    )
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

    chosen = cost_model.choose_plan(problem(x.shape, (5, 5))).forward
    assert runs() == chosen
    monkeypatch.setenv(cost_model.ENVIRONMENT_VARIABLE, 'forward=fft')
    assert runs() == 'fft'
    with force_implementation('padded'):
        assert runs() == 'padded'
        assert runs(implementation='channels_last') == 'channels_last'
        assert runs(implementation='auto') == chosen
        with force_implementation(None):
            assert runs() == 'fft'
        with force_implementation('auto'):
            assert runs() == chosen
        assert runs() == 'padded'
    assert runs() == 'fft'
    used.clear()
    DepthwiseConv2d(2, 5, implementation='native')(x)
    assert used[0] == 'native'


@pytest.mark.parametrize('kwargs', [dict(stride=(2, 2)), dict(dilation=(2, 1)), dict(padding=(9, 9))], ids=str)
def test_inapplicable_implementation_falls_back_to_the_plan(kwargs):
    given_, auto = problem(**kwargs), cost_model.choose_plan(problem(**kwargs))
    for computation, name in PAIRS:
        found = cost_model.choose_plan(given_, f'{computation}={name}')
        applies = name in cost_model.estimate_milliseconds(given_)[computation]
        assert getattr(found, computation) == (name if applies else getattr(auto, computation))
    assert ('fft' in cost_model.estimate_milliseconds(given_)['forward']) == ('padding' in kwargs)
    assert ('padded' in cost_model.estimate_milliseconds(given_)['grad_input']) == ('dilation' in kwargs)


def test_backward_uses_the_plan_of_forward(used):
    x, weight = (t.requires_grad_() for t in draw((1, 2, 8, 8), (5, 5))[:2])
    with force_implementation('forward=fft,grad_input=padded,grad_weight=grad_kernel'):
        out = depthwise_conv2d(x, weight)
    used.clear()
    with force_implementation('native'):
        out.sum().backward()
    assert used == ['padded', 'grad_kernel']


@pytest.mark.parametrize(
    'spec', ['fastest', 'forward=grad_kernel', 'backward=fft', 'fft,=', 'grad_weight=channels_last', ',']
)
def test_bad_names_are_rejected(spec, monkeypatch):
    x, weight = draw((1, 2, 8, 8), (5, 5))[:2]
    message = r'REPLK_MM_DEPTHWISE.*.*forward: native, channels_last, padded, fft; '
    with pytest.raises(ValueError, match=message), force_implementation(spec):
        pytest.fail('the context must not be entered')
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(x, weight, implementation=spec)
    monkeypatch.setenv(cost_model.ENVIRONMENT_VARIABLE, spec)
    with pytest.raises(UserError, match=message) as caught:
        depthwise_conv2d(x, weight)
    assert repr(spec) in str(caught.value)


# choosing


@settings(DRAWN, max_examples=150)
@given(
    convolutions(st.integers(1, 2000)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.integers(1, 64),
)
def test_every_problem_has_a_plan_and_always_the_same(shapes, dtype, channels_last, threads):
    shape, kernel, kwargs = shapes
    given_ = problem(shape, kernel, **kwargs, dtype=dtype, channels_last=channels_last, threads=threads)
    for computation, times in cost_model.estimate_milliseconds(given_).items():
        assert times and set(times) <= set(IMPLEMENTATIONS[computation])
        assert all(0 <= ms < math.inf for ms in times.values())
    found = cost_model.choose_plan(given_)
    cost_model._plan.cache_clear()
    assert (
        cost_model.choose_plan(
            problem(shape, kernel, **kwargs, dtype=dtype, channels_last=channels_last, threads=threads)
        )
        == found
    )
    for computation, name in found._asdict().items():
        assert name in cost_model.estimate_milliseconds(given_)[computation]


@settings(DRAWN, max_examples=100)
@given(convolutions(st.just(1)))
def test_rows_on_the_map_are_counted(shapes):
    shape, kernel, kwargs = shapes
    given_ = problem(shape, kernel, **kwargs)
    step, pad, dilation = kwargs['stride'][0], kwargs['padding'][0], kwargs['dilation'][0]
    rows = F.conv2d(torch.ones(1, 1, *shape[2:]), torch.ones(1, 1, *kernel), None, **kwargs).shape[2]
    met = [0 <= i * step + k * dilation - pad < shape[2] for i in range(rows) for k in range(kernel[0])]
    assert cost_model._rows_inside(given_) == pytest.approx(sum(met) / len(met))


@settings(DRAWN, max_examples=100)
@given(convolutions(st.integers(1, 3)))
def test_shapes_of_a_problem(shapes):
    shape, kernel, kwargs = shapes
    given_ = problem(shape, kernel, **kwargs)
    out = F.conv2d(torch.ones(shape), torch.ones(shape[1], 1, *kernel), None, **kwargs, groups=shape[1])
    assert given_.out == tuple(out.shape[2:]) and given_.macs == out.numel() * math.prod(kernel)
    transform = fft.transform_size(given_)
    for size, k, o, s, p in zip(transform, kernel, given_.out, shape[2:], kwargs['padding'], strict=True):
        assert size % 2 == 0 and size >= s + p
        assert not fft.supports(given_) or max(k, o) <= size


@pytest.fixture
def rates(monkeypatch):
    """A function that replaces the rates of this CPU by those of an instruction set."""

    def use(instructions):
        monkeypatch.setattr(cost_model, '_CPU_RATES', cost_model._RATES[instructions])
        cost_model._plan.cache_clear()

    yield use
    monkeypatch.undo()
    cost_model._plan.cache_clear()


@pytest.mark.parametrize('channels_last', [False, True], ids=['default layout', 'channels_last'])
def test_unknown_cpus_use_torch_except_for_large_kernels(channels_last, rates):
    rates('other')
    for side in (3, 5, 7, 9, 11):
        plan = cost_model.choose_plan(problem((1, 64, 64, 64), (side, side), channels_last=channels_last))
        same_as_native = {'native', 'channels_last' if channels_last else 'padded'}
        assert plan.forward in same_as_native and set(plan[1:]) == {'native'}
    assert set(cost_model.choose_plan(problem((1, 64, 64, 64), (31, 31), channels_last=channels_last))) == {'fft'}


@pytest.mark.parametrize('instructions', ['AVX512', 'AVX2'])
@pytest.mark.parametrize('batch', [1, 2, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_torchs_loop_over_weight_gradients_is_never_chosen_for_replknet(batch, dtype, instructions, rates):
    """It is twenty to fifty times slower than the others, and what training on CPUs would spend its time in."""
    rates(instructions)
    arch = RepLKNet.arch_settings['31B']
    for channels, kernel, size in zip(arch['channels'], arch['large_kernel_sizes'], (128, 64, 32, 16), strict=True):
        for side in (kernel, arch['small_kernel']):
            given_ = problem((batch, channels, size, size), (side, side), dtype=dtype, channels_last=True)
            assert cost_model.choose_plan(given_).grad_weight != 'native', cost_model.estimate_milliseconds(given_)


#: Shape, kernel and dilation in channels-last memory, and measured milliseconds (AVX-512, two threads): forward of
#: channels_last, padded and fft; weight gradient of grad_kernel, grad_kernel_channels_last, fft and native.
MEASURED = [
    ((2, 124, 128, 128), (51, 5), 1, (18.0, 56.4, 32.1), (25.9, 53.3, 28.9, 187)),
    ((2, 124, 128, 128), (5, 51), 1, (16.6, 57.9, 29.5), (37.7, 56.1, 27.8, 678)),
    ((2, 249, 64, 64), (49, 5), 1, (8.1, 15.2, 17.1), (14.1, 17.8, 19.4, 94.5)),
    ((2, 249, 64, 64), (5, 49), 1, (8.9, 14.7, 17.8), (16.6, 16.5, 18.9, 254)),
    ((2, 499, 32, 32), (47, 5), 1, (3.3, 8.4, 9.2), (6.1, 7.6, 11.5, 63.6)),
    ((2, 499, 32, 32), (5, 47), 1, (3.5, 7.8, 10.1), (8.4, 7.1, 10.8, 133)),
    ((2, 998, 16, 16), (13, 5), 1, (0.52, 0.9, 4.2), (0.87, 1.34, 4.7, 24.6)),
    ((2, 998, 16, 16), (5, 13), 1, (0.70, 0.9, 4.2), (0.94, 1.49, 4.6, 22.5)),
    ((2, 80, 128, 128), (3, 3), 2, (0.67, 8.6), (7.6, 5.1, math.inf, 9.5)),
    ((2, 80, 128, 128), (9, 9), 2, (4.3, 11.8), (11.8, 9.3, math.inf, 39.2)),
    ((2, 160, 64, 64), (3, 3), 4, (0.23, 3.6), (3.2, 2.0, math.inf, 3.5)),
    ((2, 160, 64, 64), (7, 7), 2, (0.82, 4.4), (3.7, 2.9, math.inf, 11.1)),
    ((2, 320, 32, 32), (3, 3), 4, (0.16, 1.6), (0.95, 1.45, math.inf, 1.32)),
    ((2, 320, 32, 32), (9, 9), 2, (1.31, 3.2), (1.72, 2.11, math.inf, 7.6)),
    ((2, 640, 16, 16), (3, 3), 7, (0.20, 0.59), (0.60, 0.60, math.inf, 0.63)),
    ((2, 640, 16, 16), (9, 9), 2, (1.05, 0.94), (0.96, 1.01, math.inf, 15.0)),
]


@pytest.mark.parametrize('shape, kernel, dilation, forward, grad_weight', MEASURED)
def test_choices_for_strips_and_dilated_kernels_are_near_the_best(
    shape, kernel, dilation, forward, grad_weight, rates, monkeypatch
):
    rates('AVX512')
    monkeypatch.setattr(direct, 'PADDING_LIMIT', 6)
    monkeypatch.setattr(direct, '_WIDENED', range(12, 15))
    given_ = problem(shape, kernel, dilation=(dilation,) * 2, channels_last=True)
    plan = cost_model.choose_plan(given_)
    times = dict(zip(('channels_last', 'padded', 'fft'), forward, strict=False))
    assert times[plan.forward] <= 1.2 * min(forward)
    times = dict(zip(('grad_kernel', 'grad_kernel_channels_last', 'fft', 'native'), grad_weight, strict=True))
    assert times[plan.grad_weight] <= 1.2 * min(grad_weight)
    assert plan.grad_input == 'channels_last'


#: The same for strips of one pixel and dilation 3, in milliseconds of one thread: weight gradient of grad_kernel,
#: grad_kernel_channels_last and native.
MEASURED_THIN = [
    ((1, 64, 64, 64), (1, 11), 1, (0.80, 0.72, 0.97)),
    ((1, 64, 64, 64), (11, 1), 1, (0.96, 0.92, 0.21)),
    ((1, 64, 64, 64), (1, 7), 1, (0.83, 0.71, 0.74)),
    ((1, 64, 64, 64), (7, 1), 1, (0.82, 0.81, 0.18)),
    ((1, 64, 64, 64), (1, 21), 1, (1.34, 0.81, 5.24)),
    ((1, 64, 64, 64), (21, 1), 1, (1.24, 1.21, 0.34)),
    ((1, 256, 16, 16), (21, 1), 1, (0.38, 0.28, 1.40)),
    ((1, 256, 16, 16), (1, 21), 1, (0.38, 0.23, 1.91)),
    ((1, 160, 32, 32), (1, 11), 1, (0.52, 0.48, 0.61)),
    ((1, 512, 16, 16), (11, 1), 1, (0.85, 0.56, 0.15)),
    ((2, 160, 32, 32), (21, 1), 1, (1.39, 1.52, 0.38)),
    ((2, 512, 16, 16), (1, 21), 1, (2.19, 1.12, 8.46)),
    ((1, 32, 128, 128), (7, 7), 3, (2.98, 1.95, 8.33)),
    ((1, 64, 64, 64), (7, 7), 3, (1.71, 1.06, 3.91)),
    ((1, 160, 32, 32), (7, 7), 3, (1.25, 0.73, 2.39)),
    ((1, 256, 16, 16), (7, 7), 3, (0.78, 0.34, 3.51)),
    ((2, 512, 16, 16), (7, 7), 3, (3.16, 1.34, 14.96)),
]


@pytest.mark.parametrize('shape, kernel, dilation, grad_weight', MEASURED_THIN)
def test_choices_for_strips_of_one_pixel_and_dilation_3_are_near_the_best(shape, kernel, dilation, grad_weight, rates):
    rates('AVX512')
    given_ = problem(shape, kernel, dilation=(dilation,) * 2, channels_last=True, threads=1)
    plan = cost_model.choose_plan(given_)
    times = dict(zip(('grad_kernel', 'grad_kernel_channels_last', 'native'), grad_weight, strict=True))
    assert times[plan.grad_weight] <= 1.15 * min(grad_weight)
    assert plan[:2] == ('channels_last', 'channels_last') or plan == cost_model.NATIVE and given_.macs < 2e6
