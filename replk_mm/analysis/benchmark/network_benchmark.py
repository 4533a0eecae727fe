"""Speed and memory of backbones and whole models beside the same networks in plain torch."""

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.analysis.benchmark import inference_engines as engines
from replk_mm.analysis.benchmark.case import (
    OURS,
    PLAIN,
    PLAIN_CHANNELS_LAST,
    PLAIN_TRAINING,
    BenchmarkCase,
    build_networks,
    build_part,
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
from replk_mm.analysis.benchmark.synthetic_batch import FLOAT32, Precision, SyntheticBatch, convert_weights, model_kind
from replk_mm.analysis.complexity import count_parameters
from replk_mm.analysis.energy import energy_per_call
from replk_mm.analysis.gpu import DTYPES, PRECISION_NOTE, matmul_precision
from replk_mm.analysis.timing import CUDA_EVENTS, WALL_TIME, Call, print_progress, time_interleaved, trim_heap
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint
from replk_mm.deploy.artefact import Artefact, Manifest
from replk_mm.engine.artefact_model import use_artefact
from replk_mm.engine.process import keep_freed_memory
from replk_mm.errors import UserError, explain_errors, first_line
from replk_mm.wrappers import input_channels

#: Seconds of sleep before each call if other engines take part: their threads and torch's spin for a while.
_PAUSE = 0.01


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of all measurements of a run."""

    #: precisions of our network, in :data:`replk_mm.analysis.gpu.DTYPES`; on GPUs also of further rows of plain torch,
    #: which otherwise runs in float32
    dtypes: Sequence[str] = ('float32',)
    repeats: int = 15  #: largest number of measured rounds
    warmup: int = 2  #: largest number of warm-up rounds
    seconds: float = 60.0  #: time budget of a measurement, see :func:`replk_mm.analysis.timing.time_interleaved`
    memory: bool = True  #: measure memory too, each network in a process of its own
    engines: Sequence[str] = ()  #: names in :data:`replk_mm.analysis.benchmark.inference_engines.ENGINES`
    artefacts: Sequence[str] = ()  #: folders of exported networks
    channels_last: bool = False  #: measure plain torch in channels-last memory too
    #: let plain torch keep freed memory too, which otherwise only this project's commands do
    same_allocator: bool = False


@dataclass
class BenchmarkRow:
    """A row of the table before it is timed."""

    name: str  #: name of the row
    call: Call  #: the call to time
    difference: NumericalDifference | None = None  #: from plain torch; None for plain torch itself
    network: str = ''  #: name in :func:`replk_mm.analysis.benchmark.case.build_networks`; empty for other engines
    precision: Precision = FLOAT32  #: precision of the computation


class NetworkBenchmark:
    """The networks of one mode, to be measured at several shapes.

    Args:
        case: The network; batch and shape are set by :meth:`measure`.
        settings: Settings of all measurements.

    Raises:
        UserError: If config or checkpoint do not fit.
    """

    def __init__(self, case: BenchmarkCase, settings: BenchmarkSettings) -> None:
        torch.set_num_threads(case.threads)
        self.case, self.settings = case, settings
        self.cfg, self.notes = load_case_config(case)
        self.networks, changes = build_networks(self.cfg, case.whole_model, case.form, case.checkpoint)
        if not settings.channels_last:
            del self.networks[PLAIN_CHANNELS_LAST]
        # Training steps at one shape change the statistics of BatchNorm, of each network separately.
        self._buffers = {
            name: {key: value.clone() for key, value in net.to(case.device).named_buffers()}
            for name, net in self.networks.items()
        }
        backbone = self.cfg.model.backbone
        if case.mode == 'train':
            step = (
                'forward, loss, backward, optimizer (learning rate 0)'
                if case.whole_model
                else 'forward, mean squares of the features as a loss, backward; no optimizer'
            )
            self.note(
                f'train: {step}; from the config: with_cp={backbone.get("with_cp", False)} (activation '
                f'checkpointing), drop_path_rate={backbone.get("drop_path_rate", 0.0)}'
            )
        elif changes is not None:
            self.note(
                f'inference: {changes}'
                if PLAIN_TRAINING in self.networks
                else 'inference: nothing to merge or fold, the training form is the same network'
            )
        if model_kind(self.networks[OURS]) == 'detector' and not case.checkpoint:
            self.note('random weights find few objects; a trained detector spends more time after its proposals')

    def note(self, line: str) -> None:
        """Keep a line for the report, once."""
        if line not in self.notes:
            self.notes.append(line)

    @matmul_precision('float32')  # rows in TF32 switch it on for their own calls
    def measure(self, batch: int, shape: tuple[int, int]) -> dict:
        """Measure the networks at one shape.

        Args:
            batch: Number of images; 0 for the smallest that the mode allows.
            shape: Height and width in pixels.

        Returns:
            Plain data: the measured point, with one row per network.

        Raises:
            UserError: If the networks cannot run at this shape.
        """
        smallest = min_batch_size(self.networks[OURS], self.case.mode)
        case = replace(self.case, shape=shape, batch=batch or smallest)
        size = f'{case.batch}x{input_channels(self.networks[OURS])}x{shape[0]}x{shape[1]}'
        print_progress(f'{case.mode} {size}')
        if case.batch < smallest:
            raise UserError(
                f'{case.config}: --batch {case.batch}: in training, BatchNorm of maps pooled to 1x1 needs two '
                f'values\nUse --batch {smallest} or more, or --mode inference.'
            )
        for name, net in self.networks.items():
            for key, buffer in net.named_buffers():
                buffer.copy_(self._buffers[name][key])
        set_input_size(self.networks.values(), shape)
        failing = explain_errors(
            f'{case.config}: {case.mode} of {size} fails', 'Try another --shape or a smaller --batch.'
        )
        with failing, tempfile.TemporaryDirectory() as folder:
            synthetic = SyntheticBatch(self.cfg, self.networks[OURS], case.batch, shape, case.device, case.image)
            rows = (
                self._inference_rows(synthetic, Path(folder))
                if case.mode == 'inference'
                else self._training_rows(synthetic)
            )
            try:
                timings = time_interleaved(
                    {row.name: row.call for row in rows},
                    self.settings.repeats,
                    self.settings.warmup,
                    self.settings.seconds,
                    _PAUSE if self.settings.engines or self.settings.artefacts else 0.0,
                    before=self._allocator_changes(rows),
                    device=case.device,
                    events=case.device != 'cpu' and not case.whole_model,  # part of a model's work is on the CPU
                )
            finally:
                keep_freed_memory()
        measured = []
        for row in rows:
            difference = row.difference or NumericalDifference()
            energy = energy_per_call(row.call, case.device) if row.network == OURS else None
            measured.append(
                dict(
                    name=row.name,
                    dtype=row.precision.dtype,
                    how=row.precision.how or row.precision.dtype,
                    milliseconds=asdict(timings.summary(row.name)),
                    unreliable=timings.problem(row.name),
                    times_as_fast=asdict(timings.speedup(row.name, PLAIN)),
                    samples=timings.milliseconds[row.name],
                    memory_bytes=self._memory(case, row),
                    joules=energy and energy[0],
                    difference=difference.relative,
                    differing_pixels=difference.pixels,
                    equal=row.difference and difference.within(TOLERANCES[case.mode, row.precision.dtype]),
                )
            )
        if case.image:  # the pipeline decides
            height, width = synthetic.normalized(self.networks[OURS]).shape[2:]
            shape = height, width
        return dict(
            mode=case.mode,
            form=case.form,
            batch=case.batch,
            height=shape[0],
            width=shape[1],
            rounds=timings.rounds,
            warmup=timings.warmup,
            load=timings.load,
            clock=timings.clock,
            rows=measured,
        )

    def _allocator_changes(self, rows: list[BenchmarkRow]) -> dict[str, Call]:
        """Untimed calls that give each network the allocator settings of a process of its own."""
        before: dict[str, Call] = {}
        if self.settings.same_allocator or self.case.device != 'cpu':
            return before
        keeps = [row.network not in (PLAIN, PLAIN_TRAINING, PLAIN_CHANNELS_LAST) for row in rows]
        for i, row in enumerate(rows):
            if i == 0 or keeps[i] != keeps[i - 1]:
                before[row.name] = functools.partial(_change_allocator, keeps[i], row.call)
        return before

    def _inference_rows(self, synthetic: SyntheticBatch, folder: Path) -> list[BenchmarkRow]:
        def compare(net: nn.Module, precision: Precision = FLOAT32) -> NumericalDifference:
            return compare_outputs(reference, synthetic.outputs(net, precision))

        reference = synthetic.outputs(self.networks[PLAIN])
        rows = []
        for name, net in self.networks.items():
            if name != OURS or 'float32' in self.settings.dtypes:
                difference = None if name == PLAIN else compare(net)
                rows.append(BenchmarkRow(name, synthetic.inference_call(net), difference, name))
        # Whether autocast or converted weights are faster depends on the network and the machine.
        for name, precision in self._other_precisions(('autocast', 'converted')):
            net, suffix = self.networks[name], ''
            if precision.how == 'converted':
                net, suffix = copy.deepcopy(net), ' weights'
                convert_weights(net, DTYPES[precision.dtype])
            call = synthetic.inference_call(net, precision)
            row = BenchmarkRow(f'{name}, {precision.dtype}{suffix}', call, None, name, precision)
            rows += self._compared_row(row, functools.partial(compare, net, precision))
        return rows + self._engine_rows(synthetic, reference, folder) + self._artefact_rows(synthetic, reference)

    def _training_rows(self, synthetic: SyntheticBatch) -> list[BenchmarkRow]:
        def compare(net: nn.Module, precision: Precision) -> NumericalDifference:
            return compare_gradients(reference, synthetic.gradients(net, precision), as_one_vector=True)

        plain = self.networks[PLAIN]
        reference = synthetic.gradients(plain)
        rows = [BenchmarkRow(PLAIN, synthetic.training_call(plain), network=PLAIN)]
        for name, other in self.networks.items():
            if name == PLAIN_CHANNELS_LAST or (name == OURS and 'float32' in self.settings.dtypes):
                difference = compare_gradients(reference, synthetic.gradients(other))
                rows.append(BenchmarkRow(name, synthetic.training_call(other), difference, name))
        for name, precision in self._other_precisions(('autocast',)):
            net = self.networks[name]
            call = synthetic.training_call(net, precision)
            row = BenchmarkRow(f'{name}, {precision.dtype}', call, None, name, precision)
            rows += self._compared_row(row, functools.partial(compare, net, precision))
        return rows

    def _other_precisions(self, ways: Sequence[str]) -> list[tuple[str, Precision]]:
        """Networks with each further precision in which to measure them, in these ways."""
        return [
            (name, Precision(dtype, how))
            for dtype in self.settings.dtypes
            if dtype != 'float32'
            for name in ([OURS] if self.case.device == 'cpu' else [PLAIN, OURS])
            for how in ([''] if dtype == 'tf32' else ways)
        ]

    def _compared_row(self, row: BenchmarkRow, compare: Callable[[], NumericalDifference]) -> list[BenchmarkRow]:
        """The row with its difference, or no row and a note if a layer does not support its precision."""
        in_precision = matmul_precision(row.precision.dtype)  # as a decorator
        row.call = in_precision(row.call)
        try:
            row.difference = in_precision(compare)()
            row.call()
        except (RuntimeError, TypeError) as error:
            self.note(f'{self.case.mode}, {row.name} {row.precision.how}: not possible: {first_line(error)}')
            return []
        return [row]

    def _engine_rows(self, synthetic: SyntheticBatch, reference: dict[str, Tensor], folder: Path) -> list[BenchmarkRow]:
        def infer(call: engines.EngineCall) -> list[Tensor]:  # from image to result, as in the other rows
            return call(synthetic.normalized(plain))

        rows, plain = list[BenchmarkRow](), self.networks[PLAIN]
        names = [CLASS_MAP] if model_kind(plain) == 'segmentor' else list(reference)
        for engine in self.settings.engines:
            if missing := engines.missing_distributions(engine):
                self.note(f'{engine}: not installed (pip install {" ".join(missing)})')
                continue
            if self.case.device != 'cpu':
                self.note(f'{engine}: compared on CPUs only')
                continue
            if self.case.image:
                self.note(f'{engine}: reads no files; compare the folder of an exported network')
                continue
            try:
                for dtype in ('float32', *(dtype for dtype in self.settings.dtypes if dtype != 'float32')):
                    print_progress(f'  exporting for {engine}')
                    net, image = copy.deepcopy(plain), synthetic.normalized(plain)
                    call = engines.load_engine(net, image, folder, engine, self.case.threads, dtype)
                    outputs = dict(zip(names, infer(call), strict=True))
                    difference = compare_outputs({name: reference[name] for name in names}, outputs)
                    name = engine if dtype == 'float32' else f'{engine}, {dtype}'
                    rows.append(
                        BenchmarkRow(name, functools.partial(infer, call), difference, precision=Precision(dtype))
                    )
            except Exception as error:  # from an exporter or an engine; the other rows are measured nevertheless
                self.note(f'{engine}: {first_line(error)}')
        return rows

    def _artefact_rows(self, synthetic: SyntheticBatch, reference: dict[str, Tensor]) -> list[BenchmarkRow]:
        """Exported networks, each from the image to class map or objects as the other rows."""
        rows = []
        for folder in self.settings.artefacts:
            if self.case.device != 'cpu':
                self.note(f'{folder}: exported networks are compared on CPUs only')
                continue
            try:
                artefact = Artefact(folder, self.case.threads)
                model = build_part(self.cfg, self.cfg.model, True)
                use_artefact(model, artefact)
                call = synthetic.inference_call(model)
                samples: Any = call()
            except UserError as error:  # the other rows are measured nevertheless
                self.note(f'{folder}: {first_line(error)}')
                continue
            manifest, difference = artefact.manifest, None
            precision = {'fp32': 'float32', 'bf16': 'bfloat16'}.get(manifest.precision, manifest.precision)
            if not self._same_weights(manifest):
                other = 'another checkpoint' if self.case.checkpoint else 'a checkpoint: name it with --checkpoint'
                self.note(f'{folder}: exported from {other}; the outputs are not compared')
            elif CLASS_MAP in reference:
                found = {CLASS_MAP: torch.stack([sample.pred_sem_seg.data[0] for sample in samples])}
                difference = compare_outputs({CLASS_MAP: reference[CLASS_MAP]}, found)
            name = f'{Path(folder).name} ({manifest.format}, {manifest.precision})'
            rows.append(BenchmarkRow(name, call, difference, precision=Precision(precision)))
        return rows

    def _same_weights(self, manifest: Manifest) -> bool:
        checkpoint = self.case.checkpoint
        return bool(checkpoint) and manifest.checkpoint['sha256'] == hash_checkpoint(fetch_checkpoint(str(checkpoint)))

    def _memory(self, case: BenchmarkCase, row: BenchmarkRow) -> int | None:
        if not self.settings.memory or not row.network:
            return None
        print_progress(f'  memory of {row.name}')
        keep_freed = self.settings.same_allocator or row.network == OURS
        memory = peak_memory(case, row.network, row.precision, keep_freed)
        if isinstance(memory, str):
            self.note(f'memory of {row.name}: not measured: {memory}')
            return None
        return memory


def _change_allocator(keep_freed: bool, call: Call) -> None:
    keep_freed_memory(keep_freed)
    trim_heap()  # memory that the other networks have freed
    call()  # allocates the memory that the timed call reuses


def benchmark_networks(
    case: BenchmarkCase,
    settings: BenchmarkSettings,
    modes: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
) -> dict:
    """Measure a backbone or a whole model in every mode, shape and batch.

    Args:
        case: The network. Its form applies to inference; training runs in the training form.
        settings: Settings of all measurements.
        modes: Of ``'inference'`` and ``'train'``.
        shapes: Heights and widths in pixels.
        batches: Numbers of images; 0 for the smallest that the mode allows.

    Returns:
        Plain data: the network, notes, and a point for each combination.

    Raises:
        UserError: If an argument does not fit.
    """
    notes = [
        f'weights: {case.checkpoint or "random, including statistics of BatchNorm and layer scales"}',
        "plain torch: the same network and weights in float32, with torch's own depthwise convolutions, torch's "
        "default memory layout, activations not in place and the libraries' own heads",
    ]
    if case.device != 'cpu':
        notes += [f'clock: {f"{WALL_TIME}, up to the result" if case.whole_model else CUDA_EVENTS}', PRECISION_NOTE]
    if case.image:
        notes.append(f'inference: from the file {case.image} to the result, with the test pipeline of the config')
    points = []
    for mode in modes:
        form = case.form if mode == 'inference' else 'training'
        benchmark = NetworkBenchmark(replace(case, mode=mode, form=form), settings)
        points += [benchmark.measure(batch, shape) for shape in shapes for batch in batches]
        notes += [note for note in benchmark.notes if note not in notes]
    backbone = benchmark.cfg.model.backbone
    arch = backbone.get('arch', '')
    return dict(
        what='model' if case.whole_model else 'backbone',
        config=case.config,
        cfg_options=case.options or {},
        checkpoint=case.checkpoint,
        backbone=f'{backbone.type} {arch if isinstance(arch, str) else ""}'.strip(),
        parameters=count_parameters(benchmark.networks[OURS]),
        settings=asdict(settings),
        notes=notes,
        points=points,
    )
