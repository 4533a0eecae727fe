"""Stop training at the first NaN or infinity in losses or gradients; name the layer and save the batch."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import all_gather_object, all_reduce, barrier, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils._pytree import MappingKey, keystr, tree_flatten_with_path, tree_leaves

from replk_mm.data.sampler import seed_iteration
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import UserError
from replk_mm.evaluation.gather import require_ground_truth
from replk_mm.registry import HOOKS
from replk_mm.wrappers import optim_wrappers, unwrap_model

#: Minimum loss scale, as fairseq's ``--min-loss-scale``.
_LEAST_SCALE = 1e-4


class NonFiniteError(UserError):
    """A loss or a gradient is not finite."""


@HOOKS.register_module()
class StopAtNonFinite(Hook):
    """Check the gradients before every step of the optimizer, and the losses after every iteration.

    float16 gradients may overflow: the scaler skips the step and lowers the loss scale. All processes stop together.
    """

    priority = 'VERY_HIGH'  # before anything logs, averages or saves

    def before_train(self, runner: Any) -> None:
        """Register the check before each step."""
        for wrapper in optim_wrappers(runner.optim_wrapper):
            wrapper.optimizer.register_step_pre_hook(partial(self._before_step, runner))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch."""
        self._batch, self._checked = data_batch, False

    def _before_step(self, runner: Any, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._checked = True
        overflow = getattr(optimizer, 'found_inf', None)  # a fused optimizer skips the step itself
        self._check(runner, [] if overflow is not None and bool(overflow) else _gradients(optimizer))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Check the losses, and gradients that accumulate.

        Raises:
            UserError: If one is not finite.
        """
        wrappers = optim_wrappers(runner.optim_wrapper)
        scalers = [wrapper.loss_scaler for wrapper in wrappers if hasattr(wrapper, 'loss_scaler')]
        scale = min((scaler.get_scale() for scaler in scalers if scaler.is_enabled()), default=None)
        values = [torch.as_tensor(value) for name, value in (outputs or {}).items() if 'loss' in name]
        if not self._checked and scale is None:
            values += [gradient for wrapper in wrappers for gradient in _gradients(wrapper.optimizer)]
        self._check(runner, values)
        # With a fixed loss scale, the scaler would skip every step.
        skipped = not self._checked and any(
            getattr(wrapper, '_scale_update_param', None) is not None
            and wrapper._inner_count % wrapper._accumulative_counts == 0
            for wrapper in wrappers
        )
        if scale is not None and (skipped or scale < _LEAST_SCALE):
            self._stop(runner, f' at a loss scale of {scale:.2g}')

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Stop if the validation data have no ground truth."""
        require_ground_truth(metrics or {}, 'val')

    def _check(self, runner: Any, values: Sequence[Tensor]) -> None:
        bad = torch.tensor(float(not all_finite(values)))
        all_reduce(bad, 'max')
        if bool(bad):
            self._stop(runner)

    def _stop(self, runner: Any, circumstance: str = '') -> None:
        seed, error = (runner.seed, runner.iter, get_rank()), None
        losses: dict[str, float] = {}
        try:
            first, losses = first_non_finite(unwrap_model(runner.model), self._batch, seed, forward_context(runner))
        except Exception as caught:  # NaN in indices and sizes raises many types
            first = f'not found, the pass that looks for it fails: {type(caught).__name__}: {caught}'
            error = caught
        where = f'iteration {runner.iter + 1}' + (f', rank {get_rank()}' if get_world_size() > 1 else '')
        # SyncBN spreads NaN: the cause is the rank whose own batch has it, or else the first rank with a finding.
        causes = [(not place.startswith('batch'), rank) for rank, place in enumerate(all_gather_object(first)) if place]
        if causes and min(causes)[1] != get_rank():
            barrier()
            time.sleep(1)  # torchrun reports the first process that fails: let it be the cause
            raise NonFiniteError(
                f'{where}: stopped, because rank {min(causes)[1]} found a loss or gradient that is '
                f'not finite\nThe message of that rank names the images and the layer.'
            )
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        what = f'the loss is not finite ({", ".join(bad)})' if bad else 'the gradients are not finite'
        batch = plain(self._batch)
        leaves = tree_flatten_with_path(batch)[0]
        images = [str(leaf) for path, leaf in leaves if path[-1:] == (MappingKey('img_path'),)]
        saved = _save(runner, dict(images=images, batch=batch, first=first, losses=losses, iteration=runner.iter + 1))
        last = last_checkpoint(runner.work_dir)
        message = NonFiniteError(
            f'{where}: {what}{circumstance}; '
            f'first: {first or "not found when repeated, so some operation is not deterministic"}\n'
            f'images: {", ".join(images) or "unknown"}\n{saved}\n'
            + (f'last checkpoint: {last}; --resume without a change stops here again\n' if last else '')
            + 'Check the batch, label or weight named above. Otherwise lower optim_wrapper.optimizer.lr, '
            'lengthen the warm-up, set optim_wrapper.clip_grad.max_norm=1, or train without fp16.'
        )
        if causes:
            barrier()
        raise message from error


def _save(runner: Any, content: dict) -> str:
    path = Path(runner.work_dir, f'nonfinite_iter_{runner.iter + 1}{f"_rank_{get_rank()}" if get_rank() else ""}.pth')
    try:
        torch.save(content, path)
        return f'batch saved: {path}'
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return f'the batch could not be saved: {error}'


def forward_context(runner: Any) -> Callable[[], AbstractContextManager]:
    """Context of a runner's forward passes: autocast, with mixed precision."""
    wrapper = runner.optim_wrapper
    return (
        nullcontext
        if isinstance(wrapper, OptimWrapperDict)
        else partial(wrapper.optim_context, unwrap_model(runner.model))
    )


def forward_backward(model: Any, batch: Any, context: Callable[[], AbstractContextManager]) -> dict[str, float]:
    """mmengine's training step without the optimizer: sets gradients, returns each loss and their sum, ``'loss'``."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad(), context():
        losses = model._run_forward(model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    total, logged = model.parse_losses(losses)
    total.backward()
    return {name: value.item() for name, value in logged.items() if 'loss' in name}


def first_non_finite(
    model: nn.Module, batch: Any, seed: tuple[int, int, int], context: Callable[[], AbstractContextManager]
) -> tuple[str | None, dict[str, float]]:
    """Repeat an iteration with every layer watched.

    All processes must call this together if layers communicate (SyncBN).

    Args:
        model: In training mode, not wrapped for distributed training.
        batch: As the data loader gives it.
        seed: Seed of the run, iteration and rank, see :func:`seed_iteration`.
        context: From :func:`forward_context`.

    Returns:
        The first tensor that is not finite, in the order batch, weights, layers, losses, gradients, or None; and the
        losses.
    """
    forward: list[str] = []
    backward: list[str] = []
    last_finite = ''

    def look(place: str, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not forward and not all_finite([tensor]):
                forward.append(_describe(place, tensor))

    def look_back(place: str, gradient: Tensor) -> None:
        nonlocal last_finite
        if all_finite([gradient]):
            last_finite = place
        elif not backward:
            after = f', computed from a finite gradient of the {last_finite}' if last_finite else ''
            backward.append(_describe(f'gradient of the {place}', gradient) + after)

    def before(place: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        look(f'input of {place}', (args, kwargs))

    def after(place: str, module: nn.Module, args: tuple, output: Any) -> None:
        look(f'output of {place}', output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(look_back, f'output of {place}'))

    for path, leaf in tree_flatten_with_path(plain(batch))[0]:
        look(f'batch{keystr(path)}', leaf)
    for name, parameter in model.named_parameters():
        look(f'weight {name}', parameter)
    handles = []
    for name, module in model.named_modules():
        place = f'{name or "the model"} ({type(module).__name__})'
        handles += [
            module.register_forward_pre_hook(partial(before, place), with_kwargs=True),
            module.register_forward_hook(partial(after, place)),
        ]
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
    return f'{place}, {int(bad.sum())} of {bad.numel()} values'


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are finite. If so, it takes one pass and one GPU synchronization."""
    tensors = [tensor.detach() for tensor in tensors if tensor.numel() and tensor.is_floating_point()]
    # The 2-norm is fast, but overflows for large values; the maximum norm does not.
    for order in (2, math.inf):
        norms = torch._foreach_norm(tensors, order) if tensors else []
        if not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()):
            return True
    return False


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]


def plain(value: Any) -> Any:
    """Convert a batch to lists, dicts, tensors, numbers and text, which load with ``weights_only=True``."""
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
