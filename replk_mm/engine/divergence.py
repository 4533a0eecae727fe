"""Stop a training at the first loss or gradient that is not finite: named, explained and saved, before it reaches a weight."""
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from torch import Tensor

from replk_mm import checkpoints
from replk_mm.engine.batches import image_paths
from replk_mm.engine.diagnosis import Finding, Values, examine, inspect
from replk_mm.engine.gather import share
from replk_mm.engine.replay import file_of
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.wrappers import bare, each
from replk_mm.errors import UserError
from replk_mm.registry import HOOKS

#: Losses of earlier iterations that a message shows.
_SHOWN = 5
#: Below this scale of the loss float16 gradients overflow whatever is done; fairseq gives up at the same (--min-loss-scale).
_LEAST_SCALE = 1e-4


@HOOKS.register_module()
class StopAtNonFinite(Hook):
    """Check every loss and gradient; stop at the first that is not finite, before the optimizer changes a weight.

    The loss's terms and all gradients are checked together when the optimizer is about to step, at the cost of one pass over
    the gradients; with gradient accumulation, after every iteration. float16 gradients that overflow at the loss scale are
    the scaler's business: it skips the step and lowers the scale. Gradients clipped by value are checked after clipping. All
    processes of a run stop together, and those whose own batch is at fault say why and save it.
    """

    priority = 'VERY_HIGH'  # before anything logs, averages or saves

    def __init__(self) -> None:
        self._batch: Any = None
        self._losses: dict[str, Tensor] = {}
        self._checked = False
        self._handles: list[Any] = []

    def before_train(self, runner: Any) -> None:
        """Listen to the model's losses and the optimizer's steps."""
        self._handles = [bare(runner.model).register_forward_hook(self._keep_losses)]
        for wrapper in each(runner.optim_wrapper):
            self._handles.append(wrapper.optimizer.register_step_pre_hook(partial(self._before_step, runner)))

    def after_train(self, runner: Any) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch at hand."""
        self._batch, self._losses, self._checked = data_batch, {}, False

    def _keep_losses(self, model: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, dict):
            self._losses = {name: value for name, value in output.items() if 'loss' in name}

    def _before_step(self, runner: Any, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._checked = True
        # A fused optimizer is called with the overflow, which it passes over itself.
        overflow = getattr(optimizer, 'found_inf', None)
        self._check(runner, self._losses, [] if overflow is not None and bool(overflow) else _gradients([optimizer]))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        """Check what no step of the optimizer has checked.

        Raises:
            UserError: If something is not finite.
        """
        wrappers = each(runner.optim_wrapper)
        scalers = [s for wrapper in wrappers if (s := getattr(wrapper, 'loss_scaler', None)) is not None and s.is_enabled()]
        known = self._losses or {name: value for name, value in (outputs or {}).items() if 'loss' in name}
        # Gradients with a scaler are scaled, and may overflow.
        rest = [] if self._checked or scalers else _gradients([wrapper.optimizer for wrapper in wrappers])
        if not self._checked or not self._losses:
            self._check(runner, known, rest)
        lowest = min((scaler.get_scale() for scaler in scalers), default=1.)
        if lowest < _LEAST_SCALE:
            self._stop(runner, f'the gradients are not finite, though the loss is scaled by {lowest:.2g}')
        self._batch, self._losses = None, {}

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Refuse to save weights that are not finite: a finite gradient times a large rate may have made them so.

        Raises:
            UserError: If there are any.
        """
        weights = {name for name, _ in bare(runner.model).named_parameters()}
        names = [name for name, value in checkpoint['state_dict'].items()
                 if (name in weights or name.endswith(('running_mean', 'running_var'))) and not bool(value.isfinite().all())]
        if names:
            raise UserError('\n'.join([
                f'iteration {checkpoint["meta"]["iter"]}: {len(names)} weights or statistics are not finite after it, '
                f'{names[0]} first; no checkpoint of them was written',
                *_circumstances(runner), _saved_before(runner), _advice(None)]))

    def _check(self, runner: Any, losses: dict, gradients: Sequence[Tensor]) -> None:
        if not _agreed([*_terms(losses), *gradients]):
            named = {name: value for name, value in losses.items() if not _finite(_terms({name: value}))}
            kinds = sorted({'nan' if bool(term.isnan().any()) else 'inf' for term in _terms(named)}, reverse=True)
            what = f'the loss is {kinds[0]} ({", ".join(named)})' if named else 'the gradients are not finite'
            self._stop(runner, what)

    def explain(self, runner: Any, error: Exception) -> None:
        """Stop if what has stopped an iteration comes of values that are not finite: boxes and indices made of NaN.

        Raises:
            UserError: If it does.
        """
        if self._batch is None:
            return
        if get_world_size() > 1:  # the others wait elsewhere, so that no layer can talk to them
            model = bare(runner.model)
            found = inspect(self._batch)
            found.values += [Values.of(f'weight {name}', 'weights', p) for name, p in model.named_parameters()]
            found.error = error
        else:
            found = self._examine(runner)
        first = None if found.finite else found.first
        if first is not None and (first.kind in ('input', 'weights') or any(value.nan for value in found.values)):
            text = (str(error) or 'no message').splitlines()[0]
            self._report(runner, f'{type(error).__name__}: {text}', found, error)

    def _stop(self, runner: Any, what: str) -> None:
        finding, trouble = None, None
        try:
            finding = self._examine(runner)
        except (RuntimeError, MemoryError, TypeError, AttributeError) as error:
            trouble = error
        at_fault = share(finding is None or not finding.finite)
        if any(at_fault) and not at_fault[get_rank()]:
            raise UserError(f'iteration {runner.iter + 1}, rank {get_rank()}: stopped with rank {at_fault.index(True)}: '
                            f'{what}\nThe message of that rank names the images and the layer.')
        self._report(runner, what, finding, trouble)

    def _examine(self, runner: Any) -> Finding:
        self.after_train(runner)  # the passes that follow are not the training's
        return examine(bare(runner.model), self._batch, _seed(runner), _context(runner))

    def _report(self, runner: Any, what: str, finding: Finding | None, trouble: Exception | None) -> None:
        where = finding.describe() if finding else f'not found ({type(trouble).__name__}: {trouble})'.splitlines()[0]
        process = f', rank {get_rank()}' if get_world_size() > 1 else ''
        lines = [f'iteration {runner.iter + 1}{process}: {what}; first non-finite: {where}']
        if paths := dict.fromkeys(image_paths(self._batch)):
            lines.append(f'images: {", ".join(paths)}')
        if len(each(runner.optim_wrapper)) == 1:  # of several, one may have made its step
            lines.append('No weight has changed in this iteration.')
        lines += [*_circumstances(runner), _saved_before(runner), *self._save(runner, finding),
                  _advice(finding)]
        raise UserError('\n'.join(lines)) from trouble

    def _save(self, runner: Any, finding: Finding | None) -> list[str]:
        rank = f'_rank_{get_rank()}' if get_world_size() > 1 else ''
        path = Path(runner.work_dir, f'nonfinite_iter_{runner.iter + 1}{rank}.pth')
        dataset = getattr(runner.train_dataloader, 'dataset', None)
        try:
            checkpoints.save(file_of(bare(runner.model), self._batch, finding, _seed(runner), _context(runner), runner.cfg,
                                     getattr(dataset, 'metainfo', {})), path)
        except (UserError, ValueError, TypeError, RuntimeError) as error:
            return [f'The batch could not be saved for replay: {str(error).splitlines()[0]}']
        command = shlex.join(['python', 'tools/train.py', str(runner.cfg.filename), '--replay', str(path)])
        return [f'Batch and weights: {path}', f'Replay: {command} (and the --cfg-options of this run)']


