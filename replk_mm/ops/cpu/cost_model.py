"""Choice of the implementation: forced by name, or the one that a cost model expects to be fastest.

The model uses rates measured on one machine (two cores, torch 2.13), once with AVX-512 and once limited to AVX2. Only
their ratios matter, and they differ little between machines with the same instruction set. It is a formula instead of a
trial at run time, so that equal shapes always use the same implementation: a resumed run is bit-identical to an
uninterrupted one.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from mmengine.logging import print_log

from replk_mm.errors import UserError
from replk_mm.ops.cpu import direct, fft
from replk_mm.ops.cpu.problem import DepthwiseProblem

#: Names of the implementations for the output and for each gradient.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    'forward': ('native', 'channels_last', 'padded', 'fft'),
    'grad_input': ('native', 'channels_last', 'padded', 'fft'),
    'grad_weight': ('native', 'grad_kernel', 'grad_kernel_channels_last', 'fft'),
}
#: Environment variable that forces implementations, such as ``fft`` or ``forward=fft,grad_weight=native``.
ENVIRONMENT_VARIABLE = 'REPLK_MM_DEPTHWISE'

_forced: ContextVar[str | None] = ContextVar('replk_mm_depthwise', default=None)


class Plan(NamedTuple):
    """Names of the chosen implementations."""

    forward: str  #: implementation for the output
    grad_input: str  #: implementation for the gradient of the input
    grad_weight: str  #: implementation for the gradient of the weight

    def __str__(self) -> str:
        return f'forward {self.forward}, input gradient {self.grad_input}, weight gradient {self.grad_weight}'


NATIVE = Plan('native', 'native', 'native')
#: Multiply-accumulates below which a call takes longer than the arithmetic.
_SMALL = 2e6


@contextmanager
def force_implementation(spec: str | None) -> Iterator[None]:
    """Force implementations in this thread and context.

    Args:
        spec: A name in :data:`IMPLEMENTATIONS`, for every computation that has it; a list such as
            ``'forward=fft,grad_weight=native'``; ``'auto'`` for the choice of the cost model; or None for the
            environment variable. With gradient checkpointing, the backward pass must be in the context too.

    Raises:
        ValueError: If a name is unknown.
    """
    _parse(spec or '')
    token = _forced.set(spec)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_plan(problem: DepthwiseProblem, spec: str | None = None, cached: bool = False) -> Plan:
    """Return the implementations for a convolution.

    ``spec`` takes precedence over :func:`force_implementation`, which takes precedence over the environment variable.
    The cost model chooses if nothing is forced, or if the forced one does not apply, such as FFTs with a stride.

    Args:
        problem: The convolution.
        spec: See :func:`force_implementation`.
        cached: Whether the spectra of the kernels are cached between calls.

    Raises:
        ValueError: If ``spec`` or :func:`force_implementation` has an unknown name.
        UserError: If the environment variable has one.
    """
    spec = spec or _forced.get()
    if spec:
        return _plan(problem, spec, cached)
    try:
        return _plan(problem, os.environ.get(ENVIRONMENT_VARIABLE, ''), cached)
    except ValueError as error:
        raise UserError(f'environment: {error}') from error


def _is_small(problem: DepthwiseProblem) -> bool:
    """Whether calls take longer than the arithmetic, so that torch's own operator is the fastest."""
    return (
        problem.macs < _SMALL
        and problem.channels_last
        and problem.dtype == torch.float32
        and problem.dilation == (1, 1)
        and max(problem.padding) <= direct.PADDING_LIMIT
    )


@cache
def _plan(problem: DepthwiseProblem, spec: str, cached: bool) -> Plan:
    forced, expected = _parse(spec), estimate_milliseconds(problem, cached)
    chosen: dict[str, str] = {}
    for computation in ('forward', 'grad_weight', 'grad_input'):
        times = dict(expected[computation])
        if computation == 'grad_input' and chosen['grad_weight'] == 'fft' and 'fft' in times:
            times['fft'] -= _transform(problem, problem.out)  # reuses the spectrum of the output's gradient
        name = forced.get(computation, '')
        chosen[computation] = name if name in times else min(times, key=times.__getitem__)
    found = Plan(**chosen)
    if not forced and found.grad_weight == 'native' and _is_small(problem):
        found = NATIVE
    decision = problem.kernel, problem.dtype, problem.channels_last, found
    if decision not in _announced:  # log each decision once
        _announced.add(decision)
        why = (
            spec
            if forced
            else 'expected ms '
            + '; '.join(
                f'{name.replace("grad_", "gradient of the ")} {_table(times)}' for name, times in expected.items()
            )
        )
        print_log(f'depthwise convolution {problem}: {found} ({why})', 'current', logging.DEBUG)
    return found


