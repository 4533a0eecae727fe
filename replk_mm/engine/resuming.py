"""Choose the checkpoint that a run resumes from, and check that it fits."""

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.loading import get_reparameterization
from replk_mm.data.checks.classes import compare_with_checkpoint
from replk_mm.data.datasets import as_list
from replk_mm.engine.config_errors import arguments_of
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError, first_line, format_list
from replk_mm.files import check_outputs
from replk_mm.logs import Note

# Names of regular checkpoints. A best checkpoint has a prefix and may be older.
_NAME = re.compile(r'(?:epoch_(\d+))?_?(?:iter_(\d+))?\.pth')
# Entries of a parameter group or a schedule that are no settings.
_NO_SETTING = re.compile('params|param_names|differentiable|initial_|verbose|last_step')
#: Training loops that resume exactly, by type.
RESUMABLE = ('replk_mm.IterBasedTrainLoop', 'replk_mm.EpochBasedTrainLoop')


def last_checkpoint(work_dir: str | Path) -> str | None:
    """The last checkpoint of a training in ``work_dir``, also if the folder was moved."""
    found = _checkpoints(work_dir)
    return str(found[0]) if found else None


def require_no_run(work_dir: str | Path, overwrite: bool = False, sources: Iterable[str | Path] = ()) -> None:
    """Check that a new training replaces no checkpoints, or, with ``overwrite``, none of its ``sources``.

    Raises:
        UserError: If it does.
    """
    found = former_run(work_dir)
    if overwrite:
        check_outputs(found, inputs=sources, overwrite=True)
    elif found:
        raise UserError(
            f'{work_dir}: holds the checkpoints of a run ({format_list((path.name for path in found), 3)})\n'
            f'Continue it with --resume, choose another folder, or replace it with --overwrite.'
        )


def former_run(work_dir: str | Path) -> list[Path]:
    """All checkpoints that training wrote to a work directory, the best ones too."""
    found = {*_checkpoints(work_dir), *Path(work_dir).glob('best_*.pth')}
    return sorted(path for path in found if path.parent == Path(work_dir))


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
        notes.append(Note(f'resume: {path} is damaged ({problem}); using the previous one'))
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
            return [*of_new_run, Note(f'resume: no checkpoint in {cfg.work_dir} yet, starting a new run')]
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
    for unit, key in (('iteration', 'iter'), ('epoch', 'epoch')):
        limit = cfg.train_cfg.get(f'max_{key}s')
        if limit is not None and meta[key] > limit:
            raise UserError(
                f'{last}: cannot be resumed: it is at {unit} {meta[key]}, and the training ends at {limit}\n'
                f'Train longer with {"--max-iters" if key == "iter" else "train_cfg.max_epochs"}, or resume from an '
                f'earlier checkpoint.'
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
    _check_averages(cfg, loaded, last)
    cfg.load_from, cfg.resume = last, True
    seed = meta.get('seed')
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
    own = f' (that of the checkpoint; --seed {options.seed} applies to new runs only)'
    own *= options.seed not in (None, seed)
    return [*notes, Note(f'resume: {last}, iteration {meta["iter"]}, seed {seed}{own}')]


def _check_averages(cfg: Config, loaded: Mapping, last: str) -> None:
    """Reject a run without the EMA hook of the checkpoint, whose ``state_dict`` is the averages."""
    kinds = [hook.get('type') for hook in cfg.get('custom_hooks') or ()]
    hooks = [HOOKS.get(kind) if isinstance(kind, str) else kind for kind in kinds]
    if 'ema_state_dict' in loaded and not any(hook is not None and issubclass(hook, EMAHook) for hook in hooks):
        raise UserError(
            f'{last}: cannot be resumed: it has averaged weights, and custom_hooks has no EMAHook, so that training '
            f'would continue from the averages\nAdd the EMAHook of that run to custom_hooks.'
        )


def settings_of(wrapper: OptimWrapper, schedules: Any) -> dict[str, list[dict]]:
    """Settings of all parameter groups, before schedules, and of each schedule, by path in the config.

    Empty for several optimizers.
    """
    if isinstance(wrapper, OptimWrapperDict):
        return {}
    found = {
        'optim_wrapper.optimizer': [
            {key: group.get(f'initial_{key}', value) for key, value in group.items() if not _NO_SETTING.match(key)}
            for group in wrapper.optimizer.param_groups
        ]
    }
    for i, schedule in enumerate(schedules or ()):
        known = arguments_of(type(schedule))
        found[f'param_scheduler.{i}'] = [
            {key: value for key, value in schedule.state_dict().items() if key in known and not _NO_SETTING.match(key)}
        ]
    return found


def check_schedules(schedules: Any, states: Any) -> None:
    """Check that a checkpoint has the state of every schedule of the config, which mmengine pairs by position.

    Raises:
        ValueError: If their number or their types differ.
    """
    if not isinstance(schedules, dict):  # of several optimizers
        own, stored = [part.state_dict().keys() for part in schedules or ()], [state.keys() for state in states or ()]
        if own != stored:
            raise ValueError(f'param_scheduler has {len(own)} schedules, the checkpoint {len(stored)}, or types differ')


def adopt_settings(cfg: Config, configured: dict[str, list[dict]], restored: dict[str, list[dict]]) -> list[str]:
    """Set optimizer and schedules of a config, in place, to what a checkpoint has restored. Returns a text per change.

    Args:
        cfg: The config of the run.
        configured: From :func:`settings_of`, before the checkpoint was loaded.
        restored: From :func:`settings_of`, afterwards.

    Raises:
        ValueError: If the checkpoint is of another optimizer, or no config has its settings.
    """
    changes = []
    for path, own in configured.items():
        part, _, key = path.partition('.')
        node = cfg[part][key] if key == 'optimizer' else as_list(cfg[part])[int(key)]
        if strange := {key for a, b in zip(own, restored[path], strict=True) for key in a.keys() ^ b.keys()}:
            raise ValueError(f'not the state of {node["type"]}, which differs in {", ".join(sorted(strange))}')
        for key in own[0]:
            pairs = [(_plain(a[key]), _plain(b[key])) for a, b in zip(own, restored[path], strict=True)]
            unequal = [(a, b) for a, b in pairs if a != b and not (_is_number(a) and math.isclose(a, b, rel_tol=1e-9))]
            if not unequal:
                continue
            ours, theirs = max(unequal) if _is_number(unequal[0][0]) else unequal[0]
            scale = theirs / ours if _is_number(ours) and ours else math.nan
            is_argument = key in arguments_of(node['type'])
            if is_argument and _plain(node.get(key, ours)) == ours and all(pair == pairs[0] for pair in pairs):
                node[key] = theirs
            elif is_argument and all(math.isclose(b, a * scale, rel_tol=1e-6) for a, b in pairs):
                node[key] = float(f'{node[key] * scale:.9g}')  # factors of the groups and auto_scale_lr apply to it
            else:
                raise ValueError(f'{path}: {key} is {ours}, and {theirs} in the checkpoint')
            changes.append(f'{path}.{key}={theirs} instead of {ours}')
            if node.pop('convert_to_iter_based', False):
                node.update({key: value for key, value in restored[path][0].items() if key in node})
    return changes


def _plain(value: Any) -> Any:
    """A setting in a form that compares equal after saving: milestones and tuples as lists."""
    if isinstance(value, Mapping):
        return sorted(Counter(value).elements())
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
