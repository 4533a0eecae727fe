"""Train a prepared config."""
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_rank

from replk_mm.engine.failures import naming_failures
from replk_mm.engine.machine import last_checkpoint
from replk_mm.engine.runner import Runner


def train(cfg: Config, notes: list[str]) -> Path:
    """Train a prepared config.

    Returns:
        The last checkpoint.

    Raises:
        UserError: If the data, the disk or the memory fail on the way.
        KeyboardInterrupt: On Ctrl-C, after saying how to go on.
    """
    runner = Runner.from_cfg(cfg)
    runner.register_hook(dict(type='replk_mm.ParameterGroupsHook'))
    for note in notes:
        runner.logger.info(note)
    try:
        with naming_failures(cfg, runner):
            runner.train()
    except KeyboardInterrupt:
        last = last_checkpoint(cfg.work_dir)
        if get_rank() == 0:
            print(f'\nstopped at iteration {runner.iter}; '
                  + (f'--resume goes on from {last}' if last else 'no checkpoint was written yet'), file=sys.stderr)
        raise
    last = last_checkpoint(cfg.work_dir)
    return Path(last) if last else Path(cfg.work_dir)