#: Logged decisions: kernel, dtype, layout and plan.
_announced: set[tuple] = set()


def _table(times: dict[str, float]) -> str:
    return ', '.join(f'{name} {ms:.2f}' for name, ms in sorted(times.items(), key=lambda item: item[1]))


def _parse(spec: str) -> dict[str, str]:
    if spec in ('', 'auto'):
        return {}
    forced: dict[str, str] = {}
    for part in spec.split(','):
        computation, equals, name = (text.strip() for text in part.partition('='))
        if not equals:
            name = computation
        concerned = [c for c in IMPLEMENTATIONS if (not equals or c == computation) and name in IMPLEMENTATIONS[c]]
        if not concerned:
            raise ValueError(
                f'{ENVIRONMENT_VARIABLE} (or implementation=): {spec!r} is unknown; use auto, a name, or '
                f'COMPUTATION=NAME,... of ' + '; '.join(f'{c}: {", ".join(n)}' for c, n in IMPLEMENTATIONS.items())
            )
        forced.update(dict.fromkeys(concerned, name))
    return forced


# The cost model, for two threads: arithmetic in GFLOP/s (a multiply-add is two operations), copies in GB/s of the
# tensor, transforms in picoseconds times S^2 log2 S^2.

_RATES: dict[str, dict[str, dict[int, float]]] = {  # by instruction set, and by kernel side; the last applies above it
    'AVX512': {
        'channels_last': {1: 15, 3: 45, 5: 85, 7: 110, 9: 110, 11: 85, 13: 44, 15: 140, 21: 150},
        'padded': {1: 10, 3: 28, 5: 66, 7: 93, 9: 118, 11: 130, 13: 150, 15: 122, 21: 130, 31: 143},
        'grad_kernel': {1: 10, 3: 30, 5: 55, 7: 73, 9: 100, 11: 120, 13: 110, 15: 97},
        'grad_kernel_channels_last': {1: 10, 3: 40, 5: 70, 7: 75, 11: 80, 13: 85, 15: 90, 21: 118, 31: 115},
        'native grad_input': {1: 10, 3: 25, 5: 55, 7: 80, 9: 96, 11: 102, 21: 110, 27: 125},
        'native grad_input channels_last': {1: 10, 3: 45, 5: 75, 7: 98, 11: 102},
        'native grad_weight': {1: 10, 3: 35, 4: 3, 9: 5},
        'native grad_weight channels_last': {1: 20, 3: 50, 4: 5, 5: 5.5, 7: 9, 9: 12, 13: 10, 15: 2.5},
        'dilated': {
            1: 5
        },  # its loop for the weight gradient of dilated kernels, and for their output with large padding
        'reference': {1: 4},  # the loop that torch's convolution uses in the default layout with large padding
        'thin grad_kernel': {1: 2.5},  # times as long as others: strips of one pixel, and dilation 3
        'transform': {1: 118},
        'inverse_transform': {1: 150},
    },
    'AVX2': {
        'channels_last': {1: 15, 3: 40, 5: 60, 7: 63, 9: 68, 17: 70, 21: 66, 29: 62, 31: 46},
        'padded': {1: 10, 3: 28, 5: 56, 7: 84, 9: 90, 13: 92, 15: 99, 21: 103, 31: 108},
        'grad_kernel': {1: 10, 3: 21, 5: 38, 7: 58, 9: 69, 13: 75, 15: 80, 21: 84, 31: 94},
        'grad_kernel_channels_last': {1: 10},  # compiled at the first call: up to eight seconds, for one shape
        'native grad_input': {1: 10, 3: 23, 5: 48, 7: 70, 9: 80, 13: 95, 17: 102, 31: 106},
        'native grad_input channels_last': {1: 10, 3: 37, 5: 46, 7: 66, 9: 70, 13: 76},
        'native grad_weight': {1: 10, 3: 25, 4: 4, 9: 5},
        'native grad_weight channels_last': {1: 20, 3: 25, 4: 8, 11: 11, 13: 8, 15: 2.5},
        'dilated': {1: 5},
        'reference': {1: 4},
        'thin grad_kernel': {1: 1},
        'transform': {1: 118},
        'inverse_transform': {1: 100},
    },
    # Not measured: torch's own kernels, and FFTs where they win by arithmetic even if a library without MKL runs them.
    'other': {
        **dict.fromkeys(('channels_last', 'padded'), {1: 30}),
        **dict.fromkeys(('grad_kernel', 'grad_kernel_channels_last'), {1: 10}),
        **dict.fromkeys(('native grad_input', 'native grad_input channels_last'), {1: 40}),
        **dict.fromkeys(('native grad_weight', 'native grad_weight channels_last'), {1: 40}),
        'dilated': {1: 40},
        'reference': {1: 30},
        'thin grad_kernel': {1: 1},
        'transform': {1: 350},
        'inverse_transform': {1: 480},
    },
}
_CAPABILITY = 'AVX512' if direct.AVX512 else torch.backends.cpu.get_cpu_capability()
_CPU_RATES = _RATES.get(_CAPABILITY, _RATES['other'])
_TRANSPOSE, _COPY = 3.5, 20.0
#: For strips and dilated kernels: copies of up to so many bytes from channels-last memory, in the cache, and their
#: GB/s; time of FFTs relative to the rates above.
_CACHED_BYTES, _CACHED_TRANSPOSE, _STRIP_TRANSFORM = 5e6, 12.0, 0.85
#: Milliseconds of one call of a torch operator; a block of spectra needs a dozen.
_CALL = 0.006
#: Threads speed up arithmetic linearly, copies by their number to this power (1.6 for two), and calls not at all.
_COPIES_SCALE = 0.7


