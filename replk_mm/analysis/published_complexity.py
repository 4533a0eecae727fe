"""Parameters and MACs of every published network, beside the published figures, without allocating weights.

A row with a config is counted as that config builds it. For the others, :data:`BASES` has a config of the method, whose
backbone is exchanged for that of the row.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn as nn
from mmcv.cnn import get_model_complexity_info
from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

from replk_mm import published
from replk_mm.analysis.complexity import (
    ForwardPass,
    build_on_meta,
    count_complexity,
    count_inference_parameters,
    count_model,
    count_parameters,
    forward,
    library_versions,
    on_meta,
    reparameterize_on_meta,
)
from replk_mm.backbones import RepLKNet, list_backbones
from replk_mm.backbones.catalogue import ShapeOfSamples, build_backbone, find_backbone
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError
from replk_mm.files import write_atomic
from replk_mm.ops import DepthwiseConv2d
from replk_mm.published import PublishedResult

COMMAND = 'python tools/complexity.py --published'
#: A config for each method; its backbone is exchanged.
BASES = {
    'UperNet': 'replk_mm::upernet_convnext-tiny_ade20k.py',
    'Semantic FPN': 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    'SegNeXt': 'mmseg::segnext/segnext_{name}_1xb16-adamw-160k_ade20k-512x512.py',
    'FCOS': 'replk_mm::fcos_replk31b_coco.py',
    'RetinaNet': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'Mask R-CNN': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'Cascade Mask R-CNN': 'replk_mm::cascade-mask-rcnn_convnext-tiny_coco.py',
    'classification': 'replk_mm::convnext-tiny_imagenet.py',
    'Cascade Mask R-CNN (plain heads)': 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
}
#: Height and width where the source does not state them: those of most other rows.
USUAL_INPUT = {'segmentation': (512, 2048), 'detection': (800, 1280)}
#: Accepted deviations from the published figures, in percent.
TOLERANCES = {'parameters': 2.0, 'macs': 1.0}
#: Countings: the form of the network, the counter, and whether parameters of auxiliary heads are included.
COUNTINGS = {
    'deployed': "torch's counter; kernels merged, BatchNorm folded; parameters without auxiliary heads",
    'training': "torch's counter; as built for training; parameters with auxiliary heads",
    'mmcv_training': "mmcv's counter; as built for training; parameters with auxiliary heads",
    'mmcv_merged': "mmcv's counter; backbone merged and folded, heads as trained; parameters without auxiliary heads",
    'mmcv_sparse': "mmcv's counter, to which the strips' own operator is unknown; 40 % of the backbone's other weights "
    'are zero; parameters with auxiliary heads',
}
#: The counting that this project reports.
OURS = 'deployed'
#: For each family, the counting that fits the authors' figures best; ``'mmcv_training'`` for the others.
AUTHORS = {'RepLKNet': 'mmcv_merged', 'UniRepLKNet': 'mmcv_merged', 'SLaK': 'mmcv_sparse'}
#: Share of SLaK's weights that is zero.
SPARSITY = 0.4
#: Kernel sizes of the four stages that reproduce the authors' figures, where the released network has others.
AUTHORS_KERNELS = {'RepLKNet-XL': [31, 29, 27, 13]}
#: Unit of a figure, its decimals, and its names in a published row and in the record.
_UNITS = {'parameters': (1e6, 1, 'params_m', 'parameters_m'), 'macs': (1e9, 2, 'flops_g', 'macs_g')}
_HERE = Path(__file__).parent


def count_published(pattern: str | None = None, progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Count the published networks at their published sizes.

    Args:
        pattern: Regular expression to search for in a row's config, or backbone and method. Defaults to None: all rows.
        progress: Called with one line per row.

    Returns:
        Plain data: ``rows`` with the fields of a published row, ``input`` (the usual one if not ``input_stated``),
        ``published`` and ``counts`` (``parameters`` and ``macs`` by counting), ``authors`` (the authors' counting),
        ``status`` (see :func:`status_of`) and ``reason`` (why there are no counts); ``errata``; and what they share.

    Raises:
        UserError: If the pattern is invalid, or no row matches.
    """
    try:
        chosen = [row for row in published.results() if re.search(pattern or '', _describe(row))]
    except re.error as error:
        raise UserError(f'--rows {pattern}: not a regular expression: {error}\nUse a part of a name.') from error
    if not chosen:
        raise UserError(f'--rows {pattern}: matches no published row\nUse a part of a name, such as ConvNeXt-T.')
    rows, operators, notes = [], set[str](), dict[str, None]()
    for number, result in enumerate(chosen, 1):
        size = result.input or USUAL_INPUT[result.task]
        found, reason = _try_to_count(result.backbone, result.method, result.dataset, result.config, size)
        row = dict(
            **{name: getattr(result, name) for name in ('config', 'task', 'backbone', 'pretraining', 'dataset')},
            **{name: getattr(result, name) for name in ('method', 'schedule', 'crop', 'source')},
            input=list(size),
            input_stated=result.input is not None,
            published={key: getattr(result, name) for _, _, name, key in _UNITS.values()},
            **{name: (found or {}).get(name) for name in ('counts', 'authors', 'uncounted')},
            reason=reason,
        )
        row['status'] = status_of(row)
        rows.append(row)
        operators.update(found['operators'] if found else ())
        notes.update(dict.fromkeys(found['notes'] if found else ()))
        figures = f'ours {_format_both(row["counts"][OURS], row)}: {row["status"]}' if found else reason
        progress(f'{number}/{len(chosen)} {_describe(result)}: {figures}')
    return dict(
        command=COMMAND,
        versions=library_versions(),
        tolerance_percent=TOLERANCES,
        countings=COUNTINGS,
        operators=sorted(operators),
        notes=list(notes),
        rows=rows,
        errata=[] if pattern else count_errata(rows),
        roadmap=[] if pattern else count_roadmap(),
    )


