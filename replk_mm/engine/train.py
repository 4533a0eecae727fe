"""Train a prepared config."""
import errno
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_rank

from replk_mm.engine import memory
from replk_mm.engine.machine import last_checkpoint
from replk_mm.engine.runner import Runner
from replk_mm.errors import UserError


def train(cfg: Config, notes: list[str]) -> Path:
    """Train a prepared config.

    Returns:
        The last checkpoint.

    Raises:
        UserError: If the data, the disk or the memory fail on the way.
        KeyboardInterrupt: On Ctrl-C, after saying how to go on.
    """
    runner = Runner.from_cfg(cfg)
    for note in notes:
        runner.logger.info(note)
    try:
        runner.train()
    except KeyboardInterrupt:
        last = last_checkpoint(cfg.work_dir)
        if get_rank() == 0:
            print(f'\nstopped at iteration {runner.iter}; '
                  + (f'--resume goes on from {last}' if last else 'no checkpoint was written yet'), file=sys.stderr)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            last = last_checkpoint(cfg.work_dir)
            raise UserError(f'{cfg.work_dir}: writing failed at iteration {runner.iter} ({error.strerror})\n'
                            f'Make room or mend the permissions, then go on with --resume'
                            + (f' {last}.' if last else '.')) from error
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or 'alloc' in str(error) or 'out of memory' in str(error):
            raise UserError(
                f'out of memory at iteration {runner.iter}, crop size {memory.crop_of(cfg)}, '
                f'{cfg.train_dataloader.batch_size} images a process: {(str(error) or "no memory").splitlines()[0]}\n'
                f'Lower train_dataloader.batch_size or the crop size, or set model.backbone.with_cp=True.') from error
        raise
    last = last_checkpoint(cfg.work_dir)
    return Path(last) if last else Path(cfg.work_dir)
