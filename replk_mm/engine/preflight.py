"""A run in small before the run: what would fail after hours of training fails in its first minute."""
import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.runner.amp import autocast

from replk_mm import checkpoints
from replk_mm.data.draws import Draw
from replk_mm.engine.diagnosis import examine, non_finite_gradients
from replk_mm.engine.failures import DISK
from replk_mm.engine.wrappers import bare
from replk_mm.errors import UserError, message_of
from replk_mm.registry import HOOKS

_FILE = 'preflight.pth'  # one that a killed run has left is written over
_SKIP = '--no-preflight trains without this rehearsal.'


@HOOKS.register_module()
class PreflightHook(Hook):
    """Rehearse each part of a training once, when all of it is built and nothing is trained.

    One batch goes through loss and backward, one validation batch through prediction and metrics, whose names are those that
    hooks look for; one checkpoint is written, read back and removed. Weights, statistics, optimizer and the randomness of the
    training stay as they are.
    """

    priority = 'LOWEST'  # after the hooks that set something up

    def before_train(self, runner: Runner) -> None:
        """Rehearse.

        Raises:
            UserError: If a part fails, with what was done and what it said.
        """
        started = time.perf_counter()
        done = []
        with _as_it_was(runner):
            if isinstance(runner.optim_wrapper, OptimWrapper):  # several optimizers have a train_step that only it knows
                with _naming('training: loss and backward of one batch'):
                    done.append(f'loss {_loss_and_backward(runner):.4g}')
            if runner.val_loop is not None:
                with _naming('validation: prediction and metrics of one batch'), _quiet(runner.logger):
                    metrics = _predict_and_score(runner)
                if metrics:  # some report nothing as long as a model finds nothing
                    _check_keys(runner, metrics)
                done.append(f'validation: {", ".join(metrics) or "no metrics yet"}')
            if is_main_process():
                with _naming('checkpoint: write and read back'):
                    done.append(f'checkpoint {_checkpoint(runner) / 2**20:.0f} MiB')
        runner.logger.info(f'preflight: {"; ".join(done)}; {time.perf_counter() - started:.1f} s')


@contextmanager
def _as_it_was(runner: Runner) -> Iterator[None]:
    model = runner.model
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    # Some steps of a pipeline remember what they have seen.
    loaders: list[Any] = [runner.train_dataloader, *([runner.val_dataloader] if runner.val_loop is not None else [])]
    pipelines = [(dataset, dataset.pipeline) for loader in loaders for dataset in _with_pipeline(loader.dataset)]
    for dataset, pipeline in pipelines:
        dataset.pipeline = copy.deepcopy(pipeline)
    try:
        yield
    finally:
        for dataset, pipeline in pipelines:
            dataset.pipeline = pipeline
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter in model.parameters():
            parameter.grad = None
        model.train(training)


def _with_pipeline(dataset: Any) -> Iterator[Any]:
    """A data set and those that it wraps, as far as they have a pipeline of their own."""
    inside = vars(dataset)
    if 'pipeline' in inside:
        yield dataset
    for part in (inside.get('wrapped'), inside.get('dataset'), *(inside.get('datasets') or ())):
        if part is not None and hasattr(part, '__dict__'):
            yield from _with_pipeline(part)


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f'before the first iteration, {part}: {message_of(error)}') from error
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, 'errno', None) in DISK:
            raise  # the training has words for these
        text = (str(error).strip() or 'no message').splitlines()[0]
        raise UserError(f'before the first iteration, {part}: {type(error).__name__}: {text}\n'
                        f'It would have failed later. REPLK_MM_TRACEBACK=1 shows where; {_SKIP}') from error


@contextmanager
def _quiet(logger: MMLogger) -> Iterator[None]:
    # Metrics of one batch are no result, and their tables would be read as one.
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _batch(loader: Any, size: int) -> Any:
    dataset = loader.dataset
    return loader.collate_fn([dataset[Draw(i % len(dataset), i)] for i in range(size)])


class _Backward:
    """An optimizer wrapper that stops before the step. Other attributes are the wrapper's."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self.loss = float('nan')

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def update_params(self, loss: torch.Tensor, *_args, **_kwargs) -> None:
        self.backward(loss)

    def backward(self, loss: torch.Tensor, **_kwargs) -> None:
        loss.backward()
        self.loss = loss.item()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def step(self, **_kwargs) -> None:
        pass

    zero_grad = step


def _loss_and_backward(runner: Runner) -> float:
    loader: Any = runner.train_dataloader
    runner.model.train()
    batch = _batch(loader, loader.batch_sampler.batch_size)
    steps = _Backward(runner.optim_wrapper)
    runner.model.train_step(batch, optim_wrapper=steps)
    model = bare(runner.model)
    wrong = non_finite_gradients(model)
    # Gradients in float16 overflow until the loss is scaled, which mmengine does as it trains.
    scaled = getattr(runner.optim_wrapper, 'loss_scaler', None) is not None
    if math.isfinite(steps.loss) and (scaled or not wrong):
        return steps.loss
    found = examine(model, batch, (runner.seed, runner.iter, get_rank()), lambda: runner.optim_wrapper.optim_context(model))
    raise UserError(f'the {f"gradient of {wrong[0]}" if math.isfinite(steps.loss) else f"loss is {steps.loss}"}'
                    f'{" is not finite" if math.isfinite(steps.loss) else ""}; first non-finite: {found.describe()}\n'
                    f'Check the weights to start from, the normalization of the images (data_preprocessor.mean, std) and the '
                    f'labels.')


def _predict_and_score(runner: Runner) -> dict[str, Any]:
    loop: Any = runner.val_loop
    model: Any = runner.model
    model.eval()
    size = min(loop.dataloader.batch_size or 1, len(loop.dataloader.dataset))
    batch = _batch(loop.dataloader, size)
    with torch.no_grad(), autocast(enabled=getattr(loop, 'fp16', False)):
        outputs = model.val_step(batch)
    if type(getattr(loop, 'evaluator', None)) is not Evaluator:
        return {}  # of a loop of the user's own, or of several data sets, of which this is one batch
    loop.evaluator.process(data_samples=outputs, data_batch=batch)
    return loop.evaluator.evaluate(size)


def _check_keys(runner: Runner, metrics: dict[str, Any]) -> None:
    for hook in runner.hooks:
        wanted: list[str] = []
        if isinstance(hook, CheckpointHook) and hook.save_best:
            wanted = [key for key in hook.key_indicators or () if key != 'auto']
        elif isinstance(hook, EarlyStoppingHook):
            wanted = [hook.monitor]
        missing = [key for key in wanted if key not in metrics]
        if missing:
            field = 'save_best' if isinstance(hook, CheckpointHook) else 'monitor'
            raise UserError(f'{type(hook).__name__}.{field}={missing[0]!r}: the validation reports no such metric, but '
                            f'{", ".join(metrics)}\nName one of those; it would have failed at the first validation.')


def _checkpoint(runner: Runner) -> int:
    loop: Any = runner.train_loop
    path = Path(runner.work_dir, _FILE)
    try:
        runner.save_checkpoint(runner.work_dir, _FILE, meta=dict(epoch=loop.epoch, iter=loop.iter))
        loaded = checkpoints.read(path)
        for key in ('state_dict', 'optimizer', 'message_hub', 'meta'):
            if key not in loaded:
                raise UserError(f'{path}: has no {key!r} when it is read back, and could not be resumed')
        return path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
