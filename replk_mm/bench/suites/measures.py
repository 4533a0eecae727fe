"""How each measurement of a suite is made: a function of the row's task for each, and the environment they are made in."""
import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from replk_mm.analysis import complexity_config, plain
from replk_mm.analysis.job import Job, default_shape, fitted_config, memory_of, set_shape, smallest_batch
from replk_mm.analysis.speed import measure
from replk_mm.analysis.workload import Workload
from replk_mm.bench import published
from replk_mm.bench.suites.row import Found, Measure
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.testing import curve_protocol, layout, metric, weights_of, weights_record
from replk_mm.bench.suites.training import config_of, curve, train
from replk_mm.data.datasets import datasets_of
from replk_mm.engine import results
from replk_mm.engine.config import build_model, set_data_root
from replk_mm.engine.machine import keep_freed_memory, select_device
from replk_mm.errors import UserError
from replk_mm.loading import load_model
from replk_mm.ops import pack
from replk_mm.reparam import reparameterize

#: Images of an effective receptive field, as in the paper.
_ERF_IMAGES = 50
#: Seconds that a measurement of speed takes at most, but for slow networks.
_SECONDS = 30.


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return results.environment()


def complexity(task: Task) -> Found:
    """Parameters and multiply-accumulates; no weights are needed."""
    paper = published.for_config(task.config.rpartition('::')[2])
    shape = task.macs_shape or (paper.input if paper else None)
    found = complexity_config.report(task.config, shape, dict(task.options) or None)
    before, after = found.training, found.deployed
    return Found(
        dict(parameters=before.parameters, inference_parameters=before.inference_parameters, macs=before.macs,
             merged_parameters=after.inference_parameters, merged_macs=after.macs, parts=[asdict(p) for p in before.parts]),
        dict(shape=list(found.shape), counter='replk_mm.analysis.complexity'),
        dict(changes=found.changes, notes=before.notes, uncounted=[asdict(operator) for operator in before.uncounted]))


def speed(task: Task) -> Found:
    """Milliseconds of inference, from image to result, before and after reparameterization, in turns."""
    job, cfg = _job(task)
    net: Any = build_model(_without_start(cfg))
    merged = False
    if job.checkpoint:
        merged = bool(load_model(net, job.checkpoint)[1].get('replk_mm', {}).get('reparameterized'))
    else:
        plain.randomize(net, task.seed)
    net.to(job.device)
    nets: dict[str, Any] = {} if merged else {'training': net}
    nets['reparameterized'] = reparameterize(copy.deepcopy(net), inplace=True)[0]
    for each in nets.values():
        pack(each)
    set_shape(nets.values(), job.shape)
    load = os.getloadavg()[0]
    work = Workload(cfg, net, job.batch, job.shape, job.device)
    found = measure({form: work.inference(each) for form, each in nets.items()}, seconds=_SECONDS)
    forms = {}
    for form in nets:
        of = found.timing(form)
        forms[form] = dict(median_ms=of.median, low_ms=of.low, high_ms=of.high, throughput=1e3 * job.batch / of.median)
    faster = None if merged else asdict(found.times_as_fast('reparameterized', 'training'))
    return Found(dict(forms=forms, times_as_fast=faster, batch=job.batch), _machine(job),
                 dict(rounds=found.rounds, warmup=found.warmup, load_before=load), checkpoint=weights_record(task))


def memory(task: Task) -> Found:
    """Bytes that inference and a training step need at their peak beyond the loaded network, each in a process of its own."""
    job, cfg = _job(task)
    found = dict(inference_bytes=_memory(job))
    facts: dict[str, Any] = {}
    net: Any = complexity_config.build(cfg)  # as it is fitted: other norms need other batches
    step = replace(job, mode='train', form='training', checkpoint=None,
                   batch=task.batch or smallest_batch(net, 'train'))
    try:
        found['training_bytes'] = _memory(step)
    except UserError as error:  # what is too large to train here can still run
        found['training_bytes'], facts['training'] = None, str(error)
    return Found(found, {**_machine(job), 'training_batch': step.batch}, facts, checkpoint=weights_record(task))


def _memory(job: Job) -> int | None:
    grown = memory_of(job, plain.OURS, 'float32', True)
    if isinstance(grown, str):
        raise UserError(f'memory of {job.mode}: {grown}')
    return grown


def _job(task: Task) -> tuple[Job, Any]:
    job = Job(task.config, True, batch=task.batch or 1, options=dict(task.options) or None, checkpoint=weights_of(task),
              shape=task.shape or default_shape(task.config, dict(task.options) or None),
              device=select_device(task.device), threads=torch.get_num_threads())
    return job, fitted_config(job)[0]


def _without_start(cfg: Any) -> Any:
    """A config whose backbone fetches no weights to start from."""
    cfg.model.get('backbone', {}).pop('init_cfg', None)
    return cfg


def _machine(job: Job) -> dict[str, Any]:
    of = results.environment()
    return dict(device=of['gpu'] if job.device != 'cpu' else 'cpu', cpu=of['cpu'], threads=job.threads, shape=list(job.shape),
                batch=job.batch, precision='float32', torch=of['torch'])


def erf(task: Task) -> Found:
    """Effective receptive field of the backbone on images of the test split."""
    from replk_mm.analysis.erf import measure_erf  # draws
    cfg = config_of(task)
    if task.data_root:
        set_data_root(cfg, task.data_root)
    of = layout(next(datasets_of(cfg, ('test',))), cfg.get('default_scope', 'mmengine'))
    size = task.erf.get('size') or max(default_shape(task.config, dict(task.options) or None))
    out = task.folder / 'erf'
    found = measure_erf(config_of(task), weights_of(task), Path(of['root'], of['images'] or ''), size,
                        task.erf.get('count', _ERF_IMAGES), out, device=task.device, seed=task.seed)
    below = out.relative_to(task.work_dir)
    return Found(found.values(), found.protocol(), dict(notes=found.notes(), backbone=found.backbone),
                 dict(heat_map=str(below / 'erf.png'), matrix=str(below / 'erf.npz')), weights_record(task))


def shape_bias(task: Task) -> Found:
    """Whether the network decides by shape or by texture, on the scenes in the data root where the two disagree."""
    from replk_mm.analysis import shape_bias  # draws
    checkpoint = weights_of(task)
    assert checkpoint
    cfg, out = config_of(task), task.folder / 'shape_bias'
    root = task.data_root or str(next(datasets_of(cfg, ('test',))).get('data_root'))
    found = shape_bias.measure(cfg, checkpoint, Path(root), out, task.device)
    below = out.relative_to(task.work_dir)
    return Found(found.values(), found.protocol(), {},
                 dict(picture=str(below / 'shape_bias.png'), decisions=str(below / 'shape_bias.json')), weights_record(task))


def learning_curve(task: Task) -> Found:
    """Loss and metric along the training."""
    found = curve(task)
    found.protocol = curve_protocol(task)
    found.checkpoint = weights_record(task)
    return found


keep_freed_memory()
TABLE: Mapping[str, Measure] = dict(train=train, complexity=complexity, metric=metric, curve=learning_curve, erf=erf,
                                    shape_bias=shape_bias, speed=speed, memory=memory)
