"""A dry run before training, so that errors appear in the first minute."""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.amp import autocast

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.data.sampler import PositionedIndex
from replk_mm.engine.nonfinite import forward_backward, forward_context
from replk_mm.engine.process import is_out_of_memory
from replk_mm.errors import UserError, user_message
from replk_mm.logs import announce
from replk_mm.registry import HOOKS
from replk_mm.text import format_duration
from replk_mm.wrappers import input_channels, unwrap_model

#: A first step of fewer seconds is repeated for the estimate, since it includes warm-up.
_SHORT = 10.0


@HOOKS.register_module()
class PreflightHook(Hook):
    """Dry-run a training step, a validation batch with its metrics, and writing and reading a checkpoint.

    Weights, statistics, counters, optimizer state and random numbers stay unchanged.
    """

    priority = 'LOWEST'  # after the hooks that set something up

    def before_train(self, runner: Runner) -> None:
        """Run, and log loss, peak memory and the expected duration.

        Raises:
            UserError: If a part fails.
        """
        started, done = time.perf_counter(), []
        step = validation = 0.0
        model = unwrap_model(runner.model)
        if type(model).train_step is BaseModel.train_step:  # others may have several optimizers
            with _naming('loss and backward of one batch'), _restored_state(model):
                line, step = _loss_and_backward(runner)
                done.append(line)
        if runner.val_loop is not None:
            with _naming('validation of one batch'), _restored_state(model):
                metrics, validation = _validate(runner)
                done.append(f'validation: {", ".join(metrics) or "no metrics"}')
        if is_main_process():
            with _naming('writing and reading a checkpoint'):
                done.append(f'checkpoint {_checkpoint(runner) / 2**20:.0f} MiB')
        taken = time.perf_counter() - started
        runner.logger.info(f'dry run: {"; ".join(done)}; {taken:.1f} s')
        expected = f'; training takes {_estimate(runner, step, validation)}' if step else ''
        announce(f'dry run passed in {format_duration(taken)}{expected}')


def _estimate(runner: Runner, step: float, validation: float) -> str:
    """The expected duration of a training.

    Args:
        runner: About to train.
        step: Seconds of one iteration.
        validation: Seconds of one validation batch.
    """
    loop: Any = runner.train_loop
    iterations = runner.max_iters - runner.iter
    epochs = isinstance(loop, EpochBasedTrainLoop)  # other loops have max_epochs too
    done, total = (loop.epoch, loop.max_epochs) if epochs else (runner.iter, runner.max_iters)
    seconds, text = iterations * step, f'{iterations} iterations of {format_duration(step)}'
    if runner.val_loop is not None:
        interval = max(1, runner.val_interval)
        validations = math.ceil(total / interval) - done // interval
        each_one = validation * len(runner.val_dataloader)
        seconds += validations * each_one
        text += f', {validations} validation{"s" if validations > 1 else ""} of {format_duration(each_one)}'
    return f'about {format_duration(seconds)}: {text}'


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # see explain_failures
        if isinstance(error, UserError) and '\n' in str(error):
            raise UserError(f'dry run, {part}: {user_message(error)}') from error  # it says what to do
        name = '' if isinstance(error, UserError) or not str(error) else f'{type(error).__name__}: '
        raise UserError(
            f'dry run, {part}: {name}{user_message(error)}\nREPLK_MM_TRACEBACK=1 shows the traceback; '
            f'--no-preflight, in a suite `preflight: false`, skips the dry run.'
        ) from error


@contextmanager
def _restored_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers, also those that forward replaces, and numbers such as counters in attributes of modules."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    kept = [(vars(m), {k: v for k, v in vars(m).items() if type(v) in (int, float)}) for m in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before) if buffer.shape == before.shape else before
        for attributes, numbers in kept:
            attributes.update(numbers)


def _batch(loader: Any, size: int) -> Any:
    return loader.collate_fn([loader.dataset[PositionedIndex(i % len(loader.dataset), i)] for i in range(size)])


def _loss_and_backward(runner: Runner) -> tuple[str, float]:
    """A line with loss and memory, and the seconds that an iteration will take."""
    loader: Any = runner.train_dataloader
    start = time.perf_counter()
    batch, model = _batch(loader, loader.batch_sampler.batch_size), unwrap_model(runner.model)
    loading = time.perf_counter() - start
    image = next(iter(batch['inputs'])) if isinstance(batch, dict) and 'inputs' in batch else None
    if isinstance(image, torch.Tensor) and image.dim() == 3 and len(image) not in (1, input_channels(model)):
        raise UserError(
            f'the images have {len(image)} channels, and the model takes {input_channels(model)}\nSet color_type of '
            f'the loading step, or model.backbone.in_channels with mean and std of model.data_preprocessor.'
        )
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    start = time.perf_counter()
    loss = forward_backward(model, batch, forward_context(runner))['loss']
    computing = time.perf_counter() - start
    if not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()):
        raise UserError(
            f'the loss is {loss:.4g}, and the gradients of all weights are zero\nCheck the labels of the first images, '
            f'and the loss of the heads: softmax over out_channels=1 is constant. --no-preflight skips the dry run.'
        )
    if computing < _SHORT:
        start = time.perf_counter()
        forward_backward(model, batch, forward_context(runner))
        computing = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 2**10)
    peak = torch.cuda.max_memory_allocated() if on_gpu else rss
    workers = loader.num_workers
    return (
        f'loss {loss:.4g}; peak memory of the {"GPU" if on_gpu else "process"} {peak / 2**30:.2f} GiB, without the '
        f'state of the optimizer',
        max(computing, loading / workers) if workers else computing + loading,
    )


def _validate(runner: Runner) -> tuple[dict[str, Any], float]:
    """The metrics of one batch, and the seconds that it takes."""
    loop: Any = runner.val_loop
    model: Any = runner.model
    start = time.perf_counter()
    size = min(loop.dataloader.batch_size or 1, len(loop.dataloader.dataset))
    batch = _batch(loop.dataloader, size)
    model.eval()
    with torch.no_grad(), autocast(enabled=getattr(loop, 'fp16', False)):
        outputs = model.val_step(batch)
    seconds = time.perf_counter() - start
    model.train()
    if type(getattr(loop, 'evaluator', None)) is not Evaluator:
        return {}, seconds  # a loop of the user's own, or several data sets
    loop.evaluator.process(data_samples=outputs, data_batch=batch)
    level = runner.logger.level
    runner.logger.setLevel(logging.ERROR)  # the metrics of one batch are not a result
    try:
        metrics = loop.evaluator.evaluate(size)
    finally:
        runner.logger.setLevel(level)
    for hook in runner.hooks if metrics else ():  # some metrics are empty if a model finds nothing
        if isinstance(hook, EarlyStoppingHook):
            _check_key(metrics, 'EarlyStoppingHook.monitor', hook.monitor)
        elif isinstance(hook, CheckpointHook) and hook.save_best:
            for key in hook.key_indicators or ():
                _check_key(metrics, 'CheckpointHook.save_best', key)
    return metrics, seconds


def _check_key(metrics: dict[str, Any], field: str, key: str) -> None:
    if key not in metrics and key != 'auto':
        raise UserError(f'{field}={key!r}: the validation reports {", ".join(metrics)}\nName one of these.')


def _checkpoint(runner: Runner) -> int:
    loop: Any = runner.train_loop
    path = Path(runner.work_dir, 'preflight.pth')
    try:
        runner.save_checkpoint(runner.work_dir, path.name, meta=dict(epoch=loop.epoch, iter=loop.iter))
        read_checkpoint(path)
        return path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
