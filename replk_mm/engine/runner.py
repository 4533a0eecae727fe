"""mmengine's runner, extended."""

import contextlib
import errno
import functools
import io
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, is_main_process, master_only
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop
from mmengine.runner import Runner as MMEngineRunner
from torch.utils.data import DataLoader

from replk_mm.checkpoints.io import read_checkpoint, restore_log_buffer, to_plain_data
from replk_mm.data.datasets import crop_of
from replk_mm.data.transforms import check_loading
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.engine.freezing import freeze_backbone
from replk_mm.engine.hooks import INTERIM
from replk_mm.engine.inference import load_model
from replk_mm.engine.process import is_out_of_memory
from replk_mm.engine.resuming import adopt_settings, check_schedules, last_checkpoint, settings_of
from replk_mm.engine.stopping import ignore_signals_in_workers
from replk_mm.errors import UserError, first_line, format_list
from replk_mm.files import write_atomic
from replk_mm.logs import announce, limit_terminal
from replk_mm.wrappers import num_classes_of, unwrap_model


def _explained(build: Callable, part: str) -> Callable:
    """Wrap a builder of mmengine's runner: errors name the field of ``cfg[part]``, loading checks the labels."""

    @functools.wraps(build)
    def explained(runner: 'Runner', *args) -> Any:
        # pycocotools prints while it reads annotations.
        with explain_build_errors(runner.cfg, part), contextlib.redirect_stdout(io.StringIO()):
            built = build(runner, *args)
            if isinstance(built, BaseLoop):
                if getattr(built, 'max_iters', 1) == 0:  # mmengine would train nothing, and succeed
                    count = len(built.dataloader.dataset)
                    raise UserError(f'{part}: {count} images give no batch\nLower batch_size, or set drop_last=False.')
                check_loading(built.dataloader.dataset, num_classes_of(unwrap_model(runner.model)))
            return built

    return explained


