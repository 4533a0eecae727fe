"""Training a row of a suite, and what its log says of the way."""
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import barrier, get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from replk_mm import checkpoints
from replk_mm.bench import published
from replk_mm.bench.suites.row import Found
from replk_mm.bench.suites.task import Task, read_whole, write_whole
from replk_mm.data.datasets import crop_of
from replk_mm.engine import train as engine
from replk_mm.engine.config import as_list, load_config
from replk_mm.engine.machine import Options, processes_of
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.errors import UserError
from replk_mm.files import sha256
from replk_mm.registry import HOOKS

#: Seconds between two notes of how far training is.
_EVERY = 1.
#: Checkpoints by name whose pretraining is known without asking: classifiers on ImageNet-1K.
_IMAGENET = ('torchvision://', 'open-mmlab://resnet')


@HOOKS.register_module()
class SuiteHook(Hook):
    """Keep word of how far training is.

    Args:
        progress: File for ``iteration``, ``iterations`` and ``seconds``; those of earlier processes of the training count in.
    """

    priority = 'NORMAL'

    def __init__(self, progress: str) -> None:
        self.path = Path(progress)
        self._before = read_whole(self.path).get('seconds', 0.)
        self._begin = self._said = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        """Now and then write the file."""
        if get_rank() == 0 and time.monotonic() - self._said >= _EVERY:
            self._write(runner, runner.iter + 1)

    def before_train(self, runner: Runner) -> None:
        """Write the file."""
        if get_rank() == 0:
            self._write(runner, runner.iter)

    after_train = before_train

    def _write(self, runner: Runner, iteration: int) -> None:
        self._said = time.monotonic()
        write_whole(self.path, dict(iteration=iteration, iterations=runner.max_iters,
                                    seconds=round(self._before + self._said - self._begin, 3)))


def config_of(task: Task) -> Config:
    """The row's config."""
    return load_config(task.config, dict(task.options) or None)


def train(task: Task) -> Found:
    """Train; an interrupted training goes on from its last checkpoint.

    Raises:
        UserError: If something stands in the way, or the loss is no number.
    """
    folder = task.folder / 'train'
    cfg = config_of(task)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []),
                        dict(type='replk_mm.SuiteHook', progress=str(folder / 'progress.json'))]
    begun = last_checkpoint(folder) if folder.is_dir() else None
    notes = prepare_training(cfg, Options(
        data_root=task.data_root, work_dir=str(folder), max_iters=task.iterations, resume='auto' if begun else None,
        seed=task.seed, launcher=task.launcher, device=task.device))
    protocol = _protocol(cfg, task)
    if begun:  # weights to start from are no longer in the config
        protocol['pretraining'] = read_whole(folder / 'protocol.json').get('pretraining', protocol['pretraining'])
    elif get_rank() == 0:
        write_whole(folder / 'protocol.json', protocol)
    last = engine.train(cfg, notes)
    barrier()  # the first process writes the checkpoint
    done = task.training()
    iterations = done.get('iteration') or 0
    protocol.update(iterations=iterations, samples_seen=iterations * protocol['batch'])
    return Found(
        dict(seconds=done.get('seconds'), iterations=iterations, samples_seen=protocol['samples_seen']), protocol,
        dict(notes=notes, resumed_from=cfg.load_from if begun else None, processes=processes_of(task.launcher)[0]),
        dict(work_dir=str(folder.relative_to(task.work_dir))), checkpoint_record(str(last), True))


def _protocol(cfg: Config, task: Task) -> dict[str, Any]:
    kind = str(cfg.optim_wrapper.get('type'))
    precision = {'AmpOptimWrapper': str(cfg.optim_wrapper.get('dtype') or 'float16'),
                 'replk_mm.BFloat16OptimWrapper': 'bfloat16'}.get(kind, 'float32')
    crop = crop_of(cfg)
    return dict(crop=list(crop) if crop else None, batch=cfg.train_dataloader.batch_size * processes_of(task.launcher)[0],
                pretraining=task.pretraining or pretraining_of(cfg), precision=precision)


def pretraining_of(cfg: Config) -> str:
    """What a config's backbone was pretrained on, as the papers call it; the name of the weights where nobody knows."""
    named = next((initial['checkpoint'] for initial in as_list((cfg.model.get('backbone') or {}).get('init_cfg'))
                  if initial.get('type') == 'Pretrained'), None)
    if not named:
        return 'none'
    known = next((entry['pretraining'] for entry in published.table('weights') if entry['url'] == named), None)
    return known or ('ImageNet-1K' if named.startswith(_IMAGENET) else Path(named).name)


def checkpoint_record(path: str, trained: bool) -> dict[str, Any]:
    """What records say of weights."""
    file = checkpoints.fetch(path)
    meta = checkpoints.read(file).get('meta') or {}
    return dict(path=path, sha256=sha256(file), iteration=meta.get('iter'), trained=trained)


def curve(task: Task) -> Found:
    """Loss and metric along the training, from its logs."""
    folder = task.folder / 'train'
    loss: dict[int, float] = {}
    epochs: dict[int, int] = {}
    metric: dict[int, float] = {}
    name = None
    for line in _scalars(folder):
        step: int = line.get('step', 0)
        if 'loss' in line:
            loss[step] = line['loss']
            if 'epoch' in line:
                epochs[line['epoch']] = step
        for key in ('mIoU', 'coco/bbox_mAP'):
            if key in line and 'loss' not in line:
                name = key
                # where epochs are counted, the step of a validation is the epoch after which it was
                metric[epochs.get(step, step)] = line[key] * (100 if 'mAP' in key else 1)
    if not loss:
        raise UserError(f'{folder}: no log of a training (vis_data/scalars.json)')
    best = max(metric, key=lambda step: metric[step], default=None)
    return Found(dict(loss=sorted(map(list, loss.items())), metric=sorted(map(list, metric.items())), name=name),
                 facts=dict(best=None if best is None else dict(iteration=best, value=metric[best])))


def _scalars(folder: Path) -> Iterator[dict[str, Any]]:
    # In the order in which they were begun: what a later process has repeated counts.
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # a process was ended while it wrote
                continue
            yield {key: value for key, value in found.items() if not isinstance(value, float) or math.isfinite(value)}
