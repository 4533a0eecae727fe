"""Count every published network beside the published figures; writes docs/complexity.md and docs/complexity.json.

Example:
    python scripts/published_complexity.py
    python scripts/published_complexity.py --rows convnext-tiny --out counted
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn as nn
from mmcv.cnn import get_model_complexity_info
from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

import replk_mm.mmcv_ops  # noqa: F401 (before mmseg and mmdet)
from replk_mm import published
from replk_mm.analysis.complexity import (
    _Pass,
    build_on_meta,
    count_inference_parameters,
    count_model,
    forward,
    library_versions,
    on_meta,
)
from replk_mm.backbones import RepLKNet
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError, command
from replk_mm.files import write_atomic
from replk_mm.ops import DepthwiseConv2d
from replk_mm.published import PublishedResult

#: Folder of the configs that follow the published recipes, from the root of the repository.
CONFIGS = 'configs'
COMMAND = 'python scripts/published_complexity.py'
#: Accepted deviations from the published figures, in percent.
TOLERANCES = {'parameters': 2.0, 'macs': 1.0}
#: Countings: the form of the network, the counter, and whether parameters of auxiliary heads are included.
COUNTINGS = {
    'deployed': "torch's counter; kernels merged, BatchNorm folded; parameters without auxiliary heads",
    'training': "torch's counter; as built for training; parameters with auxiliary heads",
    'mmcv_training': "mmcv's counter; as built for training; parameters with auxiliary heads",
    'mmcv_merged': "mmcv's counter; backbone merged and folded, heads as trained; parameters without auxiliary heads",
}
#: The counting that this project reports.
OURS = 'deployed'
#: For each family, the counting that fits the authors' figures best.
AUTHORS = {'RepLKNet': 'mmcv_merged', 'ConvNeXt': 'mmcv_training', 'UniRepLKNet': 'mmcv_merged'}
#: Kernel sizes of the four stages that reproduce the authors' figures, where the released network has others.
AUTHORS_KERNELS = {'RepLKNet-XL': [31, 29, 27, 13]}
#: Unit and decimals of a figure, and its key in ``published`` of a row.
_UNITS = {'parameters': (1e6, 1, 'parameters_m'), 'macs': (1e9, 2, 'macs_g')}
_PAGE = Path(__file__).with_name('complexity.md.j2')


def count_published(pattern: str | None = None, progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Count the published networks at their published sizes, without allocating weights.

    Args:
        pattern: Regular expression to search for in the configs' file names. Defaults to None: all rows.
        progress: Called with one line per row.

    Returns:
        Plain data: ``command``, ``versions``, ``tolerance_percent``, ``countings`` (names and meaning) and ``rows``.
        Each row has ``config``, ``task``, ``backbone``, ``pretraining``, ``dataset``, ``method``, ``input`` (height,
        width), ``published`` (``parameters_m``, ``macs_g``), ``counts`` (by counting: ``parameters``, ``macs``),
        ``authors`` (the authors' counting: ``counting``, ``kernels`` or None, ``parameters``, ``macs``), ``status``
        (see :func:`status_of`), ``parts`` and ``uncounted`` (of the deployed network) and ``notes``.

    Raises:
        UserError: If the pattern is invalid, no row matches, or a config cannot be counted.
    """
    try:
        chosen = [row for row in published.results() if row.config and re.search(pattern or '', row.config)]
    except re.error as error:
        raise UserError(f'--rows {pattern}: not a regular expression: {error}') from error
    if not chosen:
        raise UserError(
            f'--rows {pattern}: matches none of the published configs\n'
            f'They are: {", ".join(row.config for row in published.results() if row.config)}'
        )
    rows = []
    for number, result in enumerate(chosen, 1):
        row = _count_row(result)
        rows.append(row)
        progress(
            f'{number}/{len(chosen)} {row["config"]}: ours {format_count(row["counts"][OURS], row)}; as the authors '
            f'count {format_count(row["authors"], row)}: {row["status"]}'
        )
    return dict(
        command=COMMAND, versions=library_versions(), tolerance_percent=TOLERANCES, countings=COUNTINGS, rows=rows
    )


def mmcv_macs(model: nn.Module, shape: tuple[int, int]) -> int:
    """Multiply-accumulates by ``mmcv.cnn.get_model_complexity_info``, the counter that the papers used.

    It counts by layer class. Besides convolutions and linear layers it counts a bias, a ReLU and pooling once for each
    output element, and BatchNorm, GroupNorm and LayerNorm twice. SyncBN, GELU, layer scales, interpolation, custom norm
    classes and functions count as zero.

    Args:
        model: A segmentor, detector or backbone, on any device; left unchanged.
        shape: Height and width of the image in pixels.
    """
    model = on_meta(model)
    layers: list[Any] = [module for module in model.modules() if type(module) is DepthwiseConv2d]
    for layer in layers:
        layer.__class__ = nn.Conv2d  # the counter knows only the classes of torch and mmcv
    # Under torch's counter our networks run layer by layer, without fused calls.
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False):
        return int(get_model_complexity_info(_Pass(model, forward), (3, *shape), False, False)[0])


