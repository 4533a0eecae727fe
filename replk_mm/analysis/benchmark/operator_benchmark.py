"""Speed of the depthwise convolution beside torch's own: its three computations and a training step."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.analysis.benchmark.case import OURS, PLAIN, PLAIN_CHANNELS_LAST
from replk_mm.analysis.benchmark.numerical_difference import TOLERANCES, compare_outputs
from replk_mm.analysis.gpu import DTYPES, PRECISION_NOTE, matmul_precision
from replk_mm.analysis.timing import (
    CUDA_EVENTS,
    Call,
    copy_gbytes,
    matmul_gflops,
    memory_growth,
    print_progress,
    time_interleaved,
)
from replk_mm.errors import UserError
from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d, DepthwiseProblem
from replk_mm.ops.cpu.cost_model import choose_plan
from replk_mm.ops.cpu.problem import Pair

#: Timed computations, with the number of convolutions in each.
COMPUTATIONS = {'forward': 1, 'grad_input': 1, 'grad_weight': 1, 'step': 3}


def format_kernel(kernel: Sequence[int]) -> str:
    """Height and width as text, ``'51x5'``."""
    return 'x'.join(map(str, kernel))


@dataclass(frozen=True)
class LayerShape:
    """A depthwise layer and its input."""

    kernel: Pair  #: height and width in pixels
    size: int  #: side of the map in pixels
    channels: int  #: channels of input and output
    batch: int  #: number of images
    stride: int = 1  #: in pixels

    @property
    def out_size(self) -> int:
        """Side of the output in pixels, with padding of half the kernel, which is odd."""
        return (self.size - 1) // self.stride + 1

    def gflop(self, computation: str) -> float:
        """10^9 operations of a computation; a multiply-add is two, and zeros of the padding count."""
        convolution = 2 * self.batch * self.channels * self.out_size**2 * math.prod(self.kernel)
        return COMPUTATIONS[computation] * convolution / 1e9

    def gbytes(self, computation: str, itemsize: int) -> float:
        """10^9 bytes that a computation needs to move if each convolution reads or writes each of its tensors once.

        Every convolution moves three tensors: input, output (or their gradients) and weight, of ``itemsize`` bytes per
        element.
        """
        maps = self.batch * (self.size**2 + self.out_size**2)
        return COMPUTATIONS[computation] * itemsize * self.channels * (maps + math.prod(self.kernel)) / 1e9

    def __str__(self) -> str:
        return f'{format_kernel(self.kernel)} on {self.batch}x{self.channels}x{self.size}x{self.size}'


def benchmark_operator(
    shapes: Sequence[LayerShape],
    dtypes: Sequence[str] = ('float32',),
    implementations: Sequence[str] = (),
    device: str = 'cpu',
    repeats: int = 15,
    warmup: int = 2,
    seconds: float = 2.0,
    limit: float = math.inf,
    save: Callable[[dict], object] = lambda record: None,
) -> dict:
    """Measure the depthwise convolution at several shapes.

    Args:
        shapes: Layers and inputs.
        dtypes: Precisions in :data:`replk_mm.analysis.gpu.DTYPES`, of plain torch too.
        implementations: Names in :data:`replk_mm.ops.IMPLEMENTATIONS` to measure in rows of their own, where they
            apply.
        device: ``'cpu'`` or ``'cuda'``.
        repeats: Largest number of measured rounds.
        warmup: Largest number of warm-up rounds.
        seconds: Time budget of each shape, precision and computation.
        limit: Seconds after which no further shape starts.
        save: Called with the unfinished result after each shape and precision.

    Returns:
        Plain data: the speed of a matrix product and of a copy, and a point for each shape, precision and computation
        with one row per implementation. Shapes that do not fit into the memory of the GPU are among the notes.

    Raises:
        UserError: If an implementation does not exist, or a kernel is even.
    """
    known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
    for name in implementations:
        if name not in known:
            raise UserError(
                f'--implementations {name}: there is no such implementation\nChoose from {", ".join(known)}.'
            )
    for shape in shapes:
        if any(side % 2 == 0 for side in shape.kernel):
            raise UserError(
                f'--kernels {format_kernel(shape.kernel)}: an even kernel would change the size of the map\n'
                'Use odd kernels.'
            )
    notes = [
        "plain torch: nn.Conv2d on tensors in torch's default memory layout; ours: on tensors "
        + ('in channels-last memory, as in the backbones' if device == 'cpu' else 'in the same layout')
    ]
    if implementations and device != 'cpu':
        notes.append("--implementations: on CPUs only; elsewhere all of them are torch's own")
        implementations = ()
    if device != 'cpu':
        notes += [f'clock: {CUDA_EVENTS}; each call finds an empty L2 cache', PRECISION_NOTE]
    begin, rooflines = time.monotonic(), dict[str, float]()
    for dtype in dtypes:
        print_progress(f'matrix product, {dtype}')
        with matmul_precision(dtype):
            rooflines[dtype] = matmul_gflops(DTYPES[dtype], device)
    copied = copy_gbytes(device)
    record: dict[str, Any] = dict(
        what='op',
        device=device,
        dtype=dtypes[0],
        dtypes=list(dtypes),
        matrix_product_gflops=rooflines[dtypes[0]],
        matrix_products_gflops=rooflines,
        copy_gbytes_per_second=copied,
        notes=notes,
        points=[],
        settings=dict(repeats=repeats, warmup=warmup, seconds=seconds, implementations=list(implementations)),
    )
    for i, (shape, dtype) in enumerate(product(shapes, dtypes)):
        if time.monotonic() - begin > limit:
            notes.append(
                f'{len(shapes) * len(dtypes) - i} not measured for lack of time: {shape}, {dtype} and all after it'
            )
            break
        print_progress(f'{shape}, {dtype}')
        try:
            with matmul_precision(dtype):
                points = _measure_layer(shape, dtype, implementations, device, repeats, warmup, seconds)
        except torch.cuda.OutOfMemoryError:
            notes.append(f'{shape}, {dtype}: not measured: out of memory')
            points = []
        for point in points:
            for row in point['rows']:
                row['of_matrix_product'] = row['gflops'] / rooflines[dtype]
                row['of_copy'] = row['gbytes_per_second'] / copied
        record['points'] += points
        save(record)
    return record


def _measure_layer(
    shape: LayerShape,
    dtype: str,
    implementations: Sequence[str],
    device: str,
    repeats: int,
    warmup: int,
    seconds: float,
) -> list[dict]:
    """A point for each computation."""
    points = []
    layers = dict(_build_layers(shape, dtype, implementations, device))
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator, device=device)
    inputs = {name: _to_layout(x.to(DTYPES[dtype]), name) for name in layers}
    outputs = {name: _outputs_and_gradients(layer, inputs[name]) for name, layer in layers.items()}
    for computation in COMPUTATIONS:
        calls = {
            name: _computation_call(layer, inputs[name], computation)
            for name, layer in layers.items()
            if _uses_its_implementation(layer, inputs[name], computation)
        }
        timings = time_interleaved(calls, repeats, warmup, seconds, device=device, events=device != 'cpu')
        parts = [part for part in COMPUTATIONS if part != 'step' and computation in (part, 'step')]
        reference = {part: outputs[PLAIN][part] for part in parts}
        gflop, gbytes = shape.gflop(computation), shape.gbytes(computation, DTYPES[dtype].itemsize)
        rows = []
        for name, samples in timings.milliseconds.items():
            difference = None if name == PLAIN else compare_outputs(reference, outputs[name])
            median = timings.summary(name).median
            rows.append(
                dict(
                    name=name,
                    milliseconds=asdict(timings.summary(name)),
                    samples=samples,
                    unreliable=timings.problem(name),
                    times_as_fast=asdict(timings.speedup(name, PLAIN)),
                    gflops=1e3 * gflop / median,
                    gbytes_per_second=1e3 * gbytes / median,
                    # On CPUs this would need a process of its own.
                    memory_bytes=None if device == 'cpu' else memory_growth(calls[name], device),
                    difference=difference and difference.relative,
                    equal=difference and difference.within(TOLERANCES['inference', dtype]),
                )
            )
        points.append(
            dict(
                asdict(shape),
                dtype=dtype,
                computation=computation,
                gflop=gflop,
                gbytes=gbytes,
                rounds=timings.rounds,
                warmup=timings.warmup,
                load=timings.load,
                clock=timings.clock,
                rows=rows,
                chosen=str(choose_plan(_problem(layers[OURS], inputs[OURS]))) if device == 'cpu' else None,
            )
        )
    return points


def _build_layers(
    shape: LayerShape, dtype: str, implementations: Sequence[str], device: str
) -> Iterator[tuple[str, nn.Conv2d]]:
    """torch's layer, on GPUs for both layouts, ours, and ours with each forced implementation; all share one weight."""
    torch.manual_seed(0)
    plain = nn.Conv2d(
        shape.channels,
        shape.channels,
        shape.kernel,
        shape.stride,
        (shape.kernel[0] // 2, shape.kernel[1] // 2),
        groups=shape.channels,
        bias=False,
    ).to(device, DTYPES[dtype])
    yield PLAIN, plain
    if device != 'cpu':
        yield PLAIN_CHANNELS_LAST, plain
    for name in (None, *implementations):
        ours = DepthwiseConv2d(shape.channels, shape.kernel, shape.stride, bias=False, implementation=name)
        ours.weight = plain.weight
        yield f'{OURS}, {name}' if name else OURS, ours


def _to_layout(x: Tensor, name: str) -> Tensor:
    """Default layout for plain torch and for ours on GPUs, channels-last otherwise."""
    channels_last = name == PLAIN_CHANNELS_LAST or (name != PLAIN and x.device.type == 'cpu')
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _problem(layer: Any, x: Tensor) -> DepthwiseProblem:
    return DepthwiseProblem.of(x, layer.weight, layer.stride, layer.padding, layer.dilation)


def _uses_its_implementation(layer: nn.Conv2d, x: Tensor, computation: str) -> bool:
    """Whether a forced implementation runs in a computation, or in any of a step; true if none is forced."""
    forced = getattr(layer, 'implementation', None)
    if forced is None:
        return True
    used = choose_plan(_problem(layer, x), forced)._asdict()
    return forced in (used.values() if computation == 'step' else [used[computation]])


def _computation_call(layer: nn.Conv2d, x: Tensor, computation: str) -> Call:
    layer, x = copy.deepcopy(layer), x.detach()
    x.requires_grad_(computation in ('grad_input', 'step'))
    layer.requires_grad_(computation in ('grad_weight', 'step'))
    wanted = [tensor for tensor in (x, layer.weight) if tensor.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    if computation == 'forward':
        return forward
    grad = torch.randn_like(forward())
    if computation == 'step':
        return lambda: torch.autograd.grad(layer(x), wanted, grad)
    out = layer(x)
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def _outputs_and_gradients(layer: nn.Conv2d, x: Tensor) -> dict[str, Tensor]:
    """Output and both gradients by name of the computation, for comparison."""
    x = x.detach().requires_grad_()
    out = layer(x)
    generator = torch.Generator(x.device).manual_seed(2)
    grad = torch.randn(out.shape, generator=generator, device=x.device).to(out)
    grad_input, grad_weight = torch.autograd.grad(out, (x, layer.weight), grad)
    return {'forward': out.detach(), 'grad_input': grad_input, 'grad_weight': grad_weight}
