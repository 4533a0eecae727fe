"""mmengine's training loops, which go on at the very sample where a run was stopped, and stop when they are asked to."""
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EMAHook
from mmengine.runner import BaseLoop
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterLoop
from mmengine.runner import ValLoop as MMEngineValLoop
from torch.utils.data import DataLoader

from replk_mm.data.draws import DrawnLoader, Draws, drawn, endless
from replk_mm.engine import stopping
from replk_mm.engine.randomness import seed_iteration, seed_sample
from replk_mm.errors import Stopped
from replk_mm.registry import LOOPS

# Key of the message hub: the iteration that was last validated after. What begins with "val" mmengine logs.
_VALIDATED = 'last_validation'


class _Resumable(BaseLoop):
    """What both loops share: seeds, validations, and the end when a signal asks for it."""

    dataloader: DrawnLoader
    _iter: int
    _epoch: int

    def __init__(self, runner: Any, dataloader: DataLoader | dict, *args, **kwargs) -> None:
        loader = dataloader
        if isinstance(loader, dict):
            loader = runner.build_dataloader(loader, seed=runner.seed,
                                             diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False))
        draws = drawn(loader, partial(seed_sample, runner.seed), get_rank(), get_world_size())
        super().__init__(runner, draws, *args, **kwargs)

    def _validate(self) -> None:
        """Validate, unless it was done before the run was stopped."""
        hub = self.runner.message_hub
        before = hub.get_info(_VALIDATED, -1)
        if before == self._iter:
            return
        # Said before it is true: a new best checkpoint is written at its end.
        hub.update_info(_VALIDATED, self._iter)
        try:
            self.runner.val_loop.run()
        except stopping.Asked as asked:
            hub.update_info(_VALIDATED, before)
            raise Stopped(asked.signal, self.runner.save_state()) from None

    def _stop_if_asked(self) -> None:
        # Accumulated gradients are not saved: between the steps of the optimizer there is no state to go on from.
        steps = self.runner.optim_wrapper
        if getattr(steps, '_accumulative_counts', 1) > 1 and steps._inner_count % steps._accumulative_counts:
            return
        signal = stopping.asked()
        if signal is not None:
            raise Stopped(signal, self.runner.save_state())


@LOOPS.register_module()
class IterBasedTrainLoop(_Resumable, MMEngineIterLoop):
    """Train for a number of iterations. Arguments are those of :class:`mmengine.runner.IterBasedTrainLoop`."""

    def run(self) -> Any:
        """Train, from where the run is.

        Raises:
            Stopped: When a signal has asked for it, and the state is saved.
        """
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        batches = endless(self.dataloader, self._iter)
        self._validate_if_due()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            seed_iteration(self.runner.seed, self._iter, get_rank())
            self.run_iter(batch)
            self._stop_if_asked()
            self._decide_current_val_interval()
            self._validate_if_due()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _validate_if_due(self) -> None:
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        if self.runner.val_loop is not None and self._iter >= max(1, self.val_begin) and due:
            self._validate()


@LOOPS.register_module()
class EpochBasedTrainLoop(_Resumable, MMEngineEpochLoop):
    """Train for a number of epochs. Arguments are those of :class:`mmengine.runner.EpochBasedTrainLoop`."""

    def run(self) -> Any:
        """Train, from where the run is, within an epoch too.

        Raises:
            Stopped: When a signal has asked for it, and the state is saved.
        """
        self.runner.call_hook('before_train')
        self._validate_if_due()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            self._validate_if_due()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Train the rest of the current epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        draws: Draws = self.dataloader.batch_sampler  # type: ignore[assignment]
        number = self._epoch * len(self.dataloader)
        done = draws.begin(number, self._iter - number)
        for index, batch in zip(count(done), self._batches(done), strict=False):
            seed_iteration(self.runner.seed, self._iter, get_rank())
            self.run_iter(index, batch)
            # After the last iteration the epoch has an end first, with a checkpoint of its own.
            if index + 1 < len(self.dataloader):
                self._stop_if_asked()
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self._stop_if_asked()

    def _batches(self, done: int) -> Iterator[Any]:
        return iter(self.dataloader) if done < len(self.dataloader) else iter(())

    def _validate_if_due(self) -> None:
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        at_end = self._iter == self._epoch * len(self.dataloader)
        if self.runner.val_loop is not None and at_end and self._epoch >= max(1, self.val_begin) and due:
            self._validate()


@LOOPS.register_module()
class ValLoop(MMEngineValLoop):
    """Validate. Arguments are those of :class:`mmengine.runner.ValLoop`."""

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Predict one batch.

        Raises:
            stopping.Asked: When a signal has asked to stop; the model is then as it was before the validation.
        """
        super().run_iter(idx, data_batch)
        # Processes that do not take as many batches each cannot agree after each of them.
        agreeing = get_world_size() == 1 or getattr(self.dataloader.sampler, 'round_up', False)
        signal = stopping.asked() if agreeing else None
        if signal is not None:
            for hook in self.runner.hooks:
                if isinstance(hook, EMAHook):
                    hook._swap_ema_parameters()  # what its after_val_epoch does; other hooks would count the validation
            raise stopping.Asked(signal)