def _count_row(result: PublishedResult) -> dict[str, Any]:
    """All countings of one published row."""
    path = str(Path(CONFIGS) / str(result.config))
    cfg = load_config(path)
    model = build_on_meta(cfg)
    forms = count_model(model, path, result.input, 'the published row')
    training, deployed = forms.training, forms.deployed
    counts = dict(
        deployed=dict(parameters=deployed.inference_parameters, macs=deployed.macs),
        training=dict(parameters=training.parameters, macs=training.macs),
        mmcv_training=dict(parameters=training.parameters, macs=mmcv_macs(model, result.input)),
        mmcv_merged=_count_merged_by_mmcv(model, result.input),
    )
    kernels = AUTHORS_KERNELS.get(result.backbone)
    authors = counts[AUTHORS[result.family]]
    if kernels:
        authors = _count_merged_by_mmcv(build_on_meta(_with_kernels(cfg, kernels)), result.input)
    row = dict(
        config=result.config,
        task=result.task,
        backbone=result.backbone,
        pretraining=result.pretraining,
        dataset=result.dataset,
        method=result.method,
        input=list(result.input),
        published=dict(parameters_m=result.params_m, macs_g=result.flops_g),
        counts=counts,
        authors=dict(counting=AUTHORS[result.family], kernels=kernels, **authors),
        parts=[asdict(part) for part in deployed.parts],
        uncounted=[asdict(operator) for operator in deployed.uncounted],
        notes=deployed.notes,
    )
    return {**row, 'status': status_of(row)}


def _count_merged_by_mmcv(model: Any, shape: tuple[int, int]) -> dict[str, int]:
    model = on_meta(model)
    with torch.device('meta'):
        model.backbone = reparameterize(model.backbone)[0]
    return dict(parameters=count_inference_parameters(model), macs=mmcv_macs(model, shape))


def _with_kernels(cfg: Config, kernels: list[int]) -> Config:
    """A copy of a config whose RepLKNet has other kernel sizes."""
    arch = cfg.model.backbone.arch
    settings = RepLKNet.arch_settings[arch] if isinstance(arch, str) else arch
    other = Config(cfg.to_dict(), filename=cfg.filename)
    other.model.backbone.arch = {**settings, 'large_kernel_sizes': kernels}
    return other


def relative_difference(count: dict[str, Any], row: dict[str, Any], what: str) -> float:
    """Difference of a count from the published figure in percent; ``what`` is ``'parameters'`` or ``'macs'``."""
    unit, _, name = _UNITS[what]
    return 100 * (count[what] / (row['published'][name] * unit) - 1)


def equals_rounded(count: dict[str, Any], row: dict[str, Any], what: str) -> bool:
    """Whether a count, rounded to whole millions or billions, equals the published figure."""
    unit, _, name = _UNITS[what]
    return round(count[what] / unit) == row['published'][name]


def status_of(row: dict[str, Any]) -> str:
    """Status of a row.

    ``'within'``: our counting is within :data:`TOLERANCES`. ``'explained'``: only the authors' counting is.
    ``'unexplained'``: neither.
    """
    for status, count in (('within', row['counts'][OURS]), ('explained', row['authors'])):
        if all(abs(relative_difference(count, row, what)) <= limit for what, limit in TOLERANCES.items()):
            return status
    return 'unexplained'


def format_count(count: dict[str, Any], row: dict[str, Any], what: str | None = None) -> str:
    """A figure of a count with its difference from the published one. Defaults to both figures."""
    if what is None:
        return f'{format_count(count, row, "parameters")} M, {format_count(count, row, "macs")} G'
    unit, digits, _ = _UNITS[what]
    return f'{count[what] / unit:.1f} ({relative_difference(count, row, what):+.{digits}f} %)'


def _agreement(record: dict[str, Any], family: str, counting: str, what: str) -> str:
    """The number of a family's rows that a counting reproduces when rounded, and its largest difference in percent."""
    counts = [
        (row['authors'] if counting == 'authors' else row['counts'][counting], row)
        for row in record['rows']
        if row['backbone'].startswith(family)
    ]
    worst = max((relative_difference(count, row, what) for count, row in counts), key=abs)
    return f'{sum(equals_rounded(count, row, what) for count, row in counts)} of {len(counts)}, {worst:+.2f} %'


def render_page(record: dict[str, Any], tables_only: bool = False) -> str:
    """Render docs/complexity.md.

    Args:
        record: From :func:`count_published`.
        tables_only: Whether to render the tables alone, for the terminal.
    """
    rows = record['rows']
    deviation, config = max(
        (sum(operator['elements'] for operator in row['uncounted']) / row['counts'][OURS]['macs'], row['config'])
        for row in rows
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE.read_text(encoding='utf-8')).render(
        record,
        tables_only=tables_only,
        ours=OURS,
        format_count=format_count,
        agreement=_agreement,
        record=record,
        families=[family for family in AUTHORS if any(row['backbone'].startswith(family) for row in rows)],
        authors=AUTHORS,
        authors_kernels=AUTHORS_KERNELS,
        share=100 * deviation,
        largest=config,
        operators=sorted({operator['name'] for row in rows for operator in row['uncounted']}),
        notes=list(dict.fromkeys(note for row in rows for note in row['notes'])),
        missed=[row for row in rows if not all(equals_rounded(row['authors'], row, what) for what in _UNITS)],
    )


@command
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', metavar='REGEX', help='only configs whose name matches; needs --out')
    p.add_argument(
        '--out', type=Path, metavar='DIR', help='folder of complexity.md and complexity.json (default: docs)'
    )
    args = p.parse_args()
    if args.rows and not args.out:
        p.error('--rows needs --out: docs/ has all rows')
    record = count_published(args.rows, lambda line: print(line, file=sys.stderr, flush=True))
    print(render_page(record, tables_only=True), end='')
    out = args.out or Path('docs')
    write_atomic(out / 'complexity.md', render_page(record))
    write_atomic(out / 'complexity.json', json.dumps(record, indent=1, allow_nan=False) + '\n')


if __name__ == '__main__':
    sys.exit(main())
