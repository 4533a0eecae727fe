"""The training of a row of a suite: of the network or of a linear layer, and its learning rate and curve."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import barrier, get_rank

from replk_mm.backbones.catalogue import weights_by_url
from replk_mm.bench import records
from replk_mm.bench.suites.inputs import load_task_config
from replk_mm.bench.suites.progress import add_progress_hook
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.worker import MeasurementResult
from replk_mm.data.datasets import as_list, crop_of
from replk_mm.engine import train as engine
from replk_mm.engine.backbone import describe_recipe
from replk_mm.engine.nonfinite import NonFiniteError
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions, processes_of, select_device
from replk_mm.engine.record import environment_info
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import UserError
from replk_mm.text import in_percent

#: The metric that ranks rows, with its unit: the first that a test reports.
PRIMARY_METRICS = {'mIoU': '%', 'coco/bbox_mAP': 'AP', 'accuracy/top1': '%'}
#: Prefixes of checkpoints of ImageNet-1K classifiers.
_IMAGENET = ('torchvision://', 'open-mmlab://resnet')


def train(task: Task) -> MeasurementResult:
    """Train a row; an interrupted training continues from its last checkpoint.

    Raises:
        UserError: If the config, the data or the machine do not allow it, or the loss is not finite.
    """
    if task.row.protocol == 'linear':
        return _train_linear(task)
    folder = task.folder / 'train'
    scores = [_score(task, rate) for rate in task.row.learning_rates or ()]
    finite = [score for score in scores if score['value'] is not None]
    if scores and not finite:
        raise UserError('learning_rates: no training is finite\nTry smaller ones.')
    best = max(finite, key=lambda score: score['value'])['learning_rate'] if scores else None
    cfg, notes, begun = _prepare(task, folder, best, hold_out=False)
    batch, crop, processes = cfg.train_dataloader.batch_size, crop_of(cfg), processes_of(task.launcher)[0]
    precision = {
        'AmpOptimWrapper': str(cfg.optim_wrapper.get('dtype') or 'float16'),
        'replk_mm.BFloat16OptimWrapper': 'bfloat16',
    }.get(cfg.optim_wrapper.get('type'), 'float32')
    recipe = describe_recipe(cfg, task.row.config, task.row.options, batch * processes)
    # Figures of one kind of recipe are ranked together; a common recipe has to be the same.
    origin = recipe['origin'] if recipe['origin'] != 'common' else recipe
    protocol = dict(
        crop=list(crop) if crop else None,
        batch=batch * processes,
        pretraining=_pretraining(task, cfg),
        precision=precision,
        recipe=f'best of {len(scores)} learning rates' if scores else origin,
    )
    if begun:  # the config no longer has the initial weights
        protocol['pretraining'] = records.read_json(folder / 'protocol.json').get(
            'pretraining', protocol['pretraining']
        )
    elif get_rank() == 0:
        records.write_json(folder / 'protocol.json', protocol)
    engine.train(cfg, notes, task.row.preflight)
    barrier()  # the first process writes the checkpoint
    done = records.read_json(folder / 'progress.json')
    iterations = done.get('iteration') or 0
    protocol.update(iterations=iterations, samples_seen=iterations * batch * processes)
    protocol.update(describe_machine(select_device(task.device)), processes=processes)
    return MeasurementResult(
        dict(seconds=done.get('seconds'), iterations=iterations, samples_seen=protocol['samples_seen']),
        protocol,
        dict(
            notes=notes,
            recipe=recipe,
            backbone=cfg.get('catalogue'),
            resumed_from=cfg.load_from if begun else None,
            processes=processes,
            learning_rates=scores,
            training_images=cfg.get('training_images'),
        ),
        dict(work_dir=folder),
    )


def _prepare(task: Task, folder: Path, rate: float | None, hold_out: bool) -> tuple[Config, list[str], str | None]:
    """The config of a training, lines for its log, and the checkpoint from which it continues, if it has begun."""
    cfg = load_task_config(task)
    if rate is not None:
        cfg.optim_wrapper.optimizer.lr = rate
        # mmengine logs all runs of one name to the folder of the first.
        cfg.experiment_name = f'{cfg.get("experiment_name", task.name)} {folder.name}'
        cfg.visualizer = {**(cfg.get('visualizer') or {}), 'name': cfg.experiment_name}
    add_progress_hook(cfg, folder / 'progress.json', 'train')
    begun = last_checkpoint(folder) if folder.is_dir() else None
    notes = prepare_training(
        cfg,
        RunOptions(
            data_root=task.data_root,
            work_dir=str(folder),
            max_iters=task.row.iterations,
            resume='auto' if begun else None,
            pretrained=task.row.pretrained_of(task.seed),
            seed=task.seed,
            launcher=task.launcher,
            device=task.device,
            fraction=task.row.fraction,
            hold_out=hold_out,
        ),
    )
    return cfg, notes, begun


def _score(task: Task, rate: float) -> dict[str, Any]:
    """Train at a learning rate, without the hold-out, and return the metric on it; None if the loss diverges."""
    folder = task.folder / 'tries' / f'{rate:g}'
    stored = records.read_json(folder / 'score.json')
    if stored:
        return stored
    cfg, notes, _ = _prepare(task, folder, rate, hold_out=True)
    loop = cfg.train_cfg
    loop.val_interval = loop.get('max_iters') or loop.max_epochs  # the end counts
    stored = dict(learning_rate=rate, value=None, training_images=cfg.training_images.to_dict())
    try:
        engine.train(cfg, notes, task.row.preflight)
        curve = read_curve(folder)[0]
        stored.update(metric=curve['name'], value=curve['metric'][-1][1])
    except NonFiniteError as error:
        stored.update(reason=str(error).splitlines()[0])
    barrier()
    if get_rank() == 0:
        for path in folder.glob('*.pth'):
            path.unlink()
        records.write_json(folder / 'score.json', stored)
    return stored


def _train_linear(task: Task) -> MeasurementResult:
    """Train a linear layer on cached features; rows and seeds share the cache."""
    from replk_mm.engine.probe import ProbeSettings, prepare_probe, probe  # imports mmseg

    folder, row = task.folder / 'train', task.row
    cfg, weights = load_task_config(task), row.pretrained_of(task.seed)
    options = RunOptions(task.data_root, work_dir=str(folder), pretrained=weights, device=task.device, overwrite=True)
    notes = prepare_probe(cfg, replace(options, fraction=row.fraction, seed=task.seed))
    pretraining = _pretraining(task, cfg)
    rates: dict[str, Any] = dict(learning_rates=row.learning_rates) if row.learning_rates else {}
    settings = ProbeSettings(seed=task.seed, cache=task.work_dir / 'features', **rates)
    started = time.monotonic()
    result = probe(cfg, notes, settings, select_device(task.device))
    images = result.record['images']
    steps = settings.epochs * -(-images // settings.batch_size)
    recipe = f'best of {len(settings.learning_rates)} learning rates, {settings.epochs} epochs'
    return MeasurementResult(
        dict(seconds=round(time.monotonic() - started, 3), iterations=steps, samples_seen=settings.epochs * images),
        dict(batch=settings.batch_size, pretraining=pretraining, precision='float32', recipe=recipe)
        | describe_machine(select_device(task.device)),
        dict(
            notes=notes,
            backbone=cfg.get('catalogue'),
            linear_probe=result.record,
            training_images=cfg.get('training_images'),
        ),
        dict(work_dir=folder),
    )


def describe_machine(device: str) -> dict[str, Any]:
    """Conditions of a time: device, CPU, threads, version of torch."""
    of = environment_info()
    return dict(device=of['gpu'] if device != 'cpu' else 'cpu', **{key: of[key] for key in ('cpu', 'threads', 'torch')})


def _pretraining(task: Task, cfg: Config) -> str:
    none = task.row.pretrained_of(task.seed) == 'none'
    return 'none' if none else task.pretraining or find_pretraining(cfg)


def find_pretraining(cfg: Config) -> str:
    """The pretraining of a config's backbone as named in the papers; the file name of unknown weights."""
    named = next(
        (
            initial['checkpoint']
            for initial in as_list((cfg.model.get('backbone') or {}).get('init_cfg'))
            if initial.get('type') == 'Pretrained'
        ),
        None,
    )
    if not named:
        return (cfg.get('catalogue') or {}).get('pretraining', 'none')
    if found := weights_by_url().get(named):
        return found[1].pretraining
    return 'ImageNet-1K' if named.startswith(_IMAGENET) else Path(named).name


