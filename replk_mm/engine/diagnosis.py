"""Where values stop being finite: a batch run once more, first as in training, then with every layer watched."""
import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.engine.batches import samples_in, tensors_in
from replk_mm.engine.randomness import seed_iteration

#: Attribute of a tensor that says which call made it, and its version then; in-place operations raise the version.
_TAG = 'replk_mm_made_by'
_STATISTICS = ('running_mean', 'running_var')


@dataclass
class Values:
    """What one tensor of a pass held.

    Attributes:
        place: ``'output of decode_head.conv_seg (Conv2d)'``.
        kind: ``'input'``, ``'weights'``, ``'output'``, ``'loss'`` or ``'gradient'``.
        shape: Of the tensor.
        largest: Largest magnitude among its finite values.
        nan: How many values are NaN.
        inf: How many are infinite.
        samples: Which along the first dimension hold them.
    """

    place: str
    kind: str
    shape: tuple[int, ...]
    largest: float
    nan: int
    inf: int
    samples: list[int]

    @classmethod
    def of(cls, place: str, kind: str, tensor: Tensor) -> 'Values':
        x = tensor.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        finite = x.isfinite()
        bad = x.numel() - int(finite.sum())
        nan = int(x.isnan().sum()) if bad else 0
        samples = (~finite).flatten(1).any(1).nonzero().flatten().tolist() if bad and x.dim() > 1 else []
        largest = float(x.abs().where(finite, 0).max()) if x.numel() else 0.
        return cls(place, kind, tuple(x.shape), largest, nan, bad - nan, samples)

    @property
    def finite(self) -> bool:
        return not (self.nan or self.inf)


@dataclass
class Finding:
    """What the passes over a batch have shown.

    Attributes:
        images: Paths of the images, as far as known.
        values: What was looked at in the watched pass, in the order of computing, the batch first and the gradients last.
        losses: Each term of the loss in the pass as in training, and ``'loss'``, their sum.
        gradients: Parameters whose gradients were not finite in that pass.
        error: What that pass was stopped by.
    """

    images: list[str]
    values: list[Values]
    losses: dict[str, float] = field(default_factory=dict)
    gradients: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients were computed, as in training, and are finite."""
        return not self.gradients and self.error is None and all(map(math.isfinite, self.losses.values()))

    @property
    def first(self) -> Values | None:
        """The first values that are not finite; of gradients alone, if only they are not.

        Layers may compute with infinite values on purpose, to mask something, and the loss is finite then.
        """
        bad = [value for value in self.values if not value.finite]
        sound = self.error is None and self.losses and all(map(math.isfinite, self.losses.values()))
        return next((value for value in bad if sound and value.kind == 'gradient'), next(iter(bad), None))

    def describe(self) -> str:
        """The first place that is not finite, in words; of which images, if that can be told and they are not all."""
        first = self.first
        if self.finite:
            return 'none in a second pass with the same seeds, so an operation or a machine does not repeat itself'
        if first is None and self.error is not None:
            text = (str(self.error) or 'no message').splitlines()[0]
            return f'not found, for the pass that looks for it ended with {type(self.error).__name__}: {text}'
        if first is None:
            return 'none where layers are watched, which switches off what computes several of them at once'
        whole = first.kind == 'output' and len(first.shape) > 2 and first.shape[0] == len(self.images)
        images = [self.images[i] for i in first.samples] if whole and len(first.samples) < len(self.images) else []
        nan = next((v for v in self.values if v.nan), None)
        return (f'{first.place}, {first.nan + first.inf} of {math.prod(first.shape)} values '
                + ('nan' if first.nan else 'infinite') + (f', of {", ".join(images)} only' if images else '')
                + (f'; first nan: {nan.place}' if nan is not None and not first.nan else ''))


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not finite."""
    return [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]


def examine(model: nn.Module, batch: Any, seed: tuple[int, int, int],
            context: Callable[[], AbstractContextManager]) -> Finding:
    """Run a batch forward and backward, as training does and then with every layer watched.

    The model's weights and statistics stay; its gradients go.

    Args:
        model: In training mode, not wrapped for distributed training. All processes must call this together if layers of it
            communicate (SyncBN).
        batch: As the data loader gives it.
        seed: Of the run, iteration and rank, see :func:`seed_iteration`.
        context: What the forward pass runs in, autocast for example.
    """
    found = inspect(batch)
    with _buffers_kept(model):
        try:
            found.losses = _run(model, batch, seed, context)
            found.gradients = non_finite_gradients(model)
        except Exception as error:  # indices and sizes made of NaN end in errors of all kinds
            found.error = error
        with Watch(model) as watch, nullcontext() if found.error is None else suppress(type(found.error)):
            _run(model, batch, seed, context)
    model.zero_grad(set_to_none=True)
    found.values += watch.values
    return found


