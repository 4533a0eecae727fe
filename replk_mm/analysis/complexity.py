"""Parameters and multiply-accumulates of a network, whole and by its parts."""
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.analysis.complexity_forward import forward, forward_auxiliary

#: What a part of a network is needed for.
INFERENCE, TRAINING, NEVER = 'inference', 'training', 'not run'
#: Name of what belongs to the network itself rather than to a part of it.
WHOLE = '(model)'


@dataclass(frozen=True)
class Part:
    """A part of a network.

    Attributes:
        name: Path of the module.
        parameters: Number of its parameters.
        macs: Its multiply-accumulates on one image.
        runs: :data:`INFERENCE`; :data:`TRAINING` for auxiliary heads; :data:`NEVER` for modules that are not called here.
    """

    name: str
    parameters: int
    macs: int
    runs: str


@dataclass(frozen=True)
class Operator:
    """An operator that ran and for which torch has no formula, so that it counts as nothing.

    Attributes:
        name: torch's name of it.
        calls: How often it ran.
        elements: Numbers in its outputs, in the first one of each call.
    """

    name: str
    calls: int
    elements: int


@dataclass(frozen=True)
class Count:
    """What a network costs.

    Attributes:
        parts: Its parts, in the order of the network.
        uncounted: Operators of inference without a formula, most elements first.
        notes: What the count takes for granted and what it leaves out, a line each.
    """

    parts: list[Part]
    uncounted: list[Operator]
    notes: list[str]

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def inference_parameters(self) -> int:
        """Without the parts that only train."""
        return sum(part.parameters for part in self.parts if part.runs != TRAINING)

    @property
    def macs(self) -> int:
        """Of inference."""
        return sum(part.macs for part in self.parts if part.runs == INFERENCE)


def parameters(model: nn.Module) -> int:
    """Number of parameters, training-only heads included."""
    return sum(p.numel() for p in model.parameters())


def inference_parameters(model: nn.Module) -> int:
    """Number of parameters that inference uses: without auxiliary heads."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith('auxiliary_head.'))


def macs(model: nn.Module, shape: tuple[int, int]) -> int:
    """Multiply-accumulates of one inference on one image, which papers call FLOPs; see :func:`count`."""
    return count(model, shape).macs


def count(model: nn.Module, shape: tuple[int, int]) -> Count:
    """Count parameters and multiply-accumulates, by parts.

    By torch's own counter, half of its figure, on the meta device: convolutions and matrix products count, norms,
    activations, pooling, interpolation and additions (of biases, too) do not.

    Args:
        model: A segmentor, detector or backbone, on any device; not changed.
        shape: Height and width of the image in pixels.

    Raises:
        RuntimeError: Or whatever the network raises at a shape that it cannot take.
    """
    model = on_meta(model)
    with torch.device('meta'):
        image = torch.empty(1, 3, *shape)
        inference = _Watch(model)
        notes = inference.run(lambda: forward(model, image))
        training = _Watch(model)
        notes += training.run(lambda: forward_auxiliary(model, image))
    parts, seen = [], set[int]()
    for name, members in _parts(model).items():
        own = {id(p): p.numel() for module in members.values() for p in module.parameters(recurse=False) if id(p) not in seen}
        seen.update(own)
        held = sum(own.values())
        used = inference.macs_of(members)
        # Of the layers that have weights: some modules are called without being used.
        weighted = [path for path, module in members.items() if any(True for _ in module.parameters(recurse=False))]
        if inference.ran.intersection(weighted) or used:
            parts.append(Part(name, held, used, INFERENCE))
        elif training.ran.intersection(weighted):
            parts.append(Part(name, held, training.macs_of(members), TRAINING))
        elif held:
            parts.append(Part(name, held, 0, INFERENCE if name == WHOLE else NEVER))
    return Count(parts, inference.uncounted(), notes)


def on_meta(model: nn.Module) -> Any:
    """A copy without weights, in evaluation mode: parameters and buffers on the meta device."""
    twins: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = torch.empty_like(tensor, device='meta')
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, twins).eval()


def _parts(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The modules of each part by path. A part is a child of the model, of one of its lists, or of its RoI head."""
    found: dict[str, dict[str, nn.Module]] = {WHOLE: {'': model}}

    def split(owner: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in owner.named_children():
            path = f'{prefix}{name}'
            if isinstance(child, nn.ModuleList) or name == 'roi_head':
                found[WHOLE][path] = child
                yield from split(child, f'{path}.')
            else:
                yield path, child

    taken: set[int] = set()
    for path, part in split(model, ''):
        members = {f'{path}.{name}'.rstrip('.'): module for name, module in part.named_modules() if id(module) not in taken}
        taken.update(map(id, members.values()))
        found[path] = members
    return found


class _Watch(TorchDispatchMode):
    """Counts what runs, by the module that runs it.

    Attributes:
        ran: Paths of the modules that were called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ran: set[str] = set()
        self._macs: Counter[str] = Counter()
        self._calls: Counter[Any] = Counter()
        self._elements: Counter[Any] = Counter()
        self._counter = FlopCounterMode(display=False)

    def run(self, what: Callable[[], list[str]]) -> list[str]:
        """Run ``what``, and return what it returns."""
        names = {id(module): name for name, module in self.model.named_modules()}
        running, seen = [''], 0

        def settle() -> None:
            nonlocal seen
            total = self._counter.get_total_flops() // 2
            self._macs[running[-1]] += total - seen
            seen = total

        def enter(module: nn.Module, args: tuple) -> None:
            settle()
            running.append(names[id(module)])
            self.ran.add(running[-1])

        def leave(module: nn.Module, args: tuple, output: object) -> None:
            settle()
            running.pop()

        hooks = [hook for module in self.model.modules()
                 for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]
        try:
            with torch.no_grad(), self, self._counter:
                said = what()
                settle()
        finally:
            for hook in hooks:
                hook.remove()
        return said

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        takes_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        if takes_tensors and not func.is_view:  # neither makes an empty tensor nor looks at another one
            self._calls[func.overloadpacket] += 1
            # What comes after the first is for the backward pass.
            self._elements[func.overloadpacket] += next((t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out

    def macs_of(self, members: dict[str, nn.Module]) -> int:
        """Multiply-accumulates of some modules by path."""
        return sum(self._macs[path] for path in members)

    def uncounted(self) -> list[Operator]:
        """Operators that ran and have no formula."""
        found = [Operator(str(packet), calls, self._elements[packet]) for packet, calls in self._calls.items()
                 if packet not in self._counter.flop_registry]
        return sorted(found, key=lambda operator: (-operator.elements, operator.name))
