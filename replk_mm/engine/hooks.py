"""Hooks: checkpoints, progress, agreement between processes, and the table of parameter groups."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import all_reduce_dict, broadcast, get_world_size, is_main_process, master_only
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from replk_mm.engine.resuming import former_run
from replk_mm.errors import UserError
from replk_mm.evaluation.gather import absent_classes
from replk_mm.files import write_atomic
from replk_mm.registry import HOOKS
from replk_mm.text import format_duration, format_metrics, text_table
from replk_mm.wrappers import named_unwrapped_parameters, optim_wrappers, unwrap_model

#: Message hub key: the checkpoint written after a signal. The next regular checkpoint replaces it.
INTERIM = 'interim_checkpoint'


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """Save checkpoints. Arguments are those of :class:`mmengine.hooks.CheckpointHook`.

    An old checkpoint is deleted after the new one is written. mmengine deletes first, so a full disk can lose both.

    Attributes:
        saved_iter: Iteration of the last checkpoint that can be resumed, or -1.
    """

    keep_ckpt_ids: deque
    file_backend: Any
    saved_iter = -1

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        ids = self.keep_ckpt_ids if self.max_keep_ckpts > 0 else deque()
        outdated = []
        if len(ids) == self.max_keep_ckpts and ids[-1] != step:
            outdated.append(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(ids.popleft())))
        interim = runner.message_hub.get_info(INTERIM)
        if interim:
            outdated.append(str(Path(runner.work_dir, Path(interim).name)))
        runner.message_hub.update_info(INTERIM, None)
        super()._save_checkpoint_with_step(runner, step, meta)
        if self.save_optimizer and self.save_param_scheduler:
            self.saved_iter = meta['iter']
        for path in outdated if is_main_process() else ():
            if Path(path).name != Path(str(self.last_ckpt)).name and self.file_backend.isfile(path):
                self.file_backend.remove(path)


@HOOKS.register_module()
class DistributedSyncHook(Hook):
    """Log the losses of the whole batch, and validate the network that checkpoints hold.

    mmengine logs the losses of rank 0 only. Unsynchronized BatchNorm has different running statistics in each process;
    checkpoints hold those of rank 0, so all processes validate with them.
    """

    priority = 'HIGHEST'  # before the hook that records the losses

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Average ``outputs`` over all processes."""
        if outputs and get_world_size() > 1:
            means = {name: torch.as_tensor(value).detach().double() for name, value in outputs.items()}
            all_reduce_dict(means, 'mean')
            outputs.update(means)

    def before_val(self, runner: Runner) -> None:
        """Broadcast the buffers of rank 0."""
        if get_world_size() > 1:
            for buffer in runner.model.buffers():
                broadcast(buffer)


@HOOKS.register_module()
class ProgressHook(Hook):
    """Print the progress of training, validation and test, and the results of validations, to the terminal.

    mmengine's ``LoggerHook``, whose interval it follows, writes more figures to the log file.
    """

    priority = 'VERY_LOW'  # after the hooks that measure losses and times
    #: Seconds after which validation and test print again.
    pause = 10

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Print loss, learning rate, time of an iteration and remaining time."""
        done, hub = runner.iter + 1, runner.message_hub
        interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 10)
        if done % interval and done != runner.max_iters:
            return
        scalars = hub.log_scalars
        parts = [f'iteration {done}/{runner.max_iters}']
        if 'train/loss' in scalars:
            parts.append(f'loss {scalars["train/loss"].mean(interval):.4g}')
        if 'train/base_lr' in scalars:
            parts.append(f'lr {scalars["train/base_lr"].current():.3g}')
        if 'train/time' in scalars:
            parts.append(f'{scalars["train/time"].mean(interval):.2g} s/iteration')
            parts.append(f'eta {format_duration(hub.get_info("eta", 0))}')
        print('  '.join(parts), flush=True)

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self.started = self.printed = time.monotonic()

    @master_only
    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = 'test'
    ) -> None:
        """Print the remaining time of a validation or test, without the first batch, in which everything warms up."""
        name, loader = ('test', runner.test_dataloader) if mode == 'test' else ('validation', runner.val_dataloader)
        done, total, now = batch_idx + 1, len(loader), time.monotonic()
        if done == 1:
            self.started = now
            return
        remaining = (now - self.started) / (done - 1) * (total - done)
        if now - self.printed >= self.pause or done == 2 and remaining > self.pause:
            self.printed = now
            print(f'{name}: {done} of {total} batches, about {format_duration(remaining)} left', flush=True)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Print the metrics."""
        absent = absent_classes(getattr(getattr(runner.val_loop, 'evaluator', None), 'metrics', ()))
        print(f'validation at iteration {runner.iter}: {format_metrics(metrics or {}, absent)}', flush=True)