def read_curve(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and facts of the curve of a training.

    Args:
        folder: Work dir of the training.

    Raises:
        UserError: If it has no logs.
    """
    loss: dict[int, float] = {}
    metric: dict[int, float] = {}
    epochs: dict[int, int] = {}
    name = None
    for line in _scalars(folder):
        step: int = line.get('step', 0)
        if 'loss' in line:
            loss[step] = line['loss']
            epochs[line.get('epoch', 0)] = step
        for key in PRIMARY_METRICS:
            if key in line and 'loss' not in line:
                name = key
                # where epochs are counted, the step of a validation is its epoch
                metric[epochs.get(step, step)] = in_percent(key, line[key])
    if not loss:
        raise UserError(f'{folder}: no log of a training (vis_data/scalars.json)')
    best = max(metric, key=lambda step: metric[step], default=None)
    return (
        dict(loss=sorted(map(list, loss.items())), metric=sorted(map(list, metric.items())), name=name),
        dict(best=None if best is None else dict(iteration=best, value=metric[best])),
    )


def _scalars(folder: Path) -> Iterator[dict[str, Any]]:
    # In the order of their start: the iterations that a later process repeated count.
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # a process was killed while it wrote
                continue
            yield {key: value for key, value in found.items() if not isinstance(value, float) or math.isfinite(value)}
