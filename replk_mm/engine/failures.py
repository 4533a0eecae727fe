"""Lack of disk space and of memory during a run, explained."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config

from replk_mm.data.datasets import crop_of
from replk_mm.engine.machine import is_out_of_memory
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.runner import Runner
from replk_mm.errors import UserError


@contextmanager
def naming_failures(cfg: Config, runner: Runner) -> Iterator[None]:
    """Turn a full disk and a lack of memory into messages that say where and what to do.

    Raises:
        UserError: Instead of the libraries' errors for the two.
    """
    split = 'train' if 'train_dataloader' in cfg else 'test'
    try:
        yield
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