def _rate(table: str, side: int) -> float:
    known = _CPU_RATES[table]
    below = max((k for k in known if k <= side), default=min(known))
    above = min((k for k in known if k >= side), default=below)
    if below == above:
        return known[below]
    share = (side - below) / (above - below)
    return known[below] * (1 - share) + known[above] * share


def _bytes(problem: DepthwiseProblem, size: tuple[int, int]) -> int:
    return problem.batch * problem.channels * size[0] * size[1] * problem.dtype.itemsize


def _copied(problem: DepthwiseProblem, size: tuple[int, int], gigabytes: float) -> float:
    return _bytes(problem, size) / gigabytes * 1e-6 * (2 / problem.threads) ** _COPIES_SCALE


def _transposed(problem: DepthwiseProblem, size: tuple[int, int]) -> float:
    return _copied(problem, size, _TRANSPOSE)


def _gathered(problem: DepthwiseProblem, size: tuple[int, int]) -> float:
    return _copied(problem, size, _CACHED_TRANSPOSE if _bytes(problem, size) <= _CACHED_BYTES else _TRANSPOSE)


def _transform(problem: DepthwiseProblem, area: tuple[int, int], table: str = 'transform') -> float:
    """Return the milliseconds of the transforms of all maps, including the copy of their ``area``."""
    pixels = math.prod(fft.transform_size(problem))
    maps = problem.batch * problem.channels
    blocks = 4 * maps * pixels / fft.BLOCK_BYTES
    copied = _copied(problem, area, _TRANSPOSE if problem.channels_last else _COPY)
    short = 1 + 20 / math.sqrt(pixels)  # short transforms are less efficient
    work = maps * pixels * math.log2(pixels) * short * _rate(table, 1) * 1e-9 * 2 / problem.threads
    strip = 1.0 if problem.kernel[0] == problem.kernel[1] else _STRIP_TRANSFORM
    return strip * (work + copied + (1 + blocks) * 4 * _CALL)


