"""Train a prepared config."""

import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.dist import barrier, get_rank

from replk_mm.engine import stopping
from replk_mm.engine.resuming import RESUMABLE, last_checkpoint
from replk_mm.engine.runner import Runner, explain_failures
from replk_mm.errors import Stopped, UserError
from replk_mm.logs import Note, announce, log_notes


def train(cfg: Config, notes: list[str], preflight: bool = True, overwrite: bool = False) -> Path:
    """Train a prepared config.

    Args:
        cfg: From :func:`replk_mm.engine.prepare.prepare_training`.
        notes: Lines for the log.
        preflight: Dry-run each part before the first iteration. Defaults to True.
        overwrite: Remove the checkpoints of the former run in the work directory. Defaults to False.

    Returns:
        The last checkpoint.

    Raises:
        UserError: For bad data, a full disk or lack of memory, and if another process trains in the work directory.
        Stopped: After a signal, when the state is saved.
        KeyboardInterrupt: After a second Ctrl-C.
    """
    names = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')  # there is no process group yet
    is_first = os.environ.get(names.get(cfg.launcher, ''), '0') == '0'
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(Path(cfg.work_dir, 'lock'), timeout=1) if is_first else nullcontext())
        except OSError as error:  # Timeout is one
            why = 'another process is training there' if isinstance(error, Timeout) else f'cannot be locked ({error})'
            raise UserError(f'{cfg.work_dir}: {why}\nWait for it, or choose another folder.') from error
        return _train(cfg, notes, preflight, overwrite)


def _train(cfg: Config, notes: list[str], preflight: bool, overwrite: bool) -> Path:
    runner = Runner.from_cfg(cfg)
    hooks = ['ParameterGroupsHook', 'DistributedSyncHook', 'StopAtNonFinite', 'ProgressHook']
    replaces = overwrite and not cfg.get('resume')
    for name in [*hooks, *['PreflightHook'] * preflight, *['OverwriteHook'] * replaces]:
        runner.register_hook(dict(type=f'replk_mm.{name}'))
    log_notes([*notes, Note(f'log file: {runner.logger.log_file}')])
    try:
        # Other loops would ignore the recorded signal.
        signals = stopping.catch_signals() if runner.cfg.train_cfg.get('type') in RESUMABLE else nullcontext()
        with signals, explain_failures(cfg, runner):
            runner.train()
    except Stopped:
        raise
    except KeyboardInterrupt:
        last = last_checkpoint(cfg.work_dir)
        if get_rank() == 0:
            print(
                f'\nstopped at iteration {runner.iter}; '
                + (f'--resume continues from {last}' if last else 'no checkpoint was written yet'),
                file=sys.stderr,
            )
        raise
    if runner.iter < runner.max_iters:
        announce(
            f'a hook has ended the training at iteration {runner.iter} of {runner.max_iters}; the log file names it'
        )
    barrier()  # rank 0 may still be writing
    last = last_checkpoint(cfg.work_dir)
    return Path(last) if last else Path(cfg.work_dir)