@contextmanager
def naming_non_finite(runner: Any) -> Iterator[None]:
    """Explain errors of a training's iteration that come of values that are not finite.

    Raises:
        UserError: Instead of them, see :meth:`StopAtNonFinite.explain`.
    """
    try:
        yield
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if 'alloc' not in str(error):  # as the CPU says that it is out of memory
            for hook in runner.hooks:
                if isinstance(hook, StopAtNonFinite):
                    hook.explain(runner, error)
        raise


def _seed(runner: Any) -> tuple[int, int, int]:
    return runner.seed, runner.iter, get_rank()


def _context(runner: Any) -> Callable[[], AbstractContextManager]:
    wrapper = runner.optim_wrapper
    return nullcontext if isinstance(wrapper, OptimWrapperDict) else partial(wrapper.optim_context, bare(runner.model))


def _gradients(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    found = [p.grad for optimizer in optimizers for group in optimizer.param_groups for p in group['params']
             if p.grad is not None]
    return [g._values() if g.is_sparse else g for g in found]


def _terms(losses: dict) -> list[Tensor]:
    return [term.detach() for value in losses.values() for term in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(term, Tensor)]


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values of all tensors are finite; one pass over them, and one wait for a GPU, if they are."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    # Sums of squares are fast and not finite if any value is not, or if they overflow. Largest magnitudes do not overflow.
    for order in (2, math.inf):
        norms = torch._foreach_norm(tensors, order) if tensors else []
        if not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()):
            return True
    return False


def _agreed(tensors: Sequence[Tensor]) -> bool:
    """:func:`_finite`, of all processes together."""
    finite = _finite(tensors)
    if get_world_size() > 1:
        flag = torch.tensor(float(not finite), device=tensors[0].device if tensors else 'cpu')
        all_reduce(flag, 'max')
        finite = not bool(flag)
    return finite


def _circumstances(runner: Any) -> Iterator[str]:
    history = runner.message_hub.log_scalars.get('train/loss')
    recent = list(history.data[0][-_SHOWN:]) if history is not None else []
    if recent:
        yield f'loss until here: {", ".join(f"{value:.4g}" for value in recent)}'
    rates = [rate for name, values in runner.optim_wrapper.get_lr().items() if 'base_lr' not in name for rate in values]
    yield 'learning rate: ' + (f'{min(rates):.3g} to {max(rates):.3g}' if min(rates) < max(rates) else f'{rates[0]:.3g}')


def _saved_before(runner: Any) -> str:
    last = last_checkpoint(runner.work_dir)
    return f'Last checkpoint: {last}' if last else f'Last checkpoint: none yet in {runner.work_dir}'


def _advice(finding: Finding | None) -> str:
    kind = finding.first.kind if finding and finding.first else ''
    place = finding.first.place if finding and finding.first else ''
    if kind == 'input':
        return 'Mend the image or its annotations, or the step of train_pipeline that makes them so.'
    if 'data_preprocessor' in place:
        return 'Check mean and std of model.data_preprocessor: a std of 0 divides by it.'
    if kind == 'weights':
        return ('They were so before this iteration: since the last update (lower optim_wrapper.optimizer.lr), or in the '
                'weights that training started from.')
    return ('Try a lower optim_wrapper.optimizer.lr, a longer warm-up, or optim_wrapper.clip_grad.max_norm=1; with --amp fp16 '
            'rather bf16 or none; and look at the labels of these images. A --resume without a change ends here again.')