def count_roadmap(pattern: str | None = None) -> list[dict[str, Any]]:
    """The steps of the ConvNeXt roadmap as classifiers of 224x224 pixels, beside the printed figures.

    Args:
        pattern: Regular expression to search for in the names of the networks. Defaults to None: all.

    Returns:
        The rows of ``convnext_modernization`` that have a network, with its ``parameters``, its ``macs`` and whether it
        ``agrees``: its MACs round to ``gflops``.
    """
    rows = []
    for row in (row for regime in published.table('convnext_modernization').values() for row in regime):
        if 'arch' in row and re.search(pattern or '', row['arch']):
            with torch.device('meta'):
                model: Any = build_backbone('roadmap-50-resnet', arch=row['arch'], out_indices=(3,))
            size, channels = count_complexity(model, (224, 224)), model.feature_info[-1]['num_chs']
            macs = size.macs + 1000 * channels
            rows.append(
                dict(
                    row,
                    parameters=size.parameters + 1000 * (channels + 1),
                    macs=macs,
                    agrees=abs(macs / 1e9 - row['gflops']) <= 0.005,
                )
            )
    return rows


def format_roadmap(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of :func:`count_roadmap`."""
    lines = [
        '| Step | Network | Top-1, %: published | MACs, G: published | ours | Params, M: ours |',
        f'|{" --- |" * 6}',
    ]
    for row in rows:
        cells = (
            row['step'] + (', tried only' if row.get('kept') is False else ''),
            f'`{row["arch"]}`',
            f'{row["top1"]:.2f}',
            f'{row["gflops"]:.2f}',
            f'{row["macs"] / 1e9:.3f}' + ('' if row['agrees'] else ' ([differs](errata.md))'),
            f'{row["parameters"] / 1e6:.1f}',
        )
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def count_errata(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The errata of ``published.yaml`` with our counts; the networks of ``rows`` are not counted again."""
    known = {(row['backbone'], row['method'], tuple(row['input'])): (row, row['reason']) for row in rows}
    errata = []
    for entry in published.table('errata'):
        networks = []
        for printed in entry.get('printed', ()):
            key = (printed['backbone'], printed['method'], tuple(printed['input']))
            found, reason = known.get(key) or _try_to_count(*key[:2], '', None, key[2])
            figures = {key: printed.get(name) for _, _, name, key in _UNITS.values()}
            names = {name: printed[name] for name in ('backbone', 'method', 'input')}
            counts = ((found or {}).get('counts') or {}).get('training')
            networks.append(dict(**names, **figures, counts=counts, reason=reason))
        source = published.table('sources')[entry['source']]
        errata.append(dict(title=entry['title'], text=entry['text'], source=dict(source), rows=networks))
    return errata


def _describe(result: PublishedResult) -> str:
    return f'{result.config or ""} {result.backbone} {result.method}'.strip()


@lru_cache(maxsize=1)
def _names() -> dict[str | None, str]:
    """Names in the catalogue by the papers' names."""
    return {find_backbone(name)[0].paper_name: name for name in list_backbones()}


@cache
def _try_to_count(
    backbone: str, method: str, dataset: str, config: str | None, size: tuple[int, int]
) -> tuple[dict[str, Any] | None, str | None]:
    """The counts of a network, or the reason why there are none."""
    name = _names().get(backbone)
    if not config and name is None:
        return None, 'no such backbone here'
    if not config and method not in BASES:
        return None, 'no such method here'
    options: dict[str, Any] = {'model.decode_head.num_classes': 19} if dataset == 'Cityscapes' and not config else {}
    if method == 'SegNeXt' and name in ('mscan-b', 'mscan-l'):  # mmseg's configs keep the rank of T, 16
        options['model.decode_head.ham_kwargs.MD_R'] = 64
    path = f'replk_mm::{config}' if config else BASES[method].format(name=name)
    try:
        cfg = load_config(path, options if config else {**options, 'backbone': name}, needs=('model',))
        return _count_network(cfg, path, backbone, method, size), None
    except UserError as error:
        return None, str(error).splitlines()[0]


def _count_network(cfg: Config, path: str, backbone: str, method: str, size: tuple[int, int]) -> dict[str, Any]:
    model = build_on_meta(cfg)
    forms = count_model(model, path, size, 'the published row')
    training, deployed = forms.training, forms.deployed
    family, kernels = backbone.split('-')[0], AUTHORS_KERNELS.get(backbone)
    counting = AUTHORS.get(family, 'mmcv_training')
    if (family, method) == ('RepLKNet', 'classification'):  # as ours: the released network, merged, by torch's counter
        counting, kernels = 'deployed', None
    counts = dict(
        deployed=dict(parameters=deployed.inference_parameters, macs=deployed.macs),
        training=dict(parameters=training.parameters, macs=training.macs),
    )
    authors = counts['deployed'] if counting == 'deployed' else _count_as_authors(model, counting, size)
    if kernels:
        counts['released'] = authors
        arch = {**RepLKNet.arch_settings[cfg.model.backbone.arch], 'large_kernel_sizes': kernels}
        cfg.model.backbone.arch = arch
        authors = _count_as_authors(build_on_meta(cfg), counting, size)
    return dict(
        counts=counts,
        authors=dict(counting=counting, kernels=kernels, **authors),
        uncounted=sum(operator.elements for operator in deployed.uncounted),
        operators=[operator.name for operator in deployed.uncounted],
        notes=deployed.notes,
    )


def _count_as_authors(model: Any, counting: str, size: tuple[int, int]) -> dict[str, int]:
    if counting == 'mmcv_merged':
        model = on_meta(model)
        model.backbone = reparameterize_on_meta(model.backbone)[0]
        return dict(parameters=count_inference_parameters(model), macs=mmcv_macs(model, size))
    parameters = count_parameters(model)
    if counting == 'mmcv_training':
        return dict(parameters=parameters, macs=mmcv_macs(model, size))
    strips = sum(
        p.numel() for module in model.backbone.modules() if type(module) is DepthwiseConv2d for p in module.parameters()
    )
    zero = SPARSITY * (count_parameters(model.backbone) - strips)
    unused = SPARSITY * mmcv_macs(model.backbone, size, depthwise=False)
    return dict(parameters=int(parameters - zero), macs=int(mmcv_macs(model, size, depthwise=False) - unused))


def mmcv_macs(model: nn.Module, shape: tuple[int, int], depthwise: bool = True) -> int:
    """Multiply-accumulates by ``mmcv.cnn.get_model_complexity_info``, the counter that the papers used.

    It counts by layer class. Besides convolutions and linear layers it counts a bias, a ReLU and pooling once for each
    output element, and BatchNorm, GroupNorm and LayerNorm twice. SyncBN, GELU, layer scales, interpolation, custom norm
    classes and functions count as zero.

    Args:
        model: A segmentor, detector or backbone, on any device; left unchanged.
        shape: Height and width of the image in pixels.
        depthwise: Whether our depthwise convolutions count. Defaults to True.
    """
    model = on_meta(model)
    layers: list[Any] = [module for module in model.modules() if type(module) is DepthwiseConv2d]
    for layer in layers if depthwise else []:
        layer.__class__ = nn.Conv2d  # the counter knows only the classes of torch and mmcv
    # Under torch's counter our networks run layer by layer, without fused calls.
    with torch.device('meta'), torch.no_grad(), ShapeOfSamples(), FlopCounterMode(display=False):
        return int(get_model_complexity_info(ForwardPass(model, forward), (3, *shape), False, False)[0])


def relative_difference(count: Mapping[str, Any], row: Mapping[str, Any], what: str) -> float | None:
    """Difference of a count from a row's published figure in percent; None if nothing is published."""
    unit, _, _, key = _UNITS[what]
    stated = row['published'][key]
    return None if stated is None else 100 * (count[what] / (stated * unit) - 1)


def equals_rounded(count: Mapping[str, Any], row: Mapping[str, Any], what: str) -> bool:
    """Whether a count equals the published figure in all its digits, or nothing is published."""
    unit, _, _, key = _UNITS[what]
    stated = row['published'][key]
    return stated is None or round(count[what] / unit, len(f'{stated:g}'.partition('.')[2])) == stated


def status_of(row: Mapping[str, Any]) -> str:
    """Status of a row.

    ``'within'``: our counting is within :data:`TOLERANCES`, or equal when rounded. ``'explained'``: only the authors'
    counting is. ``'erratum'``: neither, and the errata have the row. ``'unexplained'``: neither. ``'not stated'``:
    nothing is published. ``'not counted'``: there is no such network.
    """
    if not row['counts']:
        return 'not counted'
    if not any(row['published'].values()):
        return 'not stated'
    for status, count in (('within', row['counts'][OURS]), ('explained', row['authors'])):
        if all(
            equals_rounded(count, row, what) or abs(relative_difference(count, row, what) or 0) <= limit
            for what, limit in TOLERANCES.items()
        ):
            return status
    known = {(p['backbone'], p['method']) for entry in published.table('errata') for p in entry.get('printed', ())}
    return 'erratum' if (row['backbone'], row['method']) in known else 'unexplained'


def format_count(count: Mapping[str, Any], row: Mapping[str, Any], what: str) -> str:
    """A figure of a count with its difference from the published one."""
    unit, digits, _, _ = _UNITS[what]
    difference = relative_difference(count, row, what)
    return f'{count[what] / unit:.1f}' + ('' if difference is None else f' ({difference:+.{digits}f} %)')


def _format_both(count: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return f'{format_count(count, row, "parameters")} M, {format_count(count, row, "macs")} G'


def _agreement(rows: list[dict[str, Any]], counting: str, what: str) -> str:
    """The number of rows that a counting reproduces in all digits, and its largest difference in percent."""
    counts = [(row['authors'] if counting == 'authors' else row['counts'][counting], row) for row in rows]
    counts = [(count, row) for count, row in counts if relative_difference(count, row, what) is not None]
    if not counts:
        return '–'
    worst = max((relative_difference(count, row, what) or 0.0 for count, row in counts), key=abs)
    return f'{sum(equals_rounded(count, row, what) for count, row in counts)} of {len(counts)}, {worst:+.2f} %'


def render_page(record: Mapping[str, Any], page: str = 'complexity', tables_only: bool = False) -> str:
    """Render docs/complexity.md or docs/errata.md.

    Args:
        record: From :func:`count_published`.
        page: ``'complexity'`` or ``'errata'``.
        tables_only: Whether to render the tables alone, for the terminal.
    """
    counted = [row for row in record['rows'] if row['counts']]
    families: dict[str, list[dict]] = {}
    for row in counted:
        families.setdefault(row['backbone'].split('-')[0], []).append(row)
    shares = [(row['uncounted'] / row['counts'][OURS]['macs'], row) for row in counted]
    share, largest = max(shares, key=lambda item: item[0], default=(0.0, {}))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((_HERE / f'{page}.md.j2').read_text(encoding='utf-8')).render(
        record,
        counted=counted,
        tables_only=tables_only,
        ours=OURS,
        format_count=format_count,
        format_roadmap=format_roadmap,
        agreement=_agreement,
        families=families,
        authors_of={family: rows[0]['authors']['counting'] for family, rows in families.items()},
        share=100 * share,
        largest=largest,
        missed=[row for row in counted if not all(equals_rounded(row['authors'], row, what) for what in _UNITS)],
    )


def write_pages(record: Mapping[str, Any], folder: Path) -> None:
    """Write complexity.md, complexity.json and errata.md."""
    write_atomic(folder / 'complexity.md', render_page(record))
    write_atomic(folder / 'complexity.json', json.dumps(record, indent=1, allow_nan=False) + '\n')
    if record['errata']:
        write_atomic(folder / 'errata.md', render_page(record, 'errata'))
