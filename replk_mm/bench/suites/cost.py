"""The cost of a row: parameters and multiply-accumulates, speed, memory."""

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from mmengine.config import Config

from replk_mm import published
from replk_mm.analysis.benchmark.baseline import OURS, randomize_constants
from replk_mm.analysis.benchmark.case import (
    BenchmarkCase,
    default_shape,
    load_case_config,
    min_batch_size,
    peak_memory,
    set_input_size,
)
from replk_mm.analysis.benchmark.synthetic_batch import SyntheticBatch
from replk_mm.analysis.config_complexity import build_on_meta, config_complexity
from replk_mm.analysis.timing import time_interleaved
from replk_mm.bench.suites.inputs import find_weights
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.worker import MeasurementResult
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.inference import build_for_inference
from replk_mm.engine.process import select_device
from replk_mm.engine.record import environment_info
from replk_mm.errors import UserError
from replk_mm.ops import prepack

#: Time limit in seconds of a speed measurement; slow networks take longer.
_SECONDS = 30.0
#: Largest number of rounds: of a small network, 15 would take a tenth of a second.
_ROUNDS = 100


def complexity(task: Task) -> MeasurementResult:
    """Parameters and multiply-accumulates; needs no weights."""
    paper = published.for_config(task.row.config.rpartition('::')[2])
    shape = task.row.macs_shape or (paper.input if paper else None)
    found = config_complexity(task.config, shape and (shape[0], shape[1]), task.row.options)
    before, after = found.training, found.deployed
    return MeasurementResult(
        dict(
            parameters=before.parameters,
            inference_parameters=before.inference_parameters,
            macs=before.macs,
            merged_parameters=after.inference_parameters,
            merged_macs=after.macs,
            parts=[asdict(part) for part in before.parts],
        ),
        dict(shape=list(found.shape), counter='replk_mm.analysis.complexity'),
        dict(changes=found.changes, notes=before.notes, uncounted=[asdict(operator) for operator in before.uncounted]),
    )


def speed(task: Task) -> MeasurementResult:
    """Milliseconds of inference, from image to result, before and after reparameterization, timed in turns."""
    case, cfg = _case(task)
    built = build_for_inference(cfg, case.checkpoint, device=case.device, classes=False, packed=False)
    net: Any = built.model
    if not case.checkpoint:
        randomize_constants(net, task.seed)
    merged = bool(built.meta.get('replk_mm', {}).get('reparameterized'))
    nets: dict[str, Any] = {} if merged else dict(training=net)
    nets['reparameterized'] = reparameterize(copy.deepcopy(net), inplace=True)[0]
    for each in nets.values():
        prepack(each)
    set_input_size(nets.values(), case.shape)
    work = SyntheticBatch(cfg, net, case.batch, case.shape, case.device)
    found = time_interleaved(
        {form: work.inference_call(each) for form, each in nets.items()}, repeats=_ROUNDS, seconds=_SECONDS
    )
    forms = {}
    for form in nets:
        of = found.summary(form)
        forms[form] = dict(
            median_ms=of.median,
            low_ms=of.low,
            high_ms=of.high,
            throughput=1e3 * case.batch / of.median,
            unreliable=found.problem(form),
        )
    faster = None if merged else asdict(found.speedup('reparameterized', 'training'))
    return MeasurementResult(
        dict(forms=forms, times_as_fast=faster, batch=case.batch),
        _machine(case),
        dict(rounds=found.rounds, warmup=found.warmup, load=found.load),
    )


def memory(task: Task) -> MeasurementResult:
    """Peak bytes of inference and of a training step beyond the loaded network, each in its own process."""
    case, cfg = _case(task)
    values: dict[str, int | None] = dict(inference_bytes=_memory(case), training_bytes=None)
    facts: dict[str, Any] = {}
    batch = task.row.batch or min_batch_size(build_on_meta(cfg), 'train')
    try:
        values['training_bytes'] = _memory(replace(case, mode='train', form='training', checkpoint=None, batch=batch))
    except UserError as error:  # a network too large to train on this machine may still run
        facts['training'] = str(error)
    return MeasurementResult(values, {**_machine(case), 'training_batch': batch}, facts)


def _memory(case: BenchmarkCase) -> int | None:
    grown = peak_memory(case, OURS, 'float32', True)
    if isinstance(grown, str):
        raise UserError(f'memory of {case.mode}: {grown}')
    return grown


def _case(task: Task) -> tuple[BenchmarkCase, Config]:
    height, width = task.row.shape or default_shape(task.config, task.row.options)
    case = BenchmarkCase(
        task.config,
        True,
        batch=task.row.batch or 1,
        options=task.row.options,
        checkpoint=find_weights(task),
        shape=(height, width),
        device=select_device(task.device),
        threads=torch.get_num_threads(),
    )
    return case, load_case_config(case)[0]


def _machine(case: BenchmarkCase) -> dict[str, Any]:
    of = environment_info()
    return dict(
        device=of['gpu'] if case.device != 'cpu' else 'cpu',
        cpu=of['cpu'],
        threads=case.threads,
        shape=list(case.shape),
        batch=case.batch,
        precision='float32',
        torch=of['torch'],
    )
