"""How fast the depthwise convolution runs beside torch's own: its three computations and a training step."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.analysis.benchmark.baseline import OURS, PLAIN
from replk_mm.analysis.benchmark.numerical_difference import TOLERANCES, compare_outputs
from replk_mm.analysis.timing import Call, matmul_gflops, print_progress, time_interleaved
from replk_mm.errors import UserError
from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d, Problem
from replk_mm.ops.cpu.cost_model import plan

#: What is timed, and the arithmetic of each in convolutions.
COMPUTATIONS = {'forward': 1, 'grad_input': 1, 'grad_weight': 1, 'step': 3}


@dataclass(frozen=True)
class Shape:
    """One layer and its input."""

    kernel: int  #: side of the kernel in pixels
    size: int  #: side of the map in pixels
    channels: int  #: of input and output
    batch: int  #: images
    stride: int = 1  #: in pixels

    @property
    def out(self) -> int:
        """Side of the output in pixels, with padding of half the kernel."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def gflop(self, computation: str) -> float:
        """10^9 operations of a computation, a multiply-add as two, zeros of the padding included."""
        one = 2 * self.batch * self.channels * self.out**2 * self.kernel**2
        return COMPUTATIONS[computation] * one / 1e9

    def __str__(self) -> str:
        return f'{self.kernel}x{self.kernel} on {self.batch}x{self.channels}x{self.size}x{self.size}'


def run(
    shapes: Sequence[Shape],
    dtype: str = 'float32',
    implementations: Sequence[str] = (),
    device: str = 'cpu',
    repeats: int = 15,
    warmup: int = 2,
    seconds: float = 2.0,
) -> dict:
    """Measure the operator at several shapes.

    Args:
        shapes: Layers and inputs.
        dtype: ``'float32'`` or ``'bfloat16'``, of plain torch too.
        implementations: Names in :data:`replk_mm.ops.IMPLEMENTATIONS` that get rows of their own, where they apply.
        device: ``'cpu'`` or ``'cuda'``.
        repeats: Rounds at most.
        warmup: Rounds before that do not count, at most.
        seconds: Budget of each shape and computation.

    Returns:
        Plain data: the machine's matrix product, and a point for each shape and computation with a row for each
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
        if shape.kernel % 2 == 0:
            raise UserError(f'--kernels {shape.kernel}: kernels must be odd, so that padding keeps the size of the map')
    notes = [
        "plain torch: nn.Conv2d on tensors in torch's default memory layout; ours: on tensors "
        + ('in channels-last memory, as in the backbones' if device == 'cpu' else 'in the same layout')
    ]
    if implementations and device != 'cpu':
        notes.append("--implementations: on CPUs only; elsewhere all of them are torch's own")
        implementations = ()
    print_progress(f'matrix product, {dtype}')
    points = []
    peak = matmul_gflops(getattr(torch, dtype), device)
    for shape in shapes:
        print_progress(str(shape))
        layers = dict(_layers(shape, dtype, implementations, device))
        x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=torch.Generator().manual_seed(1))
        inputs = {name: _laid_out(x.to(device, getattr(torch, dtype)), name) for name in layers}
        results = {name: _results(layer, inputs[name]) for name, layer in layers.items()}
        for computation in COMPUTATIONS:
            found = time_interleaved(
                {
                    name: _call(layer, inputs[name], computation)
                    for name, layer in layers.items()
                    if _has(layer, inputs[name], computation)
                },
                repeats,
                warmup,
                seconds,
            )
            parts = [part for part in COMPUTATIONS if part != 'step' and computation in (part, 'step')]
            rows = []
            for name, samples in found.milliseconds.items():
                gap = (
                    None
                    if name == PLAIN
                    else compare_outputs({part: results[PLAIN][part] for part in parts}, results[name])
                )
                rate = 1e3 * shape.gflop(computation) / found.summary(name).median
                rows.append(
                    dict(
                        name=name,
                        milliseconds=asdict(found.summary(name)),
                        samples=samples,
                        times_as_fast=asdict(found.speedup(name, PLAIN)),
                        gflops=rate,
                        of_matrix_product=rate / peak,
                        difference=gap and gap.relative,
                        equal=gap and gap.within(TOLERANCES['inference', dtype]),
                    )
                )
            points.append(
                dict(
                    asdict(shape),
                    computation=computation,
                    gflop=shape.gflop(computation),
                    rounds=found.rounds,
                    warmup=found.warmup,
                    rows=rows,
                    chosen=str(plan(_problem(layers[OURS], inputs[OURS]))) if device == 'cpu' else None,
                )
            )
    return dict(
        what='op',
        dtype=dtype,
        matrix_product_gflops=peak,
        notes=notes,
        points=points,
        settings=dict(repeats=repeats, warmup=warmup, seconds=seconds, implementations=list(implementations)),
    )


def _layers(shape: Shape, dtype: str, implementations: Sequence[str], device: str) -> Iterator[tuple[str, nn.Conv2d]]:
    torch.manual_seed(0)
    plain = nn.Conv2d(
        shape.channels, shape.channels, shape.kernel, shape.stride, shape.kernel // 2, groups=shape.channels, bias=False
    ).to(device, getattr(torch, dtype))
    yield PLAIN, plain
    for name in (None, *implementations):
        ours = DepthwiseConv2d(shape.channels, shape.kernel, shape.stride, bias=False, implementation=name)
        ours.weight = plain.weight
        yield f'{OURS}, {name}' if name else OURS, ours


def _laid_out(x: Tensor, name: str) -> Tensor:
    last = name != PLAIN and x.device.type == 'cpu'
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _problem(layer: Any, x: Tensor) -> Problem:
    return Problem.of(x, layer.weight, layer.stride, layer.padding, layer.dilation)


def _has(layer: nn.Conv2d, x: Tensor, computation: str) -> bool:
    """Whether a layer with a forced implementation uses it for a computation, or for any of a step's."""
    forced = getattr(layer, 'implementation', None)
    if forced is None:
        return True
    used = plan(_problem(layer, x), forced)._asdict()
    return forced in (used.values() if computation == 'step' else [used[computation]])


def _call(layer: nn.Conv2d, x: Tensor, computation: str) -> Call:
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


def _results(layer: nn.Conv2d, x: Tensor) -> dict[str, Tensor]:
    """Output and both gradients, for comparison."""
    x = x.detach().requires_grad_()
    out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    of_input, of_weight = torch.autograd.grad(out, (x, layer.weight), grad)
    return {'forward': out.detach(), 'grad_input': of_input, 'grad_weight': of_weight}
