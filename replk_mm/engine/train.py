"""Train a prepared config."""

import sys
from contextlib import nullcontext
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import barrier, get_rank

from replk_mm.engine import stopping
from replk_mm.engine.resuming import RESUMABLE, last_checkpoint
from replk_mm.engine.runner import Runner, explain_failures
from replk_mm.errors import Stopped
from replk_mm.logs import Note, announce, log_notes


def train(cfg: Config, notes: list[str], preflight: bool = True) -> Path:
    """Train a prepared config.

    Args:
        cfg: From :func:`replk_mm.engine.prepare.prepare_training`.
        notes: Lines for the log.
        preflight: Dry-run each part before the first iteration. Defaults to True.

    Returns:
        The last checkpoint.

    Raises:
        UserError: For bad data, a full disk or lack of memory.
        Stopped: After a signal, when the state is saved.
        KeyboardInterrupt: After a second Ctrl-C.
    """
    runner = Runner.from_cfg(cfg)
    hooks = ['ParameterGroupsHook', 'DistributedSyncHook', 'StopAtNonFinite', 'ProgressHook', 'PreflightHook']
    for name in hooks if preflight else hooks[:-1]:
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
