"""Train a row, and read the curves of its training."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import barrier, get_rank

from replk_mm import published
from replk_mm.bench.records import read_json, write_json
from replk_mm.bench.suites.accuracy import PRIMARY_METRICS, metric_protocol
from replk_mm.bench.suites.inputs import describe_split, load_task_config
from replk_mm.bench.suites.progress_hook import add_progress_hook
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.worker import MeasurementResult
from replk_mm.data.datasets import as_list, crop_of
from replk_mm.engine import train as engine
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions, processes_of
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import UserError

#: Prefixes of checkpoints of ImageNet-1K classifiers.
_IMAGENET = ('torchvision://', 'open-mmlab://resnet')


def train(task: Task) -> MeasurementResult:
    """Train a row; an interrupted training continues from its last checkpoint.

    Raises:
        UserError: If the config, the data or the machine do not allow it, or the loss is not finite.
    """
    folder = task.folder / 'train'
    cfg = load_task_config(task)
    add_progress_hook(cfg, folder / 'progress.json')
    begun = last_checkpoint(folder) if folder.is_dir() else None
    notes = prepare_training(
        cfg,
        RunOptions(
            data_root=task.data_root,
            work_dir=str(folder),
            max_iters=task.row.iterations,
            resume='auto' if begun else None,
            seed=task.seed,
            launcher=task.launcher,
            device=task.device,
        ),
    )
    batch, crop, processes = cfg.train_dataloader.batch_size, crop_of(cfg), processes_of(task.launcher)[0]
    precision = {
        'AmpOptimWrapper': str(cfg.optim_wrapper.get('dtype') or 'float16'),
        'replk_mm.BFloat16OptimWrapper': 'bfloat16',
    }.get(cfg.optim_wrapper.get('type'), 'float32')
    protocol = dict(
        crop=list(crop) if crop else None,
        batch=batch * processes,
        pretraining=task.pretraining or find_pretraining(cfg),
        precision=precision,
    )
    if begun:  # the config no longer has the initial weights
        protocol['pretraining'] = read_json(folder / 'protocol.json').get('pretraining', protocol['pretraining'])
    elif get_rank() == 0:
        write_json(folder / 'protocol.json', protocol)
    engine.train(cfg, notes)
    barrier()  # the first process writes the checkpoint
    done = read_json(folder / 'progress.json')
    iterations = done.get('iteration') or 0
    protocol.update(iterations=iterations, samples_seen=iterations * batch * processes)
    return MeasurementResult(
        dict(seconds=done.get('seconds'), iterations=iterations, samples_seen=protocol['samples_seen']),
        protocol,
        dict(notes=notes, resumed_from=cfg.load_from if begun else None, processes=processes),
        dict(work_dir=folder),
    )


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
        return 'none'
    known = next((entry['pretraining'] for entry in published.table('weights') if entry['url'] == named), None)
    return known or ('ImageNet-1K' if named.startswith(_IMAGENET) else Path(named).name)


def curve(task: Task) -> MeasurementResult:
    """Loss and validation metric along the training, from its logs."""
    cfg = load_task_config(task)
    values, facts = read_curve(task.folder / 'train')
    return MeasurementResult(values, metric_protocol(task, cfg, describe_split(cfg, 'val')[0]), facts)


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
                metric[epochs.get(step, step)] = line[key] * (100 if 'mAP' in key else 1)
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
