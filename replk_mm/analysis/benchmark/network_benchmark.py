"""How fast backbones and whole models run beside the same networks in plain torch."""

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.analysis import complexity
from replk_mm.analysis.benchmark import inference_engines as engines
from replk_mm.analysis.benchmark.baseline import OURS, PLAIN, PLAIN_TRAINING, build_networks
from replk_mm.analysis.benchmark.case import (
    BenchmarkCase,
    load_case_config,
    min_batch_size,
    peak_memory,
    set_input_size,
)
from replk_mm.analysis.benchmark.numerical_difference import (
    CLASS_MAP,
    TOLERANCES,
    NumericalDifference,
    compare_gradients,
    compare_outputs,
)
from replk_mm.analysis.benchmark.synthetic_batch import SyntheticBatch, convert_to_bfloat16, model_kind
from replk_mm.analysis.timing import Call, print_progress, time_interleaved, trim_heap
from replk_mm.engine.machine import keep_freed_memory
from replk_mm.errors import UserError, explained, first_line

#: Seconds of rest before each call while other engines take part: their threads and torch's wait busily for a while.
_PAUSE = 0.01


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    #: precisions of our network, of ``'float32'`` and ``'bfloat16'``; plain torch always runs in float32
    dtypes: Sequence[str] = ('float32',)
    repeats: int = 15  #: rounds at most
    warmup: int = 2  #: rounds before that do not count, at most
    seconds: float = 60.0  #: budget of a measurement, see :func:`replk_mm.analysis.timing.time_interleaved`
    memory: bool = True  #: measure memory too, each network in a process of its own
    engines: Sequence[str] = ()  #: names in :data:`replk_mm.analysis.benchmark.inference_engines.ENGINES`
    #: let plain torch keep freed memory too, which otherwise only this project's commands do
    same_allocator: bool = False


@dataclass
class Row:
    """A line of the table before it is timed."""

    name: str  #: name of the line
    call: Call  #: what is timed
    gap: NumericalDifference | None = None  #: difference from the results of plain torch; None for plain torch itself
    network: str = (
        ''  #: its name among :func:`replk_mm.analysis.benchmark.baseline.build_networks`; empty for other engines
    )
    how: str = 'float32'  #: precision, see :class:`SyntheticBatch`; for an engine its dtype

    @property
    def dtype(self) -> str:
        """Precision of the layers."""
        return 'float32' if self.how == 'float32' else 'bfloat16'


