"""Read a config, apply the command line, and fit it to this machine. Every change is logged in one line."""

import contextlib
import copy
import inspect
import logging
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor
from torch.overrides import TorchFunctionMode

from replk_mm.backbones.catalogue import ShapeOfSamples
from replk_mm.data.datasets import as_list, crop_of, datasets_of, named_metrics
from replk_mm.deploy.equivalence import network_outputs
from replk_mm.engine.backbone import use_backbone
from replk_mm.engine.config_errors import explain_build_errors, walk_dicts
from replk_mm.errors import UserError, command_line, did_you_mean, format_list, import_error, install_advice
from replk_mm.logs import Note
from replk_mm.ops.cpu.direct import FLOAT32_INSTEAD, has_bfloat16_instructions
from replk_mm.wrappers import input_channels

#: Top-level fields of a config that mmengine reads.
_FIELDS = [*inspect.signature(Runner.__init__).parameters][1:]


def load_config(
    path: str, options: dict | None = None, needs: tuple[str, ...] = ('model', 'test_dataloader')
) -> Config:
    """Read a config file.

    Args:
        path: A file, or ``PACKAGE::NAME.py`` for one that is installed with replk_mm, mmseg, mmdet ...
        options: Overrides, as ``{'model.backbone.arch': 'nano'}``. ``backbone`` and ``recipe`` are arguments of
            :func:`use_backbone`, which runs before the others are applied.
        needs: Keys that the config must have.

    Raises:
        UserError: If the file or one of its bases cannot be read, a key is missing, or an override does not fit.
    """
    found = resolve_config_path(path)
    if not found.is_file():
        folder = str(Path(path)).removesuffix(found.name)  # as given, without the folder of the package
        siblings = [f'{folder}{p.name}' for p in sorted(found.parent.glob('*.py'))]
        hint = did_you_mean(path, siblings) or f'{command_line("list_configs")} lists the configs.'
        raise UserError(f'{path}: no such config\n{hint}')
    try:
        cfg = Config.fromfile(str(found))
    except Exception as error:  # a config is a program and may raise anything
        failed = import_error(error)
        raise UserError(
            f'{path}: the config cannot be read: {failed or f"{type(error).__name__}: {error}"}\n'
            f'{install_advice() if failed else "Check the file and its _base_ files."}'
        ) from error
    options = dict(options or {})
    backbone, recipe = options.pop('backbone', None), options.pop('recipe', None)
    if backbone is not None:
        use_backbone(cfg, backbone, recipe)
    elif recipe:
        cfg.catalogue = dict(recipe=recipe)
    if options:
        _override(cfg, options, path)
    if any(key.startswith('optim_wrapper') for key in options) and cfg.get('catalogue', {}).get('recipe') == 'authors':
        cfg.catalogue.recipe = 'common'  # no longer the authors' own
    for key in cfg:  # variables of the user's own are far from the names of fields
        _check_field(key, _FIELDS, 0.88, path, 'A variable of your own needs a name less like a field.')
    for key in needs:
        if key not in cfg:
            raise UserError(
                f'{path}: the config has no {key!r}, so it is not complete\nUse a config that is not in _base_.'
            )
    return cfg


def _check_field(name: str, known: Sequence[str], cutoff: float, where: str, more: str = '') -> None:
    hint = did_you_mean(name, known, cutoff)
    if hint and name not in known and name != 'models':  # as in a BiSeNetV2 of mmseg
        raise UserError(f'{where}: {name}: no such field\n{hint}{more}')


def _override(cfg: Config, options: dict, path: str) -> None:
    """Apply ``--cfg-options``. New names are accepted, unless they are close to an existing one."""
    for option in options:
        _check_field(option.partition('.')[0], [*cfg.keys(), *_FIELDS], 0.8, f'--cfg-options {option}: {path}')
        node: Any = cfg
        for key in option.split('.')[:-1]:
            if node.get(key, ...) is None:
                node[key] = {}  # mmengine cannot set a field of None, such as clip_grad of many schedules
            if not isinstance(node := node.get(key), dict):
                break
    try:
        cfg.merge_from_dict({option: _like_old(cfg, option, value) for option, value in options.items()})
    except Exception as error:  # mmengine raises several types
        raise UserError(f'--cfg-options {options!s:.500}: does not fit {path}: {error}') from error
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper'):
        if cfg.get(key) is not None and not isinstance(cfg[key], dict):
            raise UserError(
                f'--cfg-options {key}={cfg[key]!r}: {key} of {path} is a dict\n'
                f'Set a field of it: --cfg-options {key}.FIELD=VALUE.'
            )


