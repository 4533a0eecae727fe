"""mmengine's loops, which stop on a signal and resume at the sample where a run stopped."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook
from mmengine.runner import BaseLoop
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterLoop
from mmengine.runner import ValLoop as MMEngineValLoop
from torch.utils.data import DataLoader

from replk_mm.data.sampler import (
    ResumableLoader,
    empty_loader_error,
    infinite_batches,
    make_resumable,
    seed_iteration,
    seed_sample,
)
from replk_mm.engine import stopping
from replk_mm.errors import Stopped
from replk_mm.registry import LOOPS
from replk_mm.wrappers import optim_wrappers

# Message hub key: iteration of the last validation. mmengine would log a key that begins with "val".
_VALIDATED = 'last_validation'
# Message hub key: the current epoch and its first iteration.
_EPOCH = 'current_epoch'


class _Resumable(BaseLoop):
    """Seeds, validation and stopping, for both loops."""

    dataloader: ResumableLoader
    val_begin: int
    val_interval: int
    _iter: int
    _epoch: int
    _decide_current_val_interval: Callable[[], None]  # of mmengine's loops

    def __init__(self, runner: Any, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        loader = dataloader
        if isinstance(loader, dict):
            loader = runner.build_dataloader(
                loader, seed=runner.seed, diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False)
            )
        loader = make_resumable(loader, partial(seed_sample, runner.seed), get_rank(), get_world_size())
        super().__init__(runner, loader, *args, **kwargs)

    def _validate_if_due(self, done: int, total: int) -> None:
        """Validate after ``done`` of ``total`` iterations or epochs, unless the stopped run has already done so."""
        self._decide_current_val_interval()
        due = done % self.val_interval == 0 or done == total
        if self.runner.val_loop is not None and done >= max(1, self.val_begin) and due:
            self._validate()

    def _validate(self) -> None:
        hub = self.runner.message_hub
        before = hub.get_info(_VALIDATED, -1)
        if before == self._iter:
            return
        # Set before the validation: a new best checkpoint, written at its end, must contain it.
        hub.update_info(_VALIDATED, self._iter)
        try:
            self.runner.val_loop.run()
        except stopping.StopRequested as request:
            hub.update_info(_VALIDATED, before)
            raise Stopped(request.signal, self.runner.save_state()) from None

    def _stop_if_requested(self) -> None:
        signal = stopping.requested_signal() if _between_steps(self.runner) else None
        if signal is not None:
            raise Stopped(signal, self.runner.save_state())


def _between_steps(runner: Any) -> bool:
    """Whether no gradients are accumulated. Checkpoints do not hold gradients, so a run cannot resume in between."""
    return all(
        getattr(wrapper, '_inner_count', 0) % getattr(wrapper, '_accumulative_counts', 1) == 0
        for wrapper in optim_wrappers(runner.optim_wrapper)
    )


@LOOPS.register_module()
class IterBasedTrainLoop(_Resumable, MMEngineIterLoop):
    """Train for a number of iterations. Arguments are those of :class:`mmengine.runner.IterBasedTrainLoop`."""

    def run(self) -> Any:
        """Train from the current iteration.

        Raises:
            Stopped: After a signal, when the state is saved.
        """
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        batches = infinite_batches(self.dataloader, self._iter)
        self._validate_if_due(self._iter, self._max_iters)  # the stopped run may not have done it
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            seed_iteration(self.runner.seed, self._iter, get_rank())
            self.run_iter(batch)
            self._stop_if_requested()
            self._validate_if_due(self._iter, self._max_iters)
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model


@LOOPS.register_module()
class EpochBasedTrainLoop(_Resumable, MMEngineEpochLoop):
    """Train for a number of epochs. Arguments are those of :class:`mmengine.runner.EpochBasedTrainLoop`."""

    def run(self) -> Any:
        """Train from the current iteration, which may be within an epoch.

        Raises:
            Stopped: After a signal, when the state is saved.
        """
        self.runner.call_hook('before_train')
        epoch, begun, *_ = self.runner.message_hub.get_info(_EPOCH) or (-1, self._iter)
        if epoch != self._epoch or begun == self._iter:  # not in the middle of an epoch
            begun = self._iter
            self._validate_if_due(self._epoch, self._max_epochs)
        while self._epoch < self._max_epochs and not self.stop_training:
            self._train_epoch(begun)
            begun = self._iter
            self._validate_if_due(self._epoch, self._max_epochs)
        self.runner.call_hook('after_train')
        return self.runner.model

    def _train_epoch(self, begun: int) -> None:
        """Train the rest of the epoch that began at iteration ``begun``."""
        self.runner.message_hub.update_info(_EPOCH, [self._epoch, begun])
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self.dataloader.batch_sampler.start_epoch(begun, self._iter - begun)
        for index, batch in enumerate(self.dataloader, done):
            seed_iteration(self.runner.seed, self._iter, get_rank())
            self.run_iter(index, batch)
            # After its last iteration, the epoch ends with its own checkpoint first.
            if index + 1 < len(self.dataloader):
                self._stop_if_requested()
        if self._iter == begun:
            raise empty_loader_error(self.dataloader)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self._stop_if_requested()


@LOOPS.register_module()
class ValLoop(MMEngineValLoop):
    """Validate. Arguments are those of :class:`mmengine.runner.ValLoop`."""

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Predict one batch.

        Raises:
            stopping.StopRequested: After a signal; the model is as it was before the validation.
        """
        super().run_iter(idx, data_batch)
        # Processes with different numbers of batches cannot communicate after each of them.
        agreeing = get_world_size() == 1 or getattr(self.dataloader.sampler, 'round_up', False)
        signal = stopping.requested_signal() if agreeing and _between_steps(self.runner) else None
        if signal is not None:
            for hook in self.runner.hooks:
                if isinstance(hook, EMAHook):
                    hook._swap_ema_parameters()  # as in its after_val_epoch
            raise stopping.StopRequested(signal)