def inspect(batch: Any) -> Finding:
    """What of a batch itself is not finite."""
    images = [str(Path(s.get('img_path'))) if s.get('img_path') else f'image {i + 1}'
              for i, s in enumerate(samples_in(batch))]
    values = [Values.of(_name_of_input(path, images), 'input', tensor) for path, tensor in tensors_in(batch)
              if tensor.is_floating_point()]
    return Finding(images, [value for value in values if not value.finite])


def _name_of_input(path: str, images: list[str]) -> str:
    """``'data_samples[1].gt_instances.bboxes'`` as ``'gt_instances.bboxes of IMAGE'``."""
    found = re.fullmatch(r'(\w+)\[(\d+)\]\.?(.*)', path)
    if not found or int(found[2]) >= len(images):
        return f'{path} of the batch'
    return f'{found[3] or ("image" if found[1] == "inputs" else found[1])} of {images[int(found[2])]}'


def _run(model: Any, batch: Any, seed: tuple[int, int, int], context: Callable[[], AbstractContextManager]
         ) -> dict[str, float]:
    seed_iteration(*seed)
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        with context():
            data = model.data_preprocessor(copy.deepcopy(batch), True)
            losses = model(**data, mode='loss') if isinstance(data, dict) else model(*data, mode='loss')
        total, logged = model.parse_losses(losses)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    return {name: value.item() for name, value in logged.items() if 'loss' in name}


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                buffer.copy_(kept)


class Watch:
    """Looks at what every module takes and gives while it is entered, and at the gradients that come back.

    A tensor is looked at once, where it is made: by the innermost module whose output it is, or, if functions between
    modules have made it, as the input of the next module.

    Args:
        model: Its modules.

    Attributes:
        values: What was seen, in the order of computing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: list[Values] = []
        self._handles: list[Any] = []
        self._calls: list[str] = []  # name of the module of each call
        self._open: list[int] = []
        self._takers: dict[int, list[int]] = {}
        self._sound: set[int] = set()  # calls whose outputs' gradients have been finite

    def __enter__(self) -> 'Watch':
        for name, module in self.model.named_modules():
            self._handles += [module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                              module.register_forward_hook(partial(self._after, name))]
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    place = f'gradient of {_labelled(f"{name}.{key}" if name else key, module)}'
                    self._handles.append(parameter.register_hook(partial(self._seen_gradient, place, None)))
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = len(self._calls)
        self._calls.append(name)
        self._open.append(call)
        for path, tensor in tensors_in([*args, kwargs] if kwargs else list(args)):
            if not tensor.is_floating_point():
                continue
            maker, version = getattr(tensor, _TAG, (-1, -1))
            if version == tensor._version:
                self._takers.setdefault(maker, []).append(call)
            elif name != 'data_preprocessor':  # the batch itself has been looked at
                where = f'input of {_labelled(name, module)}' if name else f'input of the model ({path})'
                self._look(call, where, 'output', tensor)
        for key, tensor in [*module.named_parameters(recurse=False),
                            *(b for b in module.named_buffers(recurse=False)
                              if b[0] in _STATISTICS and not module.training)]:
            weights = Values.of(f'weight {_labelled(f"{name}.{key}" if name else key, module)}', 'weights', tensor)
            if not weights.finite:
                self.values.append(weights)

    def _after(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        call = self._open.pop()
        for path, tensor in tensors_in(output):
            if not tensor.is_floating_point() or getattr(tensor, _TAG, (None, None))[1] == tensor._version:
                continue
            if name:
                self._look(call, f'output of {_labelled(name, module)}', 'output', tensor)
            elif 'loss' in path:  # accuracies, which may be of nothing, are beside the point
                self._look(call, f'loss {path}', 'loss', tensor)

    def _look(self, call: int, place: str, kind: str, tensor: Tensor) -> None:
        self.values.append(Values.of(place, kind, tensor))
        setattr(tensor, _TAG, (call, tensor._version))
        if tensor.requires_grad:
            tensor.register_hook(partial(self._seen_gradient, f'gradient of the {place}', call))

    def _seen_gradient(self, place: str, call: int | None, gradient: Tensor) -> None:
        found = Values.of(place, 'gradient', gradient)
        if found.finite and call is not None:
            self._sound.add(call)
        elif call is not None and (culprit := self._passed_back_by(call)):
            found.place = f'{place}, which {culprit} passes back'
        self.values.append(found)

    def _passed_back_by(self, call: int) -> str | None:
        """The only innermost module that took the output of ``call`` and whose own outputs' gradients are finite."""
        takers = {self._calls[taker] for taker in self._takers.get(call, ()) if taker in self._sound}
        innermost = [name for name in takers if name and not any(other.startswith(f'{name}.') for other in takers)]
        return _labelled(innermost[0], self.model.get_submodule(innermost[0])) if len(innermost) == 1 else None


def _labelled(name: str, module: nn.Module) -> str:
    return f'{name} ({type(module).__name__})'
