"""Read a config, apply what the command line says, and fit it to this machine: every change is one line that is said."""
import difflib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope

from replk_mm.data.checks import as_list, datasets_of
from replk_mm.errors import UserError


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config file.

    Args:
        path: A file, or ``replk_mm::NAME.py`` for one that is installed with the package.
        options: Overrides, as ``{'model.backbone.arch': 'nano'}``.

    Raises:
        UserError: If the file or one of its bases does not exist or cannot be read, or an override does not fit.
    """
    if path.startswith('replk_mm::'):
        found = Path(__file__).parents[1] / '.mim' / 'configs' / path.partition('::')[2]
    else:
        found = Path(path)
    if not found.is_file():
        siblings = [str(p) for p in sorted(found.parent.glob('*.py'))] if found.parent.is_dir() else []
        close = difflib.get_close_matches(str(found), siblings, n=3, cutoff=0.5)
        hint = f'Did you mean {" or ".join(close)}?' if close else 'Configs are in configs/, one file each.'
        raise UserError(f'{path}: no such config\n{hint}')
    try:
        cfg = Config.fromfile(str(found))
    except (SyntaxError, NameError, KeyError, TypeError, ValueError, AttributeError, ImportError, OSError,
            AssertionError) as error:
        raise UserError(f'{path}: the config cannot be read: {type(error).__name__}: {error}\n'
                        f'Check the file and the files its _base_ names.') from error
    if options:
        try:
            cfg.merge_from_dict(options)
        except (KeyError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise UserError(f'--cfg-options {options}: does not fit {path}: {error}') from error
    for key in ('model', 'test_dataloader'):
        if key not in cfg:
            raise UserError(f'{path}: the config has no {key!r}; it is no training config (files in _base_ are parts of one)')
    return cfg


def set_data_root(cfg: Config, root: str) -> None:
    """Point every dataset of the config to ``root``."""
    for dataset in datasets_of(cfg):
        dataset['data_root'] = root
    for key in ('val_evaluator', 'test_evaluator'):
        for metric in as_list(cfg.get(key)):
            # COCO's evaluator names its annotation file by full path.
            if metric.get('ann_file') and cfg.get('data_root'):
                metric['ann_file'] = re.sub(f'^{re.escape(cfg.data_root.rstrip("/"))}/', f'{root.rstrip("/")}/',
                                            metric['ann_file'])
    cfg.data_root = root


def shorten(cfg: Config, iterations: int) -> str:
    """Train for ``iterations`` only, warm-up and decay shortened in proportion. Returns the line to say."""
    loop = cfg.train_cfg
    by_epoch = loop.get('by_epoch', 'max_epochs' in loop)
    total = loop.get('max_epochs') if by_epoch else loop.get('max_iters')
    if not total:
        raise UserError('--max-iters: train_cfg of the config has neither max_iters nor max_epochs')
    for scheduler in as_list(cfg.get('param_scheduler')):
        same_unit = scheduler.get('by_epoch', True) == by_epoch
        # A warm-up counted in iterations keeps a tenth at most of a run that was counted in epochs.
        factor = iterations / total if same_unit else min(1., iterations / 10 / max(scheduler.get('end', 1), 1))
        for key in ('begin', 'end', 'T_max'):
            if key in scheduler:
                scheduler[key] = round(scheduler[key] * factor)
        if 'milestones' in scheduler:
            scheduler['milestones'] = [max(1, round(m * factor)) for m in scheduler['milestones']]
        scheduler['by_epoch'] = False
    # mmengine's warm-ups need two steps to come back from their first factor.
    cfg.param_scheduler = [s for s in as_list(cfg.get('param_scheduler'))
                           if s.get('end', iterations) - s.get('begin', 0) >= 2 or 'Poly' in s['type']]
    interval = iterations if by_epoch else min(iterations, loop.get('val_interval', iterations))
    cfg.train_cfg = ConfigDict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=interval)
    checkpoint = cfg.default_hooks.get('checkpoint', {})
    checkpoint.update(by_epoch=False, interval=interval if by_epoch else min(iterations, checkpoint.get('interval', iterations)))
    cfg.log_processor = {**cfg.get('log_processor', {}), 'by_epoch': False}
    unit = 'epochs' if by_epoch else 'iterations'
    return f'schedule: {iterations} iterations instead of {total} {unit}, warm-up and decay in proportion'


def fit_to_machine(cfg: Config, amp: str | None, device: str, world_size: int) -> list[str]:
    """Change what this machine cannot do. Call after :func:`shorten`.

    Args:
        cfg: Changed in place.
        amp: ``'bf16'`` or ``'fp16'`` to force mixed precision, None for what the config says.
        device: ``'cpu'`` or ``'cuda'``.
        world_size: Processes that train together.

    Returns:
        A line for every change.

    Raises:
        UserError: If ``amp`` asks for what the device has not.
    """
    notes = []
    if device == 'cpu':
        layers = replace_type(cfg.model, {'SyncBN': 'BN', 'MMSyncBN': 'BN'})
        if layers:
            notes.append(f'norm: SyncBN runs on GPUs only; BN instead ({layers} places in the config)'
                         + (', each process with the statistics of its own batch' if world_size > 1 else ''))
        if cfg.get('env_cfg', {}).get('dist_cfg', {}).get('backend') == 'nccl':
            cfg.env_cfg.dist_cfg.backend = 'gloo'
    notes += _precision(cfg, amp, device)
    share = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
                // world_size)
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        # The main process needs a core too when it computes on the CPU.
        workers = max(1, share // 2) if device == 'cpu' else share
        if loader and loader.get('num_workers', 0) > workers:
            notes.append(f'{split} data workers: {workers} instead of {loader["num_workers"]} ({share} cores a process)')
            loader['num_workers'] = workers
        if loader and not loader.get('num_workers', 0):
            loader['persistent_workers'] = False
    return notes


def _precision(cfg: Config, amp: str | None, device: str) -> list[str]:
    wrapper = cfg.get('optim_wrapper')
    if not wrapper:
        return []
    configured = wrapper.get('type') == 'AmpOptimWrapper'
    if amp == 'fp16' and device == 'cpu':
        raise UserError('--amp fp16: CPUs train in float32 or bfloat16; found device cpu\nUse --amp bf16, or leave it out.')
    if device == 'cpu':
        for key in ('loss_scale', 'dtype'):
            wrapper.pop(key, None)
        wrapper['type'] = 'replk_mm.BFloat16OptimWrapper' if amp == 'bf16' else 'OptimWrapper'
        if amp == 'bf16':
            return ['precision: bfloat16 autocast']
        return ['precision: float32 instead of float16 autocast, which needs a GPU (--amp bf16 is possible)'] if configured else []
    if amp:
        wrapper['type'] = 'AmpOptimWrapper'
        wrapper['dtype'] = {'bf16': 'bfloat16', 'fp16': 'float16'}[amp]
        wrapper['loss_scale'] = 'dynamic' if amp == 'fp16' else 1.0
        return [f'precision: {wrapper["dtype"]} autocast']
    return []


def replace_type(node, names: dict[str, str]) -> int:
    """Replace ``type`` values anywhere in a nested config; returns how many."""
    count = 0
    if isinstance(node, dict):
        if node.get('type') in names:
            node['type'] = names[node['type']]
            count += 1
        for value in node.values():
            count += replace_type(value, names)
    elif isinstance(node, (list, tuple)):
        for value in node:
            count += replace_type(value, names)
    return count


def build_model(cfg: Config, device: str = 'cpu') -> torch.nn.Module:
    """Build the config's model without its pretrained weights.

    Args:
        cfg: The config.
        device: ``'meta'`` builds the structure without memory.

    Raises:
        UserError: If an argument is unknown or refused.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        with torch.device(device):
            return MODELS.build(cfg.model)
    except (TypeError, ValueError, KeyError, AssertionError, ImportError) as error:
        raise UserError(f'{cfg.filename}: the model cannot be built: {_explain(cfg, error)}') from error


def _explain(cfg: Config, error: Exception) -> str:
    text = str(error).strip('\'"')
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if not unknown:
        return f'{text}\nCheck the fields of cfg.model.'
    for field, part in _typed(cfg.model, 'model'):
        if unknown[1] in part:
            builder = MODELS.get(part['type']) if isinstance(part['type'], str) else part['type']
            known = [p for c in builder.__mro__[:1] for p in inspect.signature(c).parameters if p != 'kwargs']
            if unknown[1] in known:
                continue
            close = difflib.get_close_matches(unknown[1], known, n=1)
            return (f'{field}.{unknown[1]}: {part["type"]} has no such argument\n'
                    + (f'Did you mean {close[0]}? ' if close else '') + f'It takes: {", ".join(known)}')
    return text


def _typed(node, path: str) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if 'type' in node:
            yield path, node
        for key, value in node.items():
            yield from _typed(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _typed(value, f'{path}[{i}]')
