"""What a run that is under way can fail of, in words: the disk and the memory."""
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config

from replk_mm.data.datasets import crop_of
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.runner import Runner
from replk_mm.errors import UserError

#: Errors of a file system that takes no more.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextmanager
def naming_failures(cfg: Config, runner: Runner) -> Iterator[None]:
    """Turn a full disk and a lack of memory into messages that say where and what to do.

    Raises:
        UserError: Instead of the libraries' errors for the two.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK:
            last = last_checkpoint(cfg.work_dir) if 'train_dataloader' in cfg else None
            raise UserError(f'{error.filename or cfg.work_dir}: writing failed at iteration {runner.iter} ({error.strerror})\n'
                            f'Make room or mend the permissions' + (f', then go on with --resume {last}.' if last else '.')
                            ) from error
        raise
    except (RuntimeError, MemoryError) as error:
        text = (str(error) or 'no memory').splitlines()[0]
        if isinstance(error, MemoryError) or 'alloc' in text or 'out of memory' in text:
            loader = cfg.get('train_dataloader') or cfg.test_dataloader
            size = crop_of(cfg)
            raise UserError(
                f'out of memory at iteration {runner.iter}, {loader.batch_size} images a process'
                + (f' of {size[0]}x{size[1]} pixels' if size else '') + f': {text}\n'
                f'Lower batch_size of the data loader or the crop size; in training model.backbone.with_cp=True helps too.'
            ) from error
        raise