class Bench:
    """The networks of one mode, to be measured at one shape after the other.

    Args:
        job: What to measure, without batch and shape.
        settings: How to measure.

    Raises:
        UserError: If config or checkpoint do not fit.
    """

    def __init__(self, job: BenchmarkCase, settings: Settings) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.settings = job, settings
        self.cfg, self.notes = load_case_config(job)
        self.networks, changes = build_networks(self.cfg, job.whole, job.form, job.checkpoint)
        # Training steps at one shape change the statistics of BatchNorm, of each network separately.
        self._buffers = {
            name: {key: value.clone() for key, value in net.to(job.device).named_buffers()}
            for name, net in self.networks.items()
        }
        backbone = self.cfg.model.backbone
        if job.mode == 'train':
            step = (
                'forward, loss, backward, optimizer (learning rate 0)'
                if job.whole
                else 'forward, mean squares of the features as a loss, backward; no optimizer'
            )
            self.note(
                f'train: {step}; from the config: with_cp={backbone.get("with_cp", False)} (activation '
                f'checkpointing), drop_path_rate={backbone.get("drop_path_rate", 0.0)}'
            )
        elif changes is not None:
            self.note(
                f'inference: {changes}'
                if len(self.networks) == 3
                else 'inference: nothing to merge or fold, the training form is the same network'
            )
        if model_kind(self.networks[OURS]) == 'detector' and not job.checkpoint:
            self.note('random weights find few objects: a trained detector has more to do behind its proposals')

    def note(self, line: str) -> None:
        """Keep a line for the report, once."""
        if line not in self.notes:
            self.notes.append(line)

    def run(self, batch: int, shape: tuple[int, int]) -> dict:
        """Measure the networks at one shape.

        Args:
            batch: Images; 0 for as few as the mode allows.
            shape: Height and width in pixels.

        Returns:
            Plain data: the measured point, with a row for each network.

        Raises:
            UserError: If the networks cannot run there.
        """
        least = min_batch_size(self.networks[OURS], self.job.mode)
        job = replace(self.job, shape=shape, batch=batch or least)
        print_progress(f'{job.mode} {job.batch}x3x{shape[0]}x{shape[1]}')
        if job.batch < least:
            raise UserError(
                f'{job.config}: --batch {job.batch}: in training BatchNorm of maps pooled to 1x1 needs two '
                f'values\nUse --batch {least} or more, or --mode inference.'
            )
        for name, net in self.networks.items():
            net.load_state_dict(self._buffers[name], strict=False)
        set_input_size(self.networks.values(), shape)
        failing = explained(
            f'{job.config}: {job.mode} of {job.batch}x3x{shape[0]}x{shape[1]} fails',
            'Try another --shape or a smaller --batch.',
        )
        with failing, tempfile.TemporaryDirectory() as folder:
            work = SyntheticBatch(self.cfg, self.networks[OURS], job.batch, shape, job.device)
            rows = self._inference(work, Path(folder)) if job.mode == 'inference' else self._training(work)
            try:
                found = time_interleaved(
                    {row.name: row.call for row in rows},
                    self.settings.repeats,
                    self.settings.warmup,
                    self.settings.seconds,
                    _PAUSE if self.settings.engines else 0.0,
                    before=self._allocators(rows),
                )
            finally:
                keep_freed_memory()
        done = []
        for row in rows:
            gap = row.gap or NumericalDifference()
            done.append(
                dict(
                    name=row.name,
                    dtype=row.dtype,
                    how=row.how,
                    milliseconds=asdict(found.summary(row.name)),
                    times_as_fast=asdict(found.speedup(row.name, PLAIN)),
                    samples=found.milliseconds[row.name],
                    memory_bytes=self._memory(job, row),
                    difference=gap.relative,
                    differing_pixels=gap.pixels,
                    equal=None if row.gap is None else gap.within(TOLERANCES[job.mode, row.dtype]),
                )
            )
        return dict(
            mode=job.mode,
            form=job.form,
            batch=job.batch,
            height=shape[0],
            width=shape[1],
            rounds=found.rounds,
            warmup=found.warmup,
            rows=done,
        )

    def _allocators(self, rows: list[Row]) -> dict[str, Call]:
        """Untimed calls that give each network the allocator settings of a process of its own."""
        before: dict[str, Call] = {}
        if self.settings.same_allocator or self.job.device != 'cpu':
            return before
        keeps = [row.network not in (PLAIN, PLAIN_TRAINING) for row in rows]
        for i, row in enumerate(rows):
            if i == 0 or keeps[i] != keeps[i - 1]:
                before[row.name] = functools.partial(_change_allocator, keeps[i], row.call)
        return before

    def _inference(self, work: SyntheticBatch, folder: Path) -> list[Row]:
        def gap_of(net: nn.Module, how: str = 'float32') -> NumericalDifference:
            return compare_outputs(reference, work.outputs(net, how))

        reference = work.outputs(self.networks[PLAIN])
        rows, ours = [], self.networks[OURS]
        for name, net in self.networks.items():
            if name != OURS or 'float32' in self.settings.dtypes:
                gap = None if name == PLAIN else gap_of(net)
                rows.append(Row(name, work.inference_call(net), gap, name))
        if 'bfloat16' in self.settings.dtypes:
            converted = copy.deepcopy(ours)
            convert_to_bfloat16(converted)
            # Which of the two is faster depends on the network and the machine.
            for how, net, suffix in (('autocast', ours, ''), ('converted', converted, ' weights')):
                rows += self._bfloat16(
                    Row(f'{OURS}, bfloat16{suffix}', work.inference_call(net, how), None, OURS, how),
                    functools.partial(gap_of, net, how),
                )
        return rows + self._engines(work, reference, folder)

    def _training(self, work: SyntheticBatch) -> list[Row]:
        reference = work.gradients(self.networks[PLAIN])
        rows = [Row(PLAIN, work.training_call(self.networks[PLAIN]), network=PLAIN)]
        net = self.networks[OURS]
        if 'float32' in self.settings.dtypes:
            rows.append(Row(OURS, work.training_call(net), compare_gradients(reference, work.gradients(net)), OURS))
        if 'bfloat16' in self.settings.dtypes:
            rows += self._bfloat16(
                Row(f'{OURS}, bfloat16', work.training_call(net, 'autocast'), None, OURS, 'autocast'),
                lambda: compare_gradients(reference, work.gradients(net, 'autocast'), True),
            )
        return rows

    def _bfloat16(self, row: Row, compare: Callable[[], NumericalDifference]) -> list[Row]:
        """The row with its difference, or none and a note if a layer has no bfloat16."""
        try:
            row.gap = compare()
            row.call()
        except (RuntimeError, TypeError) as error:
            self.note(f'{self.job.mode}, {row.name} {row.how}: not possible: {first_line(error)}')
            return []
        return [row]

    def _engines(self, work: SyntheticBatch, reference: dict[str, Tensor], folder: Path) -> list[Row]:
        def infer(run: engines.Run) -> list[np.ndarray]:  # as in the other rows, from image to result
            return run(work.normalized(plain))

        rows, plain, path = list[Row](), self.networks[PLAIN], folder / 'network.onnx'
        names = [CLASS_MAP] if model_kind(plain) == 'segmentor' else list(reference)
        for engine in self.settings.engines:
            lacking = engines.missing(engine) if self.job.device == 'cpu' else f'{engine}: compared on CPUs only'
            if lacking:
                self.note(lacking)
                continue
            try:
                if not path.exists():
                    print_progress('  exporting')
                    engines.export(plain, work.normalized(plain), path)
                for dtype in ('float32', *(dtype for dtype in self.settings.dtypes if dtype != 'float32')):
                    run = engines.load(engine, path, self.job.threads, dtype)
                    outputs = map(torch.from_numpy, infer(run))
                    gap = compare_outputs(
                        {name: reference[name] for name in names}, dict(zip(names, outputs, strict=True))
                    )
                    rows.append(
                        Row(
                            engine if dtype == 'float32' else f'{engine}, {dtype}',
                            functools.partial(infer, run),
                            gap,
                            how=dtype,
                        )
                    )
            except Exception as error:  # of an exporter or an engine: the other rows are measured all the same
                self.note(f'{engine}: {first_line(error)}')
        return rows

    def _memory(self, job: BenchmarkCase, row: Row) -> int | None:
        if not self.settings.memory or not row.network:
            return None
        print_progress(f'  memory of {row.name}')
        found = peak_memory(job, row.network, row.how, self.settings.same_allocator or row.network == OURS)
        if isinstance(found, str):
            self.note(f'memory of {row.name}: not measured: {found}')
            return None
        return found


