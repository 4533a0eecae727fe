"""Plan the suite of the command ``choose``: the data set, backbones with weights, and what the budget allows."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import yaml

from replk_mm.analysis.benchmark.case import set_input_size
from replk_mm.analysis.benchmark.synthetic_batch import SyntheticBatch
from replk_mm.analysis.timing import matmul_gflops, time_interleaved
from replk_mm.backbones.adapters import require
from replk_mm.backbones.catalogue import build_backbone, find_backbone, is_permissive, licence_of, list_backbones
from replk_mm.bench import records
from replk_mm.bench.report.field import FieldRow
from replk_mm.bench.schema import Suite, SuiteRow, read_suite
from replk_mm.checkpoints.io import DownloadError, download_path, fetch_checkpoint
from replk_mm.data.checks.audit import SPLITS, audit
from replk_mm.data.classes import set_classes, use_classes
from replk_mm.data.findings import raise_for_errors, summarize
from replk_mm.deploy.artefact import read_manifest
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.config import build_model, fit_to_machine, load_config, set_data_root
from replk_mm.errors import UserError, format_list
from replk_mm.files import write_atomic
from replk_mm.ops import prepack

#: A spread of the catalogue by size, from 3 to 78 million parameters; the extra ``weights`` has the first three.
BACKBONES = (
    *('efficientnet-lite0.in1k', 'efficientnet-lite1.in1k', 'efficientnet-lite2.in1k', 'moganet-xtiny.in1k'),
    *('moganet-tiny.in1k', 'convnext-tiny.in1k', 'unireplknet-t.in1k', 'unireplknet-s.in1k', 'replknet-31b.in1k'),
)
_SWIN = 'mmsegmentation/v0.5/pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth'
#: Well-known networks beside them, with the address of their ImageNet-1K weights.
CONTROLS = {
    'resnet-50': ('mmseg.ResNet(depth=50)', 'https://download.pytorch.org/models/resnet50-0676ba61.pth'),
    'swin-tiny': ('mmseg.SwinTransformer', f'https://download.openmmlab.com/{_SWIN}'),
}
#: Learning rates that fine-tuning tries.
RATES = (2e-4, 1e-3)
#: Fewest iterations of a training that is worth its time.
_LEAST = 100
#: Pixels of a training step with the configs of :data:`LAYOUTS`; a step takes three forward passes.
_STEP_PIXELS = 4 * 256**2
#: Smallest and largest short side of test images by default, for which these configs are made.
_SIDES = 256, 512
#: Of the published results that are compared: method, data set, pretraining, schedule and crop; and their metric.
_PRIOR: dict[str, tuple[tuple, str, str]] = {
    'segmentation': (('UperNet', 'ADE20K', 'ImageNet-1K', '160k iterations', 512), 'miou_ss', 'single-scale mIoU'),
    'detection': (('Cascade Mask R-CNN', 'COCO', 'ImageNet-1K', '36 epochs', None), 'ap_box', 'box AP'),
}

#: As in a suite file.
Row = dict[str, Any]


class Layout(NamedTuple):
    """A layout of a data set on disk: where its labels are, a small config, and one for a full training on a GPU."""

    task: str
    labels: str
    config: str
    full: str


LAYOUTS = (
    Layout('segmentation', 'annotations/training', 'upernet_replk-nano_ade20k.py', 'upernet_convnext-tiny_ade20k.py'),
    Layout('segmentation', 'gtFine/train', 'upernet_replk-nano_cityscapes.py', 'upernet_convnext-base_cityscapes.py'),
    Layout(
        'detection',
        'annotations/instances_train2017.json',
        *(f'cascade-mask-rcnn_{name}_coco.py' for name in ('replk-nano', 'convnext-tiny')),
    ),
)


class Data(NamedTuple):
    """A checked data set."""

    root: Path
    layout: Layout
    classes: str | list[str]  #: for suites and ``--classes``
    names: list[str]  #: of the classes
    shape: tuple[int, int]  #: height and width of test images, at which costs are measured too, pixels
    train: int  #: number of training images
    test: int  #: number of test images
    schedule: int  #: iterations of a whole training with the small config
    notes: list[str]  #: what the check found


def read_data(root: Path, task: str | None = None, classes: str = 'auto') -> Data:
    """Find the layout of a data set, check every file, and take the classes and the size of the images.

    Without a file that names the classes, ``'auto'`` takes those that occur.

    Raises:
        UserError: If there is no such folder, the layout is unknown, or the check finds errors.
    """
    if not root.is_dir():
        raise UserError(f'--data-root {root}: no such folder')
    known = [layout for layout in LAYOUTS if task in (None, layout.task)]
    layouts = [layout for layout in known if Path(root, layout.labels).exists()]
    if len(layouts) != 1:
        what = 'labels of several layouts' if layouts else 'no labels'
        others = dict.fromkeys(layout.task for layout in LAYOUTS if Path(root, layout.labels).exists())
        advice = 'docs/data.md describes the folders.' if not others else f'Choose --task {" or ".join(others)}.'
        raise UserError(f'{root}: {what} ({", ".join(layout.labels for layout in known)})\n{advice}')
    cfg = load_config(f'replk_mm::{layouts[0].config}')
    set_data_root(cfg, str(root))
    given: str | list[str] = classes
    skipped, notes = '', []
    try:
        notes = use_classes(cfg, classes, SPLITS)
    except UserError:
        if classes != 'auto' or layouts[0].task == 'detection':
            raise
        given, skipped = [], 'class-absent'  # of the 150 or 19 classes of the layout
    checked = audit(cfg, full=True)
    findings = [finding for _, finding in checked.findings() if finding.code != skipped]
    raise_for_errors(findings)
    train, *_, test = checked.datasets
    counts = [report.class_counts() for report in (train, test)]
    names = list(counts[0])
    if not given:
        given = names = [name for name in names if any(count.get(name) for count in counts)]
        notes = [f'classes: {root} has no classes.txt: {len(names)} of {train.type} occur: {format_list(names, 20)}']
    size = test.sizes.most_common(1)[0][0]
    scale = min(max(min(size), _SIDES[0]), _SIDES[1]) / min(size)
    shape, images = (round(size[1] * scale), round(size[0] * scale)), (len(train.samples), len(test.samples))
    notes = [*map(str, checked.datasets), *notes, *summarize(findings)]
    return Data(root.resolve(), layouts[0], given, names, shape, *images, cfg.train_cfg.max_iters, notes)


def slug(name: str) -> str:
    """A name for files."""
    return ''.join(c if c.isalnum() or c in '._-' else '-' for c in name.lower()).strip('._-')


def find_weights(
    names: Sequence[str], licence: str | None = None, scratch: bool = False
) -> tuple[list[Row], dict[str, str]]:
    """Rows of a suite for backbones whose weights are here or can be downloaded, and how to get those of the others.

    Args:
        names: In the catalogue, or keys of :data:`CONTROLS`.
        licence: ``'permissive'`` leaves out weights that are known to forbid commercial use.
        scratch: Whether random weights will do.
    """
    rows, missing, unreachable = list[Row](), dict[str, str](), set()  # each host is asked once
    for name in names:
        backbone, address = CONTROLS.get(name, (name, None))
        entry, weights = find_backbone(backbone)
        row: Row = dict(name=name, label=name, backbone=backbone)
        try:
            if address is None:
                weights = weights if scratch else weights or entry.require_weights()
                full = entry.name if scratch else entry.full_name(weights)
                row, address = dict(name=slug(full), label=full, backbone=full), weights.url if weights else None
                if licence and not is_permissive(entry, weights):
                    raise UserError(f'the licence is {licence_of(entry, weights)}')
            host = urlsplit(address or '').hostname
            if host and host in unreachable:
                raise DownloadError()
            if address is None and not scratch:
                build_backbone(backbone, pretrained=True)  # by timm or transformers
            elif not scratch and (file := fetch_checkpoint(str(address))) and name in CONTROLS:
                row.update(pretrained=str(file), pretraining='ImageNet-1K')
            if entry.package:
                require(entry.package, name)
            rows.append(row)
        except DownloadError:
            missing[name] = f'{address}\n    as {download_path(str(address))}' if host else 'a network connection'
            unreachable.add(host)
        except UserError as error:
            missing[name] = str(error).splitlines()[-1]
    return rows, missing


def suite_content(data: Data, protocol: str, rows: Sequence[Mapping[str, Any]], **keys: Any) -> dict[str, Any]:
    """The content of a suite file: rows of one protocol, with further defaults such as ``seeds``."""
    scale = max(data.shape), min(data.shape)
    options = {f'{split}_dataloader.dataset.pipeline.1.scale': list(scale) for split in ('val', 'test')}
    common = dict(config=f'replk_mm::{data.layout.config}', classes=data.classes, protocol=protocol, recipe='common')
    defaults = {**common, 'shape': list(data.shape), 'options': options, 'preflight': False, **keys}
    question, root = f'Which backbone for {data.root.name}?', dict(root=str(data.root))
    return dict(name='choose', question=question, data=root, defaults=defaults, rows=list(rows))


def write_suite(path: Path, content: Mapping[str, Any]) -> Suite:
    """Write a suite file, and read it back."""
    text = yaml.safe_dump(dict(content), sort_keys=False, width=120, default_flow_style=None)
    write_atomic(path, f'# Written by the command choose; its --resume reads what you change, such as seeds.\n{text}')
    return read_suite(path)


def artefact_rows(suite: Suite, work_dir: Path, folders: Sequence[Path]) -> list[Row]:
    """Rows of a suite for networks exported from its checkpoints; rows that it has already are left out.

    Raises:
        UserError: If a folder holds no exported network, or one of another checkpoint.
    """
    known = {
        record['checkpoint']['sha256']: record
        for record in records.read_records([work_dir])[0]
        if record['measurement'] == 'metric' and record['status'] == 'done' and record['checkpoint']
    }
    rows = []
    for folder in folders:
        manifest = read_manifest(folder)
        source = known.get(manifest.checkpoint['sha256'])
        if source is None:
            raise UserError(
                f'--artefacts {folder}: was not exported from a checkpoint of {work_dir}\n'
                f'Export one of those in {work_dir}/runs, with the config.py beside its folder.'
            )
        run = work_dir / 'runs' / source['row'] / str(source['seed'])
        kind, label = f'{manifest.format}-{manifest.precision}', source['label'] or source['row']
        name = f'{source["row"]}-{slug(folder.resolve().name)}-{kind}'
        rows.append(
            dict(
                name=name,
                label=f'{label}, {manifest.format} {manifest.precision}',
                config=str(run / 'config.py'),
                protocol='finetune',
                checkpoint=str(folder),
                seeds=[source['seed']],
                measure=['metric', 'complexity', 'speed'],
                published=False,
            )
        )
    return [row for row in rows if row['name'] not in {known.name for known in suite.rows}]


class RowCost(NamedTuple):
    """Seconds that a row of a suite takes: once, for each seed, and for each iteration of training."""

    name: str
    once: float
    each_seed: float
    iteration: float

    def seconds(self, seeds: int, iterations: int) -> float:
        """Of the whole row."""
        return self.once + seeds * (self.each_seed + iterations * self.iteration)


def row_cost(name: str, protocol: str, image: float, data: Data, start_up: float, fit: float = 0.0) -> RowCost:
    """Estimate a row from the seconds of inference of an image, of the imports of a process, and to fit a probe."""
    costs = min(200 * image, 15.0) + 2 * start_up  # speed, in two forms; memory, in its own process
    each = 4 * start_up  # imports, and as long again to build networks and to open the data for training and test
    if protocol == 'linear':
        return RowCost(name, data.train * image + costs, each + fit + data.test * image, 0.0)
    trainings = 1 + (len(RATES) if protocol == 'finetune' else 0)
    step = 3 * image * _STEP_PIXELS / math.prod(data.shape)
    return RowCost(name, costs + 2 * start_up, each + (2 + trainings) * data.test * image, trainings * step)


class Plan(NamedTuple):
    """Rows to run, seeds of each, iterations of each training (0 for linear probes), and the estimated seconds."""

    rows: list[str]
    seeds: int
    iterations: int
    seconds: float


def fit_budget(costs: Sequence[RowCost], budget: float, keep: Sequence[str] = (), most: int = 0) -> Plan:
    """Choose rows, seeds and iterations that fit a budget.

    All rows with three seeds come first, then two seeds, since one decides nothing. Then the slowest row is left out,
    and so on, down to two rows, which are planned even if they take longer.

    Args:
        costs: Of the rows.
        budget: In seconds.
        keep: Names of controls, which are left out once two other rows remain.
        most: Iterations of the whole schedule; 0 without iterations.
    """
    least = min(most, _LEAST)
    left = list(costs)
    while True:
        for seeds in (3, 2):
            free = budget - sum(cost.seconds(seeds, 0) for cost in left)
            rate = seeds * sum(cost.iteration for cost in left)
            iterations = min(most, int(free / rate)) if rate else 0
            fits = free >= 0 and iterations >= least
            if fits or seeds == 2 and len(left) == 2:
                iterations = max(iterations, least)
                seconds = sum(cost.seconds(seeds, iterations) for cost in left)
                return Plan([cost.name for cost in costs if cost in left], seeds, iterations, seconds)
        controls = [cost for cost in left if cost.name in keep]
        others = [cost for cost in left if cost.name not in keep]
        left.remove(max(others if len(others) > 2 else controls or others, key=lambda cost: cost.seconds(2, least)))


def time_row(row: SuiteRow, data: Data, device: str) -> tuple[float, int, float]:
    """Seconds of inference of an image, parameters as deployed, and seconds to fit a linear probe; random weights."""
    from replk_mm.engine.probe import ProbeSettings, use_linear_head  # imports mmseg

    cfg = load_config(row.config, row.options)
    set_classes(cfg, data.names, are_ids=data.classes == 'auto')
    if linear := row.protocol == 'linear':
        use_linear_head(cfg)
    fit_to_machine(cfg, None, device, 1)
    for key in ('init_cfg', 'pretrained'):  # the latter of timm and transformers
        cfg.model.backbone.pop(key, None)
    net: Any = reparameterize(build_model(cfg).to(device).eval(), inplace=True)[0]
    prepack(net)
    set_input_size([net], data.shape)
    call = SyntheticBatch(cfg, net, 1, data.shape, device).inference_call(net)
    timed = time_interleaved({'': call}, repeats=10, warmup=1, seconds=10.0, device=device)
    image = min(timed.milliseconds['']) / 1e3  # other programs only add to it
    fit = 0.0
    if linear:  # forward and backward products of each cell of stride 16, at a third of the machine's peak
        settings, cells = ProbeSettings(), data.train * math.prod(data.shape) / 16**2
        passes = settings.epochs * (1 + 0.8 * len(settings.learning_rates))
        work = 6 * net.decode_head.channels * len(data.names) * cells * passes
        fit = 3 * work / (1e9 * matmul_gflops(torch.float32, device))
    return image, sum(p.numel() for p in net.parameters()), fit


def published_rows(data: Data, device: str, budget: float, licence: str | None = None) -> list[FieldRow]:
    """Published results of the catalogue under one protocol, with the latency of each backbone on this machine.

    The smallest come first; after ``budget`` seconds, no further one is timed.
    """
    common, metric, _ = _PRIOR[data.layout.task]
    found = [
        (entry, weights, result)
        for entry in (find_backbone(name)[0] for name in list_backbones())
        for weights in entry.weights
        for result in entry.published(data.layout.task, weights)
        if (result.method, result.dataset, result.pretraining, result.schedule, result.crop) == common
        and metric in result.metrics
        and (not licence or is_permissive(entry, weights))
    ]
    begin, rows = time.monotonic(), list[FieldRow]()
    for entry, weights, result in sorted(found, key=lambda item: item[2].params_m or math.inf):
        if rows and time.monotonic() - begin > budget:
            break
        net: Any = reparameterize(build_backbone(entry.name).to(device).eval(), inplace=True)[0]
        prepack(net)
        image = torch.randn(1, 3, *data.shape, device=device)
        with torch.no_grad():
            timed = time_interleaved({'': partial(net, image)}, 10, 1, 4.0, device=device).summary('').median
        size, free = sum(p.numel() for p in net.parameters()) / 1e6, is_permissive(entry, weights)
        rows.append(FieldRow(len(rows), result, data.shape, None, size, timed, licence_of(entry, weights), free))
    return rows


def prior_answer(task: str, rows: Sequence[FieldRow], conditions: str) -> list[str]:
    """What published results say, with latencies measured here under ``conditions``: sentences for a reader."""
    (method, dataset, pretraining, *_), metric, title = _PRIOR[task]

    def shown(row: FieldRow) -> str:
        return f'{row.result.backbone} ({row.result.metrics[metric]:.1f}, {row.milliseconds:.0f} ms)'

    front: list[FieldRow] = []
    for row in sorted(rows, key=lambda row: (-row.result.metrics[metric], row.milliseconds)):
        if not front or (row.milliseconds or 0) < (front[-1].milliseconds or 0):
            front.append(row)
    return [
        'Not decided on your images: fewer than two backbones have pretrained weights here, and random weights cannot '
        'rank backbones by probing.',
        f'Prior evidence on other data ({title} of {method} on {dataset}, pretraining {pretraining}, published): '
        + (f'{shown(front[0])} is the best of {len(rows)} timed here.' if front else 'none within your limits.'),
        *([f'Faster, with lower scores: {"; ".join(map(shown, front[1:]))}.'] if front[1:] else []),
        f'Scores are of one training each, without intervals. Times are of the backbone alone, {conditions}.',
        'To decide on your images, get two or more of the weights and run the command again.',
    ]
