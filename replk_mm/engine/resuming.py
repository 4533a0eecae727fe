"""Choose the checkpoint that a run resumes from, and check that it fits."""

import itertools
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.loading import get_reparameterization
from replk_mm.data.checks.classes import compare_with_checkpoint
from replk_mm.engine.config_errors import arguments_of
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError, first_line
from replk_mm.logs import Note

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
    own = (
        ''
        if options.seed in (None, seed)
        else f' (that of the checkpoint; --seed {options.seed} applies to new runs only)'
    )
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


def settings_of(wrapper: OptimWrapper, schedules: Any) -> dict[str, tuple[type, list[dict]]]:
    """Class and settings of every optimizer and schedule, by path in the config.

    An optimizer has a dict for each parameter group, with the values before schedules; a schedule has one dict.
    """
    found: dict[str, tuple[type, list[dict]]] = {}
    for path, part in _paths(wrapper if isinstance(wrapper, OptimWrapperDict) else {'': wrapper}, 'optim_wrapper'):
        groups = [
            {
                key: group.get(f'initial_{key}', value)
                for key, value in group.items()
                if not key.startswith('initial_') and key not in ('params', 'param_names', 'differentiable')
            }
            for group in part.optimizer.param_groups
        ]
        found[f'{path}.optimizer'] = type(part.optimizer), groups
    for path, part in _paths(schedules, 'param_scheduler'):
        state, known = part.state_dict(), arguments_of(type(part))
        settings = {key: value for key, value in state.items() if key in known and key not in ('verbose', 'last_step')}
        found[path] = type(part), [settings]
    return found


def _paths(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The objects in nested lists and dicts, with their paths."""
    if isinstance(node, (list, tuple, Mapping, OptimWrapperDict)):
        for key, part in enumerate(node) if isinstance(node, (list, tuple)) else node.items():
            yield from _paths(part, f'{path}.{key}'.rstrip('.'))
    elif node is not None:
        yield path, node


def check_schedules(schedules: Any, states: Any) -> None:
    """Check that a checkpoint has the state of every schedule of the config, which mmengine pairs by position.

    Raises:
        ValueError: If their number or their types differ.
    """
    own = [set(part.state_dict()) for _, part in _paths(schedules, '')]
    stored = [
        set(state) for group in (states.values() if isinstance(states, Mapping) else [states or ()]) for state in group
    ]
    if own != stored:
        raise ValueError(
            f'param_scheduler has {len(own)} schedules, and the checkpoint {len(stored)}'
            if len(own) != len(stored)
            else 'the schedules in param_scheduler are of other types than those of the checkpoint'
        )


def adopt_settings(cfg: Config, configured: dict, restored: dict) -> list[str]:
    """Set the optimizers and schedules of a config to what a checkpoint has restored.

    Args:
        cfg: Changed in place.
        configured: From :func:`settings_of`, before the checkpoint was loaded.
        restored: From :func:`settings_of`, afterwards.

    Returns:
        Each change, with the value of the checkpoint and that of the config.

    Raises:
        ValueError: If the checkpoint belongs to another type of optimizer, or a config cannot express its settings.
    """
    changes = []
    for path, (kind, own) in configured.items():
        groups = restored[path][1]
        if strange := {key for a, b in zip(own, groups, strict=True) for key in a.keys() ^ b.keys()}:
            raise ValueError(f'not the state of {kind.__name__}, which differs in {", ".join(sorted(strange))}')
        for key in own[0]:
            pairs = [(_plain(a[key]), _plain(b[key])) for a, b in zip(own, groups, strict=True)]
            if all(a == b or _is_number(a) and math.isclose(a, b, rel_tol=1e-9) for a, b in pairs):
                continue
            node = _node(cfg, path)
            value = _one_value(pairs, node.get(key))
            unequal = [pair for pair in pairs if pair[0] != pair[1]]
            ours, theirs = max(unequal) if _is_number(pairs[0][0]) else unequal[0]
            if value is None or key not in arguments_of(kind):
                raise ValueError(f'{path}: {key} is {ours}, and {theirs} in the checkpoint')
            node[key] = value
            changes.append(f'{path}.{key}={theirs} instead of {ours}')
            if node.pop('convert_to_iter_based', False):
                node.update({key: value for key, value in groups[0].items() if key in node})
    return changes


def _node(cfg: Config, path: str) -> ConfigDict:
    node: Any = cfg
    for key in path.split('.'):
        if isinstance(node, list):
            node = node[int(key)]
        elif key in node:
            node = node[key]
        elif key != '0':  # a single schedule needs no list
            raise ValueError(f'{path} is not in the config')
    return node


def _plain(value: Any) -> Any:
    """A setting in a form that compares equal after saving: milestones and tuples as lists."""
    if isinstance(value, Mapping):
        return sorted(Counter(value).elements())
    return list(value) if isinstance(value, (list, tuple)) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_value(pairs: list[tuple[Any, Any]], own: Any) -> Any:
    """The value of a config field with which every group has the checkpoint's; None if there is none.

    Args:
        pairs: Values of each group: that of the config, and that of the checkpoint.
        own: The field's value, of which factors per group and ``auto_scale_lr`` make those of the config.
    """
    if all(pair == pairs[0] for pair in pairs) and (own is None or _plain(own) == pairs[0][0]):
        return pairs[0][1]
    if not all(map(_is_number, [own, *itertools.chain(*pairs)])):
        return None
    ratio = next((b / a for a, b in pairs if a), math.nan)
    return float(f'{own * ratio:.9g}') if all(math.isclose(b, a * ratio, rel_tol=1e-6) for a, b in pairs) else None
