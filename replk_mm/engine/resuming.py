"""Choose the checkpoint that a run resumes from, and check that it fits."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.loading import get_reparameterization
from replk_mm.data.checks.classes import compare_with_checkpoint
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError, first_line

# Names of regular checkpoints. A best checkpoint has a prefix and may be older.
_NAME = re.compile(r'(?:epoch_(\d+))?_?(?:iter_(\d+))?\.pth')
#: Training loops that resume exactly, by type.
RESUMABLE = ('replk_mm.IterBasedTrainLoop', 'replk_mm.EpochBasedTrainLoop')


def last_checkpoint(work_dir: str | Path) -> str | None:
    """The last checkpoint of a training in ``work_dir``, also if the folder was moved."""
    found = _checkpoints(work_dir)
    return str(found[0]) if found else None


def _checkpoints(work_dir: str | Path) -> list[Path]:
    """All checkpoints of a work directory: first that of the file ``last_checkpoint``, then the newest ones."""
    record = Path(work_dir, 'last_checkpoint')
    named = Path(record.read_text(errors='replace').strip()) if record.is_file() else Path(work_dir)
    if (moved := Path(work_dir, named.name)).is_file():
        named = moved
    numbers = {
        path: [int(n or 0) for n in match.groups()]
        for path in Path(work_dir).glob('*.pth')
        if (match := _NAME.fullmatch(path.name)) and path.is_file()
    }
    latest = sorted(numbers, key=lambda path: (path.stat().st_mtime_ns, numbers[path]), reverse=True)
    return [*([named] if named.is_file() else []), *(path for path in latest if path != named)]


def _last_whole(work_dir: str) -> tuple[Path | None, list[str]]:
    """The last checkpoint that can be read, and a line for each that was skipped."""
    notes: list[str] = []
    for path in _checkpoints(work_dir):
        problem = _damage(path)
        if problem is None:
            return path, notes
        notes.append(f'resume: {path} is damaged ({problem}); using the previous one')
    return None, notes


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # torch does not verify the checksums
        return f'the content of {wrong} has changed' if wrong else None
    except Exception as error:  # zipfile raises several types
        return first_line(error)


def resume(cfg: Config, options: RunOptions, model: nn.Module) -> list[str]:
    """Choose the checkpoint to resume from. The seed is that of the checkpoint, since the data order depends on it.

    Args:
        cfg: Changed in place.
        options: ``resume`` and ``seed`` are used.
        model: Built from the config, on any device.

    Returns:
        One line per choice.

    Raises:
        UserError: If no checkpoint can be read, or the checkpoint does not fit the run.
    """
    notes: list[str] = []
    if options.seed is not None:
        cfg.randomness = {**cfg.get('randomness', {}), 'seed': options.seed}
    of_new_run = [] if options.seed is None else [f'seed: {options.seed}']
    wanted = options.resume or ((cfg.get('load_from') or 'auto') if cfg.get('resume') else None)
    if wanted is None:
        return of_new_run
    if wanted == 'auto':
        newest, notes = _last_whole(cfg.work_dir)
        if newest is None and notes:
            raise UserError(
                f'{cfg.work_dir}: no checkpoint of this run can be resumed from ({len(notes)} tried)\n'
                + '\n'.join(notes)
                + '\nCopy a checkpoint to it, or start a new run without --resume.'
            )
        if newest is None:
            return [*of_new_run, f'resume: no checkpoint in {cfg.work_dir} yet, starting a new run']
        wanted = newest
    last = str(wanted)
    loaded = read_checkpoint(last)
    if 'optimizer' not in loaded:
        merged = get_reparameterization(loaded, ())
        raise UserError(
            f'{last}: cannot be resumed: it has no optimizer state'
            + (' (reparameterized checkpoints are for inference)' if merged else '')
            + '\nResume from a checkpoint that training wrote.'
        )
    meta = loaded.get('meta') or {}
    parts = (loaded.get('state_dict'), loaded.get('message_hub'))
    if None in (meta.get('iter'), meta.get('epoch')) or not all(isinstance(part, Mapping) for part in parts):
        raise UserError(
            f'{last}: cannot be resumed: it lacks its weights, its iteration, its epoch or the state of the hooks\n'
            f'Resume from a checkpoint that training wrote.'
        )
    limit = cfg.train_cfg.get('max_iters')
    if limit is not None and meta['iter'] > limit:
        raise UserError(
            f'{last}: cannot be resumed: it is at iteration {meta["iter"]}, and the training ends at {limit}\n'
            f'Train longer with --max-iters, or resume from an earlier checkpoint.'
        )
    compare_with_checkpoint(cfg, meta, last, ('train',))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    stored = {key: value.shape for key, value in loaded['state_dict'].items()}
    differing = sorted(key for key in shapes.keys() | stored.keys() if shapes.get(key) != stored.get(key))
    if differing:
        raise UserError(
            f'{last}: cannot be resumed: it belongs to another network; {len(differing)} of '
            f'{len(shapes.keys() | stored.keys())} '
            f'weights differ, such as {differing[0]}\nResume with the config of that run.'
        )
    notes += _averages(cfg, loaded, last)
    cfg.load_from, cfg.resume = last, True
    seed = meta.get('seed')
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
    own = (
        ''
        if options.seed in (None, seed)
        else f' (that of the checkpoint; --seed {options.seed} applies to new runs only)'
    )
    return [*notes, *_schedule_that_ends(cfg, loaded), f'resume: {last}, iteration {meta["iter"]}, seed {seed}{own}']


def _averages(cfg: Config, loaded: Mapping, last: str) -> list[str]:
    """Check that a run with averaged weights is resumed with the hook that averages them.

    mmengine's hook stores the averages as ``state_dict`` and the weights in training as ``ema_state_dict``.

    Raises:
        UserError: If training would continue from the averages.
    """
    hooks = [
        HOOKS.get(hook['type']) if isinstance(hook, dict) else type(hook) for hook in cfg.get('custom_hooks') or ()
    ]
    averaging = any(isinstance(hook, type) and issubclass(hook, EMAHook) for hook in hooks)
    if 'ema_state_dict' in loaded and not averaging:
        raise UserError(
            f'{last}: cannot be resumed: it has averaged weights, and custom_hooks has no EMAHook; training would '
            f'continue from the averages\nAdd the EMAHook of that run to custom_hooks.'
        )
    if averaging and 'ema_state_dict' not in loaded:
        return [f'warning: {last}: has no averaged weights; EMAHook averages from this iteration on']
    return []


def _schedule_that_ends(cfg: Config, loaded: Mapping) -> list[str]:
    """Warn if the schedules of the checkpoint, which replace those of the config, end before the run."""
    schedules = loaded.get('param_schedulers')
    iterations = (cfg.get('train_cfg') or {}).get('max_iters')
    ends = [
        schedule['end']
        for schedule in (schedules if isinstance(schedules, list) else ())
        if isinstance(schedule, Mapping) and isinstance(schedule.get('end'), int) and not schedule.get('by_epoch')
    ]
    if not ends or not iterations or max(ends) >= iterations:
        return []
    return [
        f"warning: the learning rate follows the checkpoint's schedule, which ends at iteration {max(ends)}; this run "
        f'has {iterations}, the rest of them at the last rate. For a longer schedule, start a new run with '
        f'--cfg-options load_from=CKPT, without --resume'
    ]