def _like_old(node: Any, option: str, value: Any) -> Any:
    """A list of numbers that replaces a tuple as a tuple: YAML has none, and transforms read a list as many scales."""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        for key in option.split('.'):
            node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
        numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
        return tuple(value) if isinstance(node, tuple) and numbers else value
    return value


def resolve_config_path(path: str) -> Path:
    """The file of a config given as a path or ``PACKAGE::NAME.py``. It may not exist.

    Raises:
        UserError: If the package is not installed.
    """
    package, installed, name = path.partition('::')
    if not installed:
        return Path(path)
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f'{path}: the package {package!r} is not installed\nUse mmseg::, mmdet::, replk_mm:: or a file.'
        )
    return Path(spec.submodule_search_locations[0], '.mim', 'configs', name)


def set_data_root(cfg: Config, root: str) -> None:
    """Point every dataset of the config to ``root``."""
    former = {str(d['data_root']).rstrip('/') for d in [cfg, *datasets_of(cfg)] if d.get('data_root')}
    for dataset in datasets_of(cfg):
        dataset['data_root'] = root
    for split in ('val', 'test'):
        for metric in named_metrics(cfg, split).values():
            # COCO's evaluator has the full path of its annotation file.
            for old in former:
                if str(metric.get('ann_file') or '').startswith(f'{old}/'):
                    metric['ann_file'] = f'{root.rstrip("/")}{metric["ann_file"][len(old) :]}'
                    break
    cfg.data_root = root


