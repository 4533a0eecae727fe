"""Speed of the depthwise convolution beside torch's own: its three computations and a training step."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.analysis.benchmark.case import OURS, PLAIN
from replk_mm.analysis.benchmark.numerical_difference import TOLERANCES, compare_outputs
from replk_mm.analysis.timing import Call, matmul_gflops, print_progress, time_interleaved
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

    def __str__(self) -> str:
        return f'{format_kernel(self.kernel)} on {self.batch}x{self.channels}x{self.size}x{self.size}'


def benchmark_operator(
    shapes: Sequence[LayerShape],
    dtype: str = 'float32',
    implementations: Sequence[str] = (),
    device: str = 'cpu',
    repeats: int = 15,
    warmup: int = 2,
    seconds: float = 2.0,
) -> dict:
    """Measure the depthwise convolution at several shapes.

    Args:
        shapes: Layers and inputs.
        dtype: ``'float32'`` or ``'bfloat16'``, of plain torch too.
        implementations: Names in :data:`replk_mm.ops.IMPLEMENTATIONS` to measure in rows of their own, where they
            apply.
        device: ``'cpu'`` or ``'cuda'``.
        repeats: Largest number of measured rounds.
        warmup: Largest number of warm-up rounds.
        seconds: Time budget of each shape and computation.

    Returns:
        Plain data: the speed of a matrix product, and a point for each shape and computation with one row per
        implementation.

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
    print_progress(f'matrix product, {dtype}')
    roofline = matmul_gflops(getattr(torch, dtype), device)
    points = []
    for shape in shapes:
        print_progress(str(shape))
        layers = dict(_build_layers(shape, dtype, implementations, device))
        x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=torch.Generator().manual_seed(1))
        inputs = {name: _to_layout(x.to(device, getattr(torch, dtype)), name) for name in layers}
        outputs = {name: _outputs_and_gradients(layer, inputs[name]) for name, layer in layers.items()}
        for computation in COMPUTATIONS:
            calls = {
                name: _computation_call(layer, inputs[name], computation)
                for name, layer in layers.items()
                if _uses_its_implementation(layer, inputs[name], computation)
            }
            timings = time_interleaved(calls, repeats, warmup, seconds)
            parts = [part for part in COMPUTATIONS if part != 'step' and computation in (part, 'step')]
            reference = {part: outputs[PLAIN][part] for part in parts}
            rows = []
            for name, samples in timings.milliseconds.items():
                difference = None if name == PLAIN else compare_outputs(reference, outputs[name])
                gflops = 1e3 * shape.gflop(computation) / timings.summary(name).median
                rows.append(
                    dict(
                        name=name,
                        milliseconds=asdict(timings.summary(name)),
                        samples=samples,
                        unreliable=timings.problem(name),
                        times_as_fast=asdict(timings.speedup(name, PLAIN)),
                        gflops=gflops,
                        of_matrix_product=gflops / roofline,
                        difference=difference and difference.relative,
                        equal=difference and difference.within(TOLERANCES['inference', dtype]),
                    )
                )
            points.append(
                dict(
                    asdict(shape),
                    computation=computation,
                    gflop=shape.gflop(computation),
                    rounds=timings.rounds,
                    warmup=timings.warmup,
                    load=timings.load,
                    rows=rows,
                    chosen=str(choose_plan(_problem(layers[OURS], inputs[OURS]))) if device == 'cpu' else None,
                )
            )
    return dict(
        what='op',
        dtype=dtype,
        matrix_product_gflops=roofline,
        notes=notes,
        points=points,
        settings=dict(repeats=repeats, warmup=warmup, seconds=seconds, implementations=list(implementations)),
    )


def _build_layers(
    shape: LayerShape, dtype: str, implementations: Sequence[str], device: str
) -> Iterator[tuple[str, nn.Conv2d]]:
    """torch's layer, ours, and ours with each forced implementation; all share one weight."""
    torch.manual_seed(0)
    plain = nn.Conv2d(
        shape.channels,
        shape.channels,
        shape.kernel,
        shape.stride,
        (shape.kernel[0] // 2, shape.kernel[1] // 2),
        groups=shape.channels,
        bias=False,
    ).to(device, getattr(torch, dtype))
    yield PLAIN, plain
    for name in (None, *implementations):
        ours = DepthwiseConv2d(shape.channels, shape.kernel, shape.stride, bias=False, implementation=name)
        ours.weight = plain.weight
        yield f'{OURS}, {name}' if name else OURS, ours


def _to_layout(x: Tensor, name: str) -> Tensor:
    """Default layout for plain torch and on GPUs, channels-last for ours on CPUs."""
    channels_last = name != PLAIN and x.device.type == 'cpu'
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
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    grad_input, grad_weight = torch.autograd.grad(out, (x, layer.weight), grad)
    return {'forward': out.detach(), 'grad_input': grad_input, 'grad_weight': grad_weight}
