"""mmengine's runner and checkpoint hook, mended where a run of ours needs it."""
import ctypes
import functools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMEngineRunner
from torch.utils.data import DataLoader

from replk_mm.engine.explain import explaining
from replk_mm.errors import UserError
from replk_mm.registry import HOOKS


class Runner(MMEngineRunner):
    """mmengine's runner: trains with several processes on CPUs, names a wrong field, leaves no half checkpoint."""

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'Runner':
        """Build a runner; loaders, optimizer and schedules follow when it trains or tests."""
        with explaining(cfg, 'run'):
            return super().from_cfg(cfg)

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False) -> DataLoader:
        """Build a loader whose worker processes end with this one, in whatever way it ends."""
        loader = MMEngineRunner.build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = functools.partial(_start_worker, os.getpid(), loader.worker_init_fn)
        return loader

    def build_train_loop(self, loop: dict) -> BaseLoop:
        """Build the loop with its loader and data set."""
        with explaining(self.cfg, 'train_dataloader'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: dict) -> BaseLoop:
        """Build the loop with its loader, data set and metrics."""
        with explaining(self.cfg, 'val_dataloader'):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: dict) -> BaseLoop:
        """Build the loop with its loader, data set and metrics."""
        with explaining(self.cfg, 'test_dataloader'):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: dict) -> OptimWrapper:
        """Build the optimizer and what wraps it."""
        with explaining(self.cfg, 'optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: dict | list) -> list | dict:
        """Build the schedules of the learning rate."""
        with explaining(self.cfg, 'param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training; on CPUs without device ids, which mmengine 0.10.7 always passes."""
        if self.distributed and get_device() == 'cpu' and not is_model_wrapper(model) and not model_wrapper_cfg:
            return MMDistributedDataParallel(model, broadcast_buffers=False,
                                             find_unused_parameters=self.cfg.get('find_unused_parameters', False))
        return super().wrap_model(model_wrapper_cfg, model)

    def load_or_resume(self) -> None:
        """Load or resume; an optimizer's state must be of this run's parameter groups."""
        try:
            super().load_or_resume()
        except ValueError as error:
            if 'parameter group' not in str(error):
                raise
            raise UserError(f'{self._load_from}: cannot be resumed: {error}\n'
                            f'Resume with the optim_wrapper of that run.') from error

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Write a checkpoint that has its name only when it is whole."""
        if '://' in str(out_dir):
            return super().save_checkpoint(out_dir, filename, *args, **kwargs)
        part = Path(out_dir, f'{filename}.part')
        try:
            super().save_checkpoint(out_dir, part.name, *args, **kwargs)
            part.replace(Path(out_dir, filename))
        finally:
            part.unlink(missing_ok=True)
        return None


def _start_worker(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    # A worker with samples of some size in hand waits until they are taken: for ever, with its memory and its locks, if the
    # process that would take them was killed. Linux can end it then.
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before this was said
            os._exit(1)
    if then is not None:
        then(worker)


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's hook, which removes old checkpoints only after the new one is written."""

    keep_ckpt_ids: deque

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        keep, outdated = self.max_keep_ckpts, []
        if keep > 0:
            ids = [*(i for i in self.keep_ckpt_ids if i != step), step]
            outdated, self.keep_ckpt_ids = ids[:-keep], deque(ids[-keep:], keep)
            runner.message_hub.update_info('keep_ckpt_ids', ids[-keep:])
        # mmengine removes before it writes, so that a full disk would leave neither; a step it finds kept it passes over.
        super()._save_checkpoint_with_step(runner, step, meta)
        for old in outdated if is_main_process() else ():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
