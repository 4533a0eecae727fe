"""Prepare a config for training: apply options, check the data, fit the config to the machine.

A run passes through config -> prepare -> runner -> metric -> record. :mod:`~replk_mm.engine.config` reads the config.
This module is the only place that changes it. :mod:`~replk_mm.engine.runner` executes it, :mod:`replk_mm.evaluation`
computes the metrics, and :mod:`~replk_mm.engine.record` writes them with protocol and environment."""

import math
from pathlib import Path

import torch.nn as nn
from mmengine.config import Config, ConfigDict

from replk_mm.checkpoints.io import DownloadError, fetch_checkpoint, local_files, read_checkpoint
from replk_mm.data.checks.audit import check_data
from replk_mm.data.checks.classes import check_heads
from replk_mm.data.class_heads import is_class_head
from replk_mm.data.classes import use_classes
from replk_mm.data.subsets import use_subset
from replk_mm.engine.backbone import backbone_notes
from replk_mm.engine.config import as_list, build_model, fit_to_machine, set_data_root, shorten_schedule
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.engine.freezing import freeze_backbone
from replk_mm.engine.process import RunOptions, init_gloo, prepare_work_dir, processes_of, select_device
from replk_mm.engine.resuming import RESUMABLE, require_no_run, resume
from replk_mm.errors import UserError
from replk_mm.logs import Note


