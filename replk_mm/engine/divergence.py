"""Stop a training at the first loss or gradient that is not finite, before it reaches a weight: layer named, batch saved."""
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from replk_mm.engine.randomness import seed_iteration
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.wrappers import bare, each
from replk_mm.errors import UserError
from replk_mm.registry import HOOKS

#: Below this loss scale float16 gradients overflow at any scale; fairseq stops at the same one (--min-loss-scale).
_LEAST_SCALE = 1e-4


@HOOKS.register_module()
class StopAtNonFinite(Hook):
    """Check the gradients before every step of the optimizer, and the losses after every iteration.

    float16 gradients that overflow at the loss scale are no error: the scaler skips the step and lowers the scale. All processes
    of a run stop together.
    """

    priority = 'VERY_HIGH'  # before anything logs, averages or saves

    def before_train(self, runner: Any) -> None:
        """Register the check before each step."""
        for wrapper in each(runner.optim_wrapper):
            wrapper.optimizer.register_step_pre_hook(partial(self._before_step, runner))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch."""
        self._batch, self._checked = data_batch, False

    def _before_step(self, runner: Any, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._checked = True
        overflow = getattr(optimizer, 'found_inf', None)  # a fused optimizer skips the step itself
        self._check(runner, [] if overflow is not None and bool(overflow) else _gradients(optimizer))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        """Check the losses, and gradients that accumulate.

        Raises:
            UserError: If one is not finite.
        """
        wrappers = each(runner.optim_wrapper)
        values = [torch.as_tensor(value) for name, value in (outputs or {}).items() if 'loss' in name]
        scales = [s.get_scale() for w in wrappers if (s := getattr(w, 'loss_scaler', None)) is not None and s.is_enabled()]
        if not self._checked and not scales:
            values += [gradient for wrapper in wrappers for gradient in _gradients(wrapper.optimizer)]
        self._check(runner, values)
        if min(scales, default=1.) < _LEAST_SCALE:
            self._stop(runner, f' at a loss scale of {min(scales):.2g}')

    def _check(self, runner: Any, values: Sequence[Tensor]) -> None:
        bad = torch.tensor(float(not all_finite(values)))
        all_reduce(bad, 'max')
        if bool(bad):
            self._stop(runner)

    def _stop(self, runner: Any, circumstance: str = '') -> None:
        model, rank, losses, error = bare(runner.model), get_rank(), {}, None
        batch = plain(self._batch)
        try:
            first, losses = first_non_finite(model, self._batch, (runner.seed, runner.iter, rank), forward_context(runner))
        except Exception as caught:  # indices and sizes made of NaN end in errors of all kinds
            first, error = f'not found, the pass that looks for it fails: {type(caught).__name__}: {caught}', caught
        if first is None and get_world_size() > 1:
            raise UserError(f'iteration {runner.iter + 1}, rank {rank}: stopped, because the loss or gradient of another '
                            f'process is not finite\nThe message of that rank names the images and the layer.')
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        path = Path(runner.work_dir, f'nonfinite_iter_{runner.iter + 1}' + (f'_rank_{rank}' if rank else '') + '.pth')
        kept = dict(images=_images(batch), batch=batch, first=first, losses=losses, iteration=runner.iter + 1, seed=runner.seed)
        try:
            torch.save(kept, path)
            saved = f'batch saved: {path}'
        except (OSError, RuntimeError) as caught:  # torch reports a full disk as RuntimeError
            saved = f'the batch could not be saved: {caught}'
        last = last_checkpoint(runner.work_dir)
        raise UserError('\n'.join([
            f'iteration {runner.iter + 1}' + (f', rank {rank}' if get_world_size() > 1 else '')
            + (f': the loss is not finite ({", ".join(bad)})' if bad else ': the gradients are not finite') + circumstance
            + '; first: ' + (first or 'none when the iteration is repeated, so some operation or memory is unreliable'),
            f'images: {", ".join(kept["images"]) or "unknown"}', saved,
            f'last checkpoint: {last or "none"}; --resume without a change ends here again',
            'If an image, label or weight is named, look at it. Otherwise lower optim_wrapper.optimizer.lr, lengthen the '
            'warm-up, set optim_wrapper.clip_grad.max_norm=1, or use --amp bf16 instead of fp16.'])) from error


def forward_context(runner: Any) -> Callable[[], AbstractContextManager]:
    """What a runner's forward passes run in: autocast, with mixed precision."""
    wrapper = runner.optim_wrapper
    return nullcontext if isinstance(wrapper, OptimWrapperDict) else partial(wrapper.optim_context, bare(runner.model))