def _change_allocator(keep: bool, call: Call) -> None:
    keep_freed_memory(keep)
    trim_heap()  # what the others left
    call()  # allocates what this network will reuse


def run(
    job: BenchmarkCase,
    settings: Settings,
    modes: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
) -> dict:
    """Measure a backbone or a whole model in every mode, shape and batch.

    Args:
        job: What to measure; its form is that of inference. Training is in the training form.
        settings: How to measure.
        modes: Of ``'inference'`` and ``'train'``.
        shapes: Heights and widths in pixels.
        batches: Images; 0 for as few as the mode allows.

    Returns:
        Plain data: what was measured, notes, and a point for each combination.

    Raises:
        UserError: If an argument does not fit.
    """
    notes = [
        f'weights: {job.checkpoint or "random, including statistics of BatchNorm and layer scales"}',
        "plain torch: the same network and weights in float32, with torch's own depthwise convolutions, torch's "
        "default memory layout, activations not in place and the libraries' own heads",
    ]
    points = []
    for mode in modes:
        bench = Bench(replace(job, mode=mode, form=job.form if mode == 'inference' else 'training'), settings)
        points += [bench.run(batch, shape) for shape in shapes for batch in batches]
        notes += [note for note in bench.notes if note not in notes]
    backbone = bench.cfg.model.backbone
    arch = backbone.get('arch', '')
    return dict(
        what='model' if job.whole else 'backbone',
        config=job.config,
        cfg_options=job.options or {},
        checkpoint=job.checkpoint,
        backbone=f'{backbone.type} {arch if isinstance(arch, str) else ""}'.strip(),
        parameters=complexity.count_parameters(bench.networks[OURS]),
        settings=asdict(settings),
        notes=notes,
        points=points,
    )