class Runner(MMEngineRunner):
    """mmengine's runner, which also trains with several processes on CPUs and names config fields in errors.

    It writes checkpoints of plain data atomically, and loads checkpoints without running code in them."""

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'Runner':
        """Build a runner; loaders, optimizer and schedules follow when it trains or tests."""
        with explain_build_errors(cfg, 'run'):
            return super().from_cfg(cfg)

    def dump_config(self) -> None:
        """Write the config to the work directory; that of a test, and one that was read there, to the log folder."""
        name = Path(self.cfg.filename or f'{self.timestamp}.py').name
        folder = Path(self.work_dir)
        read = self.cfg.filename and os.path.realpath(self.cfg.filename) == os.path.realpath(folder / name)
        write_atomic(Path(self._log_dir if read or self._train_loop is None else folder, name), self.cfg.pretty_text)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Build the logger, which prints less than it writes to its file; see :mod:`replk_mm.logs`."""
        return limit_terminal(super().build_logger(*args, **kwargs))

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a loader whose worker processes ignore the signals that stop this one."""
        return ignore_signals_in_workers(MMEngineRunner.build_dataloader(dataloader, seed, diff_rank_seed))

    build_train_loop = _explained(MMEngineRunner.build_train_loop, 'train_dataloader')
    build_val_loop = _explained(MMEngineRunner.build_val_loop, 'val_dataloader')
    build_test_loop = _explained(MMEngineRunner.build_test_loop, 'test_dataloader')
    build_optim_wrapper = _explained(MMEngineRunner.build_optim_wrapper, 'optim_wrapper')
    build_param_scheduler = _explained(MMEngineRunner.build_param_scheduler, 'param_scheduler')

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build the model; for a training with ``freeze_backbone = True``, with a frozen backbone."""
        built = super().build_model(model)
        if self.cfg.get('freeze_backbone') and self.cfg.get('train_cfg'):
            freeze_backbone(built)
        return built

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training. On CPUs without device ids, which mmengine 0.10.7 always passes."""
        if self.distributed and get_device() == 'cpu' and not is_model_wrapper(model) and not model_wrapper_cfg:
            return MMDistributedDataParallel(
                model, broadcast_buffers=False, find_unused_parameters=self.cfg.get('find_unused_parameters', False)
            )
        return super().wrap_model(model_wrapper_cfg, model)

    def load_or_resume(self) -> None:
        """Load or resume. The optimizer and the schedules of the checkpoint must be of the config's types.

        mmengine restores their settings too. Where these differ from the config, the config is changed, with a warning.
        """
        configured = settings_of(self.optim_wrapper, self.param_schedulers) if self._resume else None
        try:
            super().load_or_resume()
            if configured:
                restored = settings_of(self.optim_wrapper, self.param_schedulers)
                for path, (first, *_) in configured.items():
                    if (end := restored[path][0].get('end', 0)) < (wanted := first.get('end', 0)):
                        raise UserError(
                            f'{self._load_from}: cannot be resumed for a longer training: {path}.end is {end} in the '
                            f'checkpoint, and {wanted} in the config\nStart a new run from its weights: --cfg-options '
                            f'load_from={self._load_from}, without --resume.'
                        )
                if changes := adopt_settings(self.cfg, configured, restored):
                    self.dump_config()
                    announce(
                        f'warning: resume: the checkpoint sets {format_list(changes, 8)}. New settings need a new run: '
                        f'--cfg-options load_from={self._load_from}, without --resume',
                        logging.WARNING,
                    )
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            if not self._resume:
                raise
            kind = 'its state has no' if isinstance(error, KeyError) else f'{type(error).__name__}:'
            what = str(error) if isinstance(error, ValueError) else f'{kind} {error}'
            raise UserError(
                f'{self._load_from}: cannot be resumed: {what}\n'
                f'Resume with the optim_wrapper and param_scheduler of that run.'
            ) from error

    def load_checkpoint(self, filename: str, map_location: Any = 'cpu', *args, **kwargs) -> dict:
        """Load a checkpoint without running code. mmengine unpickles it, and executes its config when it resumes.

        Args:
            filename: Path or URL. mmengine loads URLs such as s3://, in part if they do not fit.
            map_location: Device, for those URLs.
            *args, **kwargs: Other arguments of mmengine's method, for those URLs.

        Raises:
            UserError: If the checkpoint does not fit; see :func:`~replk_mm.engine.inference.load_model`.
        """
        if '://' in filename and not filename.startswith(('http', 'file:')):
            return super().load_checkpoint(filename, map_location, *args, **kwargs)
        model = unwrap_model(self.model)
        if self._resume:
            checkpoint = read_checkpoint(filename)
            self._restore_hub(checkpoint)
            check_schedules(self.param_schedulers, checkpoint.get('param_schedulers'))
        else:
            _, meta = load_model(model, filename, training=True, resize_kernels=self.cfg.get('resize_kernels'))
            checkpoint = {'meta': meta, 'state_dict': model.state_dict()}
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)  # EMAHook reads and exchanges the weights
        model.load_state_dict(checkpoint['state_dict'])
        self._has_loaded = True
        return checkpoint

    def _restore_hub(self, checkpoint: dict) -> None:
        """Restore the objects in a checkpoint's message hub that mmengine's hooks expect."""
        checkpoint['meta'].pop('config', None)  # mmengine would execute it
        hub = checkpoint['message_hub']
        hub['log_scalars'] = {key: restore_log_buffer(stored) for key, stored in hub['log_scalars'].items()}
        # Do not replace the best checkpoint of another run.
        folder = Path(self.work_dir).absolute()
        others = [
            key
            for key, value in hub['runtime_info'].items()
            if key.startswith('best_ckpt') and Path(str(value)).parent.absolute() != folder
        ]
        for key in others:
            hub['runtime_info'].pop(key)
            hub['resumed_keys'].pop(key, None)

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call a method of every hook. A checkpoint to save is converted to plain data afterwards."""
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_save_checkpoint':
            checkpoint = kwargs['checkpoint']
            content = to_plain_data(checkpoint)
            checkpoint.clear()
            checkpoint.update(content)

    def save_state(self) -> str:
        """Save a checkpoint between two iterations, unless a hook just saved one.

        Returns:
            Path of the checkpoint.
        """
        loop: Any = self.train_loop
        for hook in self.hooks:
            if getattr(hook, 'saved_iter', -1) == loop.iter:
                return hook.last_ckpt
        name = f'iter_{loop.iter}.pth'
        if isinstance(loop, EpochBasedTrainLoop):
            name = f'epoch_{loop.epoch}_{name}'
        path = Path(self.work_dir, name)
        former = self.message_hub.get_info(INTERIM)
        self.message_hub.update_info(INTERIM, str(path))
        self.save_checkpoint(self.work_dir, name, meta=dict(epoch=loop.epoch, iter=loop.iter))
        if is_main_process():
            write_atomic(Path(self.work_dir, 'last_checkpoint'), str(path))
            if former and Path(former).name != name:
                Path(self.work_dir, Path(former).name).unlink(missing_ok=True)
        barrier()  # a launcher may end all processes as soon as the first has ended
        return str(path)

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """Write a checkpoint atomically."""
        if '://' in str(out_dir):
            return super().save_checkpoint(out_dir, filename, *args, **kwargs)
        part = Path(out_dir, f'{filename}.part')
        for name in (part.name, 'last_checkpoint'):  # the hook that saves writes the second one
            if Path(out_dir, name).is_symlink():  # it would be followed
                Path(out_dir, name).unlink()
        try:
            super().save_checkpoint(out_dir, part.name, *args, **kwargs)
            with part.open('rb+') as file:
                os.fsync(file.fileno())  # the content must reach the disk before the name
            part.replace(Path(out_dir, filename))
        finally:
            part.unlink(missing_ok=True)
        return None


@contextmanager
def explain_failures(cfg: Config, runner: Runner) -> Iterator[None]:
    """Turn a full disk, a lack of memory, and settings that hooks or metrics cannot use into user errors.

    Raises:
        UserError: For all of them. The log file has the traceback of the last kind.
    """
    split = 'train' if 'train_dataloader' in cfg else 'test'
    try:
        yield
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        runner.logger.error(traceback.format_exc(), extra={'terminal': False})
        raise UserError(
            f'{cfg.filename}: {split} stops at iteration {runner.iter}: {type(error).__name__}: {first_line(error)}\n'
            f'Check the config; the log file {runner.logger.log_file} has the traceback.'
        ) from error
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            last = last_checkpoint(cfg.work_dir) if split == 'train' else None
            raise UserError(
                f'{error.filename or cfg.work_dir}: writing failed at iteration {runner.iter} '
                f'({error.strerror})\nFree disk space or fix the permissions'
                + (f', then continue with --resume {last}.' if last else '.')
            ) from error
        if not is_out_of_memory(error):
            raise
        size = crop_of(cfg)
        raise UserError(
            f'out of memory at iteration {runner.iter}, with {split}_dataloader.batch_size='
            f'{cfg[f"{split}_dataloader"].batch_size}'
            + (f' and crops of {size[0]}x{size[1]} pixels' if size else '')
            + f': {(str(error) or "no memory").splitlines()[0]}\n'
            f'Lower the batch size or the crop size; for training, also set model.backbone.with_cp=True.'
        ) from error