def shorten_schedule(cfg: Config, iterations: int) -> list[str]:
    """Shorten training to ``iterations``, with warm-up and decay in proportion. Returns lines for the log."""
    loop = cfg.train_cfg
    by_epoch = loop.get('by_epoch', 'max_epochs' in loop)
    total = loop.get('max_epochs') if by_epoch else loop.get('max_iters')
    if not total:
        raise UserError('--max-iters: train_cfg of the config has neither max_iters nor max_epochs')
    for scheduler in as_list(cfg.get('param_scheduler')):
        same_unit = scheduler.get('by_epoch', True) == by_epoch
        # A warm-up in iterations takes at most a tenth of a run that was defined in epochs.
        factor = iterations / total if same_unit else min(1.0, iterations / 10 / max(scheduler.get('end', 1), 1))
        for key in ('begin', 'end', 'T_max'):
            if key in scheduler:
                scheduler[key] = round(scheduler[key] * factor)
        for key in ('step_size', 'total_steps'):
            if key in scheduler:
                scheduler[key] = max(1, round(scheduler[key] * factor))
        if 'milestones' in scheduler:
            scheduler['milestones'] = [max(1, round(m * factor)) for m in scheduler['milestones']]
        scheduler['by_epoch'] = False
        scheduler.pop('convert_to_iter_based', None)
    # mmengine's warm-ups need two steps to return to the full rate.
    cfg.param_scheduler = [
        s
        for s in as_list(cfg.get('param_scheduler'))
        if s.get('end', iterations) - s.get('begin', 0) >= 2 or 'Poly' in s['type']
    ]
    interval = iterations if by_epoch else min(iterations, loop.get('val_interval', iterations))
    scope = 'replk_mm.' if str(loop.get('type')).startswith('replk_mm.') else ''
    cfg.train_cfg = ConfigDict(type=f'{scope}IterBasedTrainLoop', max_iters=iterations, val_interval=interval)
    hooks = cfg.get('default_hooks') or {}
    checkpoint = hooks.get('checkpoint') or dict(type='CheckpointHook')
    checkpoint.update(
        by_epoch=False,
        interval=interval
        if by_epoch and checkpoint.get('by_epoch', True)
        else min(iterations, checkpoint.get('interval', iterations)),
    )
    logger = {'type': 'LoggerHook', **(hooks.get('logger') or {})}
    # Log at least 20 times in a short run.
    logger['interval'] = min(logger.get('interval', 10), max(1, iterations // 20))
    cfg.default_hooks = {**hooks, 'checkpoint': checkpoint, 'logger': logger}
    cfg.log_processor = {**cfg.get('log_processor', {}), 'by_epoch': False}
    unit = 'epochs' if by_epoch else 'iterations'
    return [
        f'schedule: {iterations} iterations instead of {total} {unit} ({cfg.train_cfg.type}), validation every '
        f'{interval}, checkpoints every {checkpoint["interval"]}, log every {logger["interval"]} iterations',
        Note('learning rate: warm-up and decay shortened in proportion'),
    ]


def fit_to_machine(
    cfg: Config, amp: str | None, device: str, local_processes: int, processes: int | None = None
) -> list[str]:
    """Fit a config to this machine: norms, process group, precision, data workers, learning rate.

    No other function rewrites a config for a machine. Call after :func:`shorten_schedule`.

    Args:
        cfg: Changed in place.
        amp: ``'bf16'`` or ``'fp16'`` for mixed precision; None keeps the precision of the config.
        device: ``'cpu'`` or ``'cuda'``.
        local_processes: Processes that share this machine.
        processes: Processes of the whole run, for the learning rate; None for inference.

    Returns:
        One line per change.

    Raises:
        UserError: If the device does not support ``amp``.
    """
    notes = _norms(cfg, device)
    alone = cfg.get('launcher', 'none') == 'none'
    if device == 'cpu' and not alone and cfg.get('env_cfg', {}).get('dist_cfg', {}).get('backend') == 'nccl':
        cfg.env_cfg.dist_cfg.backend = 'gloo'
        notes.append('process group: gloo instead of nccl, which needs GPUs')
    notes += _precision(cfg, amp, device)
    notes += _workers(cfg, device, local_processes)
    return notes + (_learning_rate(cfg, processes) if processes else [])


def _norms(cfg: Config, device: str) -> list[str]:
    alone = cfg.get('launcher', 'none') == 'none'
    norm = 'BN' if alone else 'replk_mm.SyncBN' if device == 'cpu' else 'SyncBN'
    # A config from a work directory may be fitted to another machine.
    former = {'replk_mm.SyncBN'} if norm == 'SyncBN' else {'SyncBN', 'MMSyncBN', 'replk_mm.SyncBN'} - {norm}
    layers = replace_type(cfg.model, dict.fromkeys(former, norm))
    if not layers:
        return []
    why = (
        'replk_mm.SyncBN is for CPUs'
        if norm == 'SyncBN'
        else f"torch's SyncBN runs on {'GPUs only' if device == 'cpu' else 'several GPUs only'}"
    )
    return [
        f'norm: {why}; {norm} instead ({layers} places in the config)'
        + ('' if alone else ', with the statistics of all processes')
    ]


def _workers(cfg: Config, device: str, local_processes: int) -> list[str]:
    notes = []
    share = max(1, usable_cores() // local_processes)
    # On a CPU the main process computes too.
    workers = max(1, share // 2) if device == 'cpu' else share
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader and loader.get('num_workers', 0) > workers:
            notes.append(
                f'{split} data workers: {workers} instead of {loader["num_workers"]} ({share} cores a process)'
            )
            loader['num_workers'] = workers
        if loader and not loader.get('num_workers', 0):  # torch rejects these without workers
            settings = [key for key in ('persistent_workers', 'prefetch_factor') if loader.pop(key, None)]
            if settings:
                notes.append(f'{split} data workers: none, so no {" and no ".join(settings)}')
    return notes


def usable_cores() -> int:
    """CPU cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, 'cpu_affinity') else psutil.cpu_count() or 1


def _learning_rate(cfg: Config, processes: int) -> list[str]:
    scaling = cfg.get('auto_scale_lr')
    actual = cfg.train_dataloader.batch_size * processes
    rate = cfg.optim_wrapper.get('optimizer', {}).get('lr')
    if not scaling or scaling.base_batch_size == actual or rate is None:
        return []
    base = scaling.base_batch_size
    if not scaling.get('enable'):
        return [
            Note(
                f'learning rate: {rate} as configured for {base} images a step; this run has {actual} '
                f'(auto_scale_lr.enable=True scales)'
            )
        ]
    # mmengine's runner multiplies by this ratio.
    return [
        Note(
            f'learning rate: {rate} x {actual}/{base} = {rate * actual / base:.3g}, for {actual} images a step instead '
            f'of {base} (auto_scale_lr.enable=False keeps it)'
        )
    ]


def _precision(cfg: Config, amp: str | None, device: str) -> list[str]:
    wrapper = cfg.get('optim_wrapper')
    if not wrapper:
        return []
    if amp == 'fp16' and device == 'cpu':
        raise UserError(
            '--amp fp16: CPUs train in float32 or bfloat16; the device is cpu\nUse --amp bf16, or omit --amp.'
        )
    configured = None
    if wrapper.get('type') == 'AmpOptimWrapper':
        configured = 'bf16' if wrapper.get('dtype') == 'bfloat16' else 'fp16'
    elif wrapper.get('type') == 'replk_mm.BFloat16OptimWrapper':
        configured = 'bf16'
    wanted = amp or configured
    if wanted is None:
        return []  # keep the user's own wrapper
    if device != 'cpu':
        if not amp and wrapper['type'] == 'AmpOptimWrapper':
            return []
        wrapper.update(
            type='AmpOptimWrapper',
            dtype={'bf16': 'bfloat16', 'fp16': 'float16'}[wanted],
            loss_scale='dynamic' if wanted == 'fp16' else 1.0,
        )
        return [Note(f'precision: {wrapper["dtype"]} autocast')]
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(key, None)
    if wanted == 'bf16' and has_bfloat16_instructions():
        wrapper['type'] = 'replk_mm.BFloat16OptimWrapper'
        return [Note('precision: bfloat16 autocast')]
    wrapper['type'] = 'OptimWrapper'
    if wanted == 'bf16':
        return [Note(f'precision: {FLOAT32_INSTEAD}', logging.WARNING)]
    return [Note('precision: float32 instead of float16 autocast, which needs a GPU (--amp bf16 is possible)')]


def replace_type(node: Any, names: dict[str, str]) -> int:
    """Replace values of ``type`` anywhere in a nested config. Returns the number of replacements."""
    found = [part for _, part in walk_dicts(node) if part.get('type') in names]
    for part in found:
        part['type'] = names[part['type']]
    return len(found)


def build_model(cfg: Config, device: str = 'cpu') -> torch.nn.Module:
    """Build the config's model without its pretrained weights.

    Args:
        cfg: The config.
        device: ``'meta'`` builds the structure without memory, and checks the channels of all layers.

    Raises:
        UserError: If an argument is unknown or invalid, or parts of the model do not fit together.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with explain_build_errors(cfg, 'model'):
        try:
            with _LinspaceOnCPU(), torch.device(device):
                model = MODELS.build(copy.deepcopy(cfg.model))  # segmentors of mmseg change theirs
        except Exception as error:
            if device != 'meta' or 'meta' not in str(error).lower():
                raise
            model = MODELS.build(copy.deepcopy(cfg.model)).to(device)  # its constructor reads the values of tensors
    if device == 'meta' and hasattr(model, 'extract_feat'):
        _check_channels(cfg, model.eval())
    return model


def _check_channels(cfg: Config, model: Any) -> None:
    """Run a model on the meta device, to check that its parts fit together.

    Raises:
        UserError: For the first layer that was built for other channels, and for a backbone without feature maps.
    """
    names = {module: name for name, module in model.named_modules()}
    image = torch.empty(1, input_channels(model), *(crop_of(cfg) or (128, 128)), device='meta')
    maps: list[Tensor] = []
    try:
        with torch.no_grad(), torch.device('meta'), ShapeOfSamples():
            maps += as_list(model.backbone(image))
            if any(x.dim() == 2 for x in maps) and not hasattr(model, 'head'):  # a classifier takes them
                gap = (
                    'gap_before_final_norm=False' if hasattr(model.backbone, 'gap_before_final_norm') else 'out_indices'
                )
                raise UserError(f'{cfg.filename}: model.backbone returns pooled features\nSet {gap} of the backbone.')
            network_outputs(model, image)
    except UserError:
        raise
    except Exception as error:  # also of networks that read values, which the dry run of training checks
        for values in (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)):
            layer, given, inputs = (values.get(name) for name in ('self', 'input', 'inputs'))
            if isinstance(error, IndexError) and isinstance(layer, nn.Module) and hasattr(layer, 'in_index') and inputs:
                raise UserError(
                    f'{cfg.filename}: model.{names[layer]}.in_index={layer.in_index}: there are {len(inputs)} feature '
                    f'maps\nSet in_index of the head, or out_indices of the backbone.'
                ) from error
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer not in names or not isinstance(given, Tensor):
                continue
            axis, wanted = (1, layer.in_channels) if isinstance(layer, nn.Conv2d) else (-1, layer.in_features)
            if given.shape[axis] != wanted:
                part = names[layer].partition('.')[0]
                advice = f'Set model.{part}.in_channels'
                if part == 'backbone':
                    advice += ', and mean and std of model.data_preprocessor, to the channels of the images.'
                elif part != 'neck' and hasattr(model, 'neck'):
                    advice += ' to model.neck.out_channels.'
                else:
                    advice += f': the backbone returns {format_list(x.shape[1] for x in maps)} channels.'
                raise UserError(
                    f'{cfg.filename}: model.{names[layer]}: built for {wanted} channels, its input has '
                    f'{given.shape[axis]}\n{advice}'
                ) from error


class _LinspaceOnCPU(TorchFunctionMode):
    """Compute ``torch.linspace`` on the CPU: networks read stochastic-depth rates from it, also on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **{**(kwargs or {}), **(dict(device='cpu') if func is torch.linspace else {})})