def _rows_inside(problem: DepthwiseProblem) -> float:
    """Return the share of kernel rows inside the map; oneDNN's channels-last kernels skip rows in the padding."""
    (height, _), (kernel, _), (stride, _), (padding, _), (dilation, _) = (
        problem.size,
        problem.kernel,
        problem.stride,
        problem.padding,
        problem.dilation,
    )
    rows = problem.out[0]
    # Tap k is inside the map for the outputs i with 0 <= i * stride + k * dilation - padding < height.
    met = sum(
        max(
            0,
            min(rows - 1, (height - 1 - k * dilation + padding) // stride)
            - max(0, -((k * dilation - padding) // stride))
            + 1,
        )
        for k in range(kernel)
    )
    return met / (rows * kernel)


def estimate_milliseconds(problem: DepthwiseProblem, cached: bool = False) -> dict[str, dict[str, float]]:
    """Return the expected milliseconds of each implementation, with a core for each thread."""
    side = round(math.sqrt(math.prod(problem.kernel)))
    square = problem.kernel[0] == problem.kernel[1] and problem.dilation == (1, 1)
    work = 2e-6 * problem.macs * 2 / problem.threads
    last = problem.channels_last
    to_padded = (_transposed(problem, problem.size) + _transposed(problem, problem.out)) if last else 0.0
    to_last = 0.0 if last else _transposed(problem, problem.size) + _transposed(problem, problem.out)
    filled = _copied(problem, problem.size, _COPY) if direct.writes_padding(problem.padding, problem.stride) else 0.0

    rings, pads = direct.rings(problem), direct.pads_dilated(problem)
    area = math.prod(15 if ring else k for ring, k in zip(rings, problem.kernel, strict=True))
    grown, wide = area / math.prod(problem.kernel), round(math.sqrt(area))
    inside = _rows_inside(problem)
    forward = {
        'channels_last': work * grown * inside / _rate('channels_last', wide)
        + to_last
        + (2 * _copied(problem, problem.size, _COPY) if pads else 0.0),
        'padded': work / _rate('padded', side) + to_padded + filled,
    }
    # torch's plain convolution uses one of these two; in the default layout only with little padding.
    slow = not last and problem.padding[1] > direct.PADDING_LIMIT
    loop = work / _rate('dilated', 1) if last and problem.dilation != (1, 1) else 0.0
    forward['native'] = 1e-3 + (
        loop
        if last and pads
        else work * inside / _rate('channels_last', problem.kernel[1] if any(rings) else side)
        if last
        else work / _rate('reference', 1)
        if slow
        else forward['padded']
    )
    gradient = direct.input_gradient_problem(problem)
    suffix = ' channels_last' if last else ''
    grad_input = dict(native=work / _rate(f'native grad_input{suffix}', side))
    if last and not square:  # never faster
        grad_input['native'] = max(grad_input['native'], loop, forward['channels_last'] + 1e-3)
    if gradient is not None:
        grad_input.update(channels_last=forward['channels_last'], padded=forward['padded'])
    arranged, calls = 1.7 * _transposed(problem, problem.out), problem.batch * 16 * _CALL
    if not square:
        size, out = (_gathered(problem, area) for area in (problem.size, problem.out))
        to_padded = size + out if last else 0.0
        filled = size if direct.writes_padding(problem.padding, problem.dilation) else 0.0
        # This one skips no rows, and outputs of strips fill its registers badly.
        inside, arranged, calls = 1.3 if problem.dilation == (1, 1) else 1.0, 1.7 * out, 2 * calls
    thin = not square and (min(problem.kernel) == 1 or problem.dilation[1] == 3)
    # torch's loop goes along rows. Columns are as fast as squares of 3x3, unless they are higher than the map.
    width = problem.kernel[1]
    if width == 1:
        width = min(side, 3) if problem.kernel[0] <= problem.size[0] else 15
    grad_weight = dict(
        native=max(work / _rate(f'native grad_weight{suffix}', width), loop),
        grad_kernel=(work / _rate('grad_kernel', side) + to_padded + filled)
        * (_rate('thin grad_kernel', 1) if thin else 1.0),
        # The output's gradient is rearranged twice: here if it is in channels-last memory, and by oneDNN.
        grad_kernel_channels_last=work * inside / _rate('grad_kernel_channels_last', side) + calls + arranged,
    )
    if fft.supports(problem):
        kernels = math.prod(fft.transform_size(problem)) * problem.channels
        kernels_ms = (
            kernels
            * math.log2(max(2, kernels / problem.channels))
            * _rate('transform', 1)
            * 0.65e-9
            * 2
            / problem.threads
        )
        back, there = _transform(problem, problem.out, 'inverse_transform'), _transform(problem, problem.size)
        forward['fft'] = there + back + (0 if cached else kernels_ms)
        grad_input['fft'] = there + back + kernels_ms
        grad_weight['fft'] = there + _transform(problem, problem.out) + kernels_ms
    return {'forward': forward, 'grad_input': grad_input, 'grad_weight': grad_weight}