def prepare_training(cfg: Config, options: RunOptions) -> list[str]:
    """Apply the options, check the data, fit the config to this machine.

    Args:
        cfg: Changed in place until :class:`Runner` can take it.
        options: Command-line options.

    Returns:
        One line per change or check.

    Raises:
        UserError: If training is not possible.
    """
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(key):
            raise UserError(
                f'{cfg.filename}: the config has no {key!r}, so it cannot be trained\n'
                f'Inherit a schedule and a data set from configs/_base_/ or from mmseg.'
            )
    device = select_device(options.device)
    processes, local_processes = processes_of(options.launcher)
    cfg.launcher = options.launcher
    init_gloo(cfg, device)
    cfg.work_dir = options.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(cfg.filename).stem}'
    if not (options.resume or cfg.get('resume')):
        sources = [file for name in (options.pretrained, cfg.get('load_from')) if name for file in local_files(name)]
        require_no_run(cfg.work_dir, options.overwrite, sources)
    notes = backbone_notes(cfg) + prepare_data(cfg, options, ('train', 'val'))
    with explain_build_errors(cfg, 'run'):
        if options.max_iters is not None:
            notes += shorten_schedule(cfg, options.max_iters)
        notes += fit_to_machine(cfg, options.amp, device, local_processes, processes)
    model = build_model(cfg, 'meta')
    check_heads(cfg, head_class_counts(model), ('train', 'val'))
    parameters = sum(p.numel() for p in model.parameters())
    # Two checkpoints with weights and Adam's moments: the old one is deleted after the new one is written.
    prepare_work_dir(cfg.work_dir, needed=2 * 12 * parameters)
    notes += resume(cfg, options, model)
    if cfg.get('resume'):  # the checkpoint decides
        notes = [note for note in notes if not note.startswith('learning rate: ')]
    notes += weights_to_start_from(cfg, options)
    if options.fraction != 100 or options.hold_out:
        seed = cfg.get('randomness', {}).get('seed') or 0
        cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}  # from the checkpoint, a resumed run takes it too
        notes += use_subset(cfg, options.fraction, seed, options.hold_out)
    if cfg.get('freeze_backbone'):
        freeze_backbone(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        notes.append(
            Note(f'backbone: frozen, in evaluation mode; {trained:,} of {parameters:,} parameters are trained')
        )
    return notes + _limits_of_resuming(cfg)


def prepare_data(cfg: Config, options: RunOptions, splits: tuple[str, ...]) -> list[str]:
    """Set data root and classes of a config, and check the data.

    Args:
        cfg: Changed in place.
        options: ``data_root`` and ``classes`` are used.
        splits: Splits that must exist.

    Returns:
        One line per change or check.

    Raises:
        UserError: If data are missing or damaged, or the classes of data sets, annotations and heads differ.
    """
    if options.data_root:
        set_data_root(cfg, options.data_root)
    notes = use_classes(cfg, options.classes, splits) if options.classes is not None else []
    return notes + check_data(cfg, splits)


def head_class_counts(model: nn.Module) -> dict[str, int]:
    """Number of classes of every head that classifies all classes, by path."""
    return {
        f'model.{name}': module.num_classes
        for name, module in model.named_modules()
        if is_class_head(name, type(module))
        and isinstance(getattr(module, 'num_classes', None), int)
        and 'rpn_head' not in name
    }


def _limits_of_resuming(cfg: Config) -> list[str]:
    """Limits of resuming this run, one line each."""
    loop, hook = cfg.train_cfg.get('type'), (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    notes: list[str] = []
    if loop not in RESUMABLE:
        notes.append(
            Note(
                f'resume: train_cfg.type is {loop or "not set"}: a resumed run sees its data in another order, and a '
                f'signal does not save it; {" and ".join(RESUMABLE)} resume exactly'
            )
        )
    wrapper = cfg.optim_wrapper
    steps = math.lcm(
        *(part.get('accumulative_counts', 1) for part in (wrapper, *wrapper.values()) if isinstance(part, dict))
    )
    by_epoch, interval = hook.get('by_epoch', True), hook.get('interval', -1)
    if steps > 1 and interval > 0 and (by_epoch or interval % steps):
        often = 'after epochs' if by_epoch else f'every {interval} iterations'
        notes.append(
            Note(
                f'checkpoints: {often}, and a step takes {steps} iterations: gradients in between are not saved; '
                f'a checkpoint at a multiple of {steps} resumes exactly (default_hooks.checkpoint)'
            )
        )
    return notes


#: Arguments of ``init_cfg`` that ``--pretrained`` keeps.
_KEPT = ('adapt_input_conv', 'resize_kernels')


def weights_to_start_from(cfg: Config, options: RunOptions) -> list[str]:
    """Apply ``--pretrained``, and fetch the initial weights. Returns lines for the log."""
    backbone = cfg.model.get('backbone', {})
    resumes = cfg.get('resume') and cfg.get('load_from')
    if resumes or options.pretrained:
        given = backbone.pop('init_cfg', None)
        for part in (cfg.model, backbone):  # of mmseg; of timm and transformers
            part.pop('pretrained', None)
    if resumes:
        return []  # the checkpoint sets every weight
    source = str(cfg.get('load_from') or '')
    if source and options.pretrained:
        raise UserError(f'--pretrained: load_from={source} sets the same weights\nUse one of them.')
    if source and ('://' not in source or source.startswith(('http', 'file:'))):
        # Read it here for its errors. mmengine handles other URLs.
        read_checkpoint(source)
        cfg.load_from = str(fetch_checkpoint(source))
    if options.pretrained and options.pretrained != 'none':
        kept = {key: given[key] for key in _KEPT if given.get(key)} if isinstance(given, dict) else {}
        backbone['init_cfg'] = ConfigDict(type='Pretrained', checkpoint=options.pretrained, **kept)
    initial = next((c for c in as_list(backbone.get('init_cfg')) if c.get('type') == 'Pretrained'), None)
    if resize := cfg.get('resize_kernels'):
        if not (initial or source) or (initial and not str(backbone.get('type')).startswith('replk_mm.')):
            why = f'is not for {backbone.type}' if initial else 'the training starts from random weights'
            raise UserError(f'--resize-kernels {resize}: {why}\nUse --pretrained FILE with a backbone of replk_mm.')
        if initial:
            initial['resize_kernels'] = resize
    if options.pretrained == 'none':
        if cfg.get('catalogue'):
            cfg.catalogue.pretraining = 'none'
        return ['weights: random (--pretrained none)']
    # mmengine loads the backbones of other packages.
    if initial and (options.pretrained or str(backbone.get('type')).startswith('replk_mm.')):
        try:
            fetch_checkpoint(initial['checkpoint'])
        except DownloadError as error:
            raise UserError(
                f'{error}\nOr use a local file with --pretrained FILE; --pretrained none starts from random weights.'
            ) from error
    return []