@HOOKS.register_module()
class OverwriteHook(Hook):
    """Remove the checkpoints of the former run, which ``--overwrite`` replaces."""

    priority = 'LOWEST'  # after the dry run

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Remove them."""
        for path in [*former_run(runner.work_dir), Path(runner.work_dir, 'last_checkpoint')]:
            path.unlink(missing_ok=True)


@HOOKS.register_module()
class SparsityHook(Hook):
    """Keep the zeros in the linear and convolution weights of the backbone, as the SLaK authors do in fine-tuning.

    The masks are where weights are zero when training starts or resumes.
    """

    priority = 'ABOVE_NORMAL'  # before moving averages and checkpoints

    def before_train(self, runner: Runner) -> None:
        """Find the zeros.

        Raises:
            UserError: If there are none.
        """
        weights = [p for p in unwrap_model(runner.model).backbone.parameters() if p.dim() in (2, 4)]
        self.masks = [(weight, weight.detach() != 0) for weight in weights]
        kept, total = (sum(int(t.sum()) for _, t in self.masks), sum(weight.numel() for weight in weights))
        if kept == total:
            raise UserError(
                'SparsityHook: no weight of the backbone is zero\n'
                'Load sparse weights with --pretrained FILE, or remove the hook from custom_hooks.'
            )
        print_log(f'SparsityHook: {1 - kept / total:.1%} of the weights of the backbone stay zero', 'current')

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Set them to zero after the optimizer's step."""
        for weight, mask in self.masks:
            weight.mul_(mask)


COLUMNS = ('group', 'lr', 'weight_decay', 'tensors', 'parameters', 'first', 'last')


@HOOKS.register_module()
class ParameterGroupsHook(Hook):
    """Write ``parameter_groups.txt`` and ``.json`` to the work directory before training, after resuming."""

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Write both files."""
        write_parameter_groups(runner.optim_wrapper, runner.model, Path(runner.work_dir, 'parameter_groups.txt'))


def parameter_groups(optim_wrapper: OptimWrapper, model: nn.Module) -> list[dict[str, Any]]:
    """What the optimizer does with which parameters, one row for all groups of the same settings.

    Args:
        optim_wrapper: Any optimizer wrapper, several of them in mmengine's ``OptimWrapperDict`` included.
        model: The model whose parameters it has, wrapped for distributed training or not.

    Returns:
        Rows in the order of the optimizer, the keys of which are :data:`COLUMNS`: ``group`` is the name that a
        constructor gave, or ``'-'``; ``lr`` is the rate that schedules start from; ``tensors`` counts parameters,
        ``parameters`` their values; ``first`` and ``last`` are names. The last row, ``'frozen'``, is for what no group
        has, if there is any.
    """
    names = {id(param): name for name, param, _ in reversed(list(named_unwrapped_parameters(model)))}
    rows: dict[tuple, list[nn.Parameter]] = {}
    # Not the wrapper's own groups, to which mmengine adds one of no parameter of the model for its log.
    for group in (group for wrapper in optim_wrappers(optim_wrapper) for group in wrapper.optimizer.param_groups):
        settings = group.get('group_name', '-'), group.get('initial_lr', group['lr']), group.get('weight_decay', 0.0)
        rows.setdefault(settings, []).extend(group['params'])
    taken = {id(param) for params in rows.values() for param in params}
    frozen = [param for param in model.parameters() if id(param) not in taken]
    if frozen:
        rows['frozen', 0.0, 0.0] = frozen
    return [
        dict(
            zip(
                COLUMNS,
                (*settings, len(params), sum(p.numel() for p in params), names[id(params[0])], names[id(params[-1])]),
                strict=True,
            )
        )
        for settings, params in rows.items()
    ]


def write_parameter_groups(optim_wrapper: OptimWrapper, model: nn.Module, path: str | Path) -> None:
    """Write :func:`parameter_groups` as a table to ``path``, and as JSON beside it.

    Args:
        optim_wrapper: Any optimizer wrapper.
        model: The model whose parameters it has.
        path: The table's file; the other has the suffix ``.json``.
    """
    rows = parameter_groups(optim_wrapper, model)
    cells = [[f'{value:.6g}' if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    write_atomic(path, text_table([COLUMNS, *cells], left=(0, 5, 6)) + '\n')
    write_atomic(Path(path).with_suffix('.json'), json.dumps(rows, indent=1) + '\n')