def forward_backward(model: Any, batch: Any, context: Callable[[], AbstractContextManager]) -> dict[str, float]:
    """mmengine's training step without the optimizer: gradients are set; returns each loss, and ``'loss'``, their sum."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad(), context():
        losses = model._run_forward(model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    total, logged = model.parse_losses(losses)
    total.backward()
    return {name: value.item() for name, value in logged.items() if 'loss' in name}


def first_non_finite(model: nn.Module, batch: Any, seed: tuple[int, int, int],
                     context: Callable[[], AbstractContextManager]) -> tuple[str | None, dict[str, float]]:
    """Repeat an iteration with every layer watched.

    All processes must call this together if layers communicate (SyncBN).

    Args:
        model: In training mode, not wrapped for distributed training.
        batch: As the data loader gives it.
        seed: Seed of the run, iteration and rank, see :func:`seed_iteration`.
        context: From :func:`forward_context`.

    Returns:
        The first tensor that is not finite, in the order batch, weights, layers, losses, gradients, or None; and the losses.
    """
    forward: list[str] = []
    backward: list[str] = []
    finite_before = ''

    def look(place: str, value: Any, gradients: bool = True) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                if not forward and not all_finite([tensor]):
                    forward.append(_describe(place, tensor))
                if gradients and tensor.requires_grad:
                    tensor.register_hook(partial(look_back, place))

    def look_back(place: str, gradient: Tensor) -> None:
        nonlocal finite_before
        if all_finite([gradient]):
            finite_before = place
        elif not backward:
            after = f', computed from a finite gradient of the {finite_before}' if finite_before else ''
            backward.append(_describe(f'gradient of the {place}', gradient) + after)

    def before(place: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        look(f'input of {place}', (args, kwargs), gradients=False)

    def after(place: str, module: nn.Module, args: tuple, output: Any) -> None:
        look(f'output of {place}', output)

    for path, tensor in tree_flatten_with_path(plain(batch))[0]:
        look(f'batch{keystr(path)}', tensor)
    for name, parameter in model.named_parameters():
        look(f'weight {name}', parameter, gradients=False)
    handles = []
    for name, module in model.named_modules():
        place = f'{name or "the model"} ({type(module).__name__})'
        handles += [module.register_forward_pre_hook(partial(before, place), with_kwargs=True),
                    module.register_forward_hook(partial(after, place))]
    seed_iteration(*seed)
    try:
        losses = forward_backward(model, batch, context)
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            look_back(f'weight {name}', parameter.grad)
    # Layers may compute with infinite values on purpose, to mask something; the loss is finite then.
    finite = all(map(math.isfinite, losses.values()))
    return next(iter(backward if finite else forward + backward), None), losses


def _describe(place: str, tensor: Tensor) -> str:
    bad = ~tensor.detach().isfinite()
    images = bad.flatten(1).any(1).nonzero().flatten().tolist() if bad.dim() == 4 and len(bad) > 1 else []
    return (f'{place}, {int(bad.sum())} of {bad.numel()} values'
            + (f' (of images {", ".join(map(str, images))} of the batch, counted from 0)' if images else ''))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are finite; one pass over them, and one wait for a GPU, if they are."""
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    # Sums of squares are fast, but large values overflow; the largest magnitudes do not.
    for order in (2, math.inf):
        norms = torch._foreach_norm(tensors, order) if tensors else []
        if not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()):
            return True
    return False


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]


def plain(value: Any) -> Any:
    """A batch of any of the libraries as lists, dicts, tensors, numbers and text, which load with ``weights_only=True``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in 'biuf' and value.ndim else value.tolist()
    if isinstance(value, BaseDataElement):
        return plain(dict([*value.metainfo_items(), *value.items()]))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    inner = getattr(value, 'tensor', getattr(value, 'masks', None))  # mmdet's boxes and masks
    return str(value) if inner is None else plain(inner)


def _images(batch: Any) -> list[str]:
    return [str(leaf) for path, leaf in tree_flatten_with_path(batch)[0] if keystr(path).endswith("['img_path']")]
