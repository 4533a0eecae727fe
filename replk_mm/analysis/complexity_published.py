"""Every published result counted at its published size, beside the published figure."""
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from replk_mm.analysis import complexity, complexity_mmcv
from replk_mm.analysis.complexity_config import build, counted, merge, versions
from replk_mm.bench import published
from replk_mm.bench.published import Result
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError
from replk_mm.models import RepLKNet
from replk_mm.reparam import reparameterize

#: Folder of the configs that follow the published recipes, from the root of the repository.
CONFIGS = 'configs'
COMMAND = 'python tools/complexity.py --published'
#: What a figure may be off by, in percent.
TOLERANCES = {'parameters': 2., 'macs': 1.}
#: Ways to count: of which form of the network, by which counter, with the auxiliary heads' parameters or without.
COUNTINGS = {
    'deployed': "torch's counter; kernels merged, BatchNorm folded; parameters without auxiliary heads",
    'training': "torch's counter; as built for training; parameters with auxiliary heads",
    'mmcv_training': "mmcv's counter; as built for training; parameters with auxiliary heads",
    'mmcv_merged': "mmcv's counter; backbone merged and folded, heads as trained; parameters without auxiliary heads",
}
#: What we report for every network.
OURS = 'deployed'
#: The way of :data:`COUNTINGS` that fits the figures of each family's authors best.
AUTHORS = {'RepLKNet': 'mmcv_merged', 'ConvNeXt': 'mmcv_training'}
#: Kernels of the four stages with which the authors' figures come out where the network they released has others.
AUTHORS_KERNELS = {'RepLKNet-XL': [31, 29, 27, 13]}


def run(pattern: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Count the published rows without allocating weights.

    Args:
        pattern: Regular expression that the names of the configs must match somewhere. Defaults to None: all rows.
        say: Takes a line of progress for each row.

    Returns:
        Plain data: ``command``, ``versions``, ``tolerance_percent``, ``countings`` (names and meaning) and ``rows``, each
        with ``config``, ``task``, ``backbone``, ``pretraining``, ``dataset``, ``method``, ``input`` (height, width),
        ``published`` (``parameters_m``, ``macs_g``), ``counts`` (by counting: ``parameters``, ``macs``), ``authors`` (the
        counting of its authors: ``counting``, ``kernels`` or None, ``parameters``, ``macs``), ``status`` (see
        :func:`status_of`), ``parts`` and ``uncounted`` (of the deployed network) and ``notes``.

    Raises:
        UserError: If the pattern is none, or no row matches, or a config cannot be counted.
    """
    try:
        chosen = [row for row in published.results() if row.config and re.search(pattern or '', row.config)]
    except re.error as error:
        raise UserError(f'--rows {pattern}: is no regular expression: {error}') from error
    if not chosen:
        raise UserError(f'--rows {pattern}: matches none of the published configs\n'
                        f'They are: {", ".join(str(row.config) for row in published.results())}')
    rows = []
    for number, result in enumerate(chosen, 1):
        rows.append(count_row(result))
        say(f'{number}/{len(chosen)} {summary(rows[-1])}')
    return dict(command=COMMAND, versions=versions(), tolerance_percent=TOLERANCES, countings=COUNTINGS, rows=rows)


def count_row(result: Result) -> dict[str, Any]:
    """All countings of one published row; see :func:`run`."""
    path = str(Path(CONFIGS) / str(result.config))
    cfg = load_config(path)
    model = build(cfg)
    training = counted(model, result.input, path)
    deployed = counted(merge(model)[0], result.input, path)
    counts = dict(
        deployed=dict(parameters=deployed.inference_parameters, macs=deployed.macs),
        training=dict(parameters=training.parameters, macs=training.macs),
        mmcv_training=dict(parameters=training.parameters, macs=complexity_mmcv.macs(model, result.input)),
        mmcv_merged=_mmcv_merged(model, result))
    kernels = AUTHORS_KERNELS.get(result.backbone)
    authors = (counts[AUTHORS[result.family]] if kernels is None else
               _mmcv_merged(build(_with_kernels(cfg, kernels)), result))
    row = dict(
        config=result.config, task=result.task, backbone=result.backbone, pretraining=result.pretraining,
        dataset=result.dataset, method=result.method, input=list(result.input),
        published=dict(parameters_m=result.params_m, macs_g=result.flops_g), counts=counts,
        authors=dict(counting=AUTHORS[result.family], kernels=kernels, **authors),
        parts=[asdict(part) for part in deployed.parts], uncounted=[asdict(operator) for operator in deployed.uncounted],
        notes=deployed.notes)
    return {**row, 'status': status_of(row)}


def _mmcv_merged(model: Any, result: Result) -> dict[str, int]:
    model = complexity.on_meta(model)
    with torch.device('meta'):
        model.backbone = reparameterize(model.backbone)[0]
    return dict(parameters=complexity.inference_parameters(model), macs=complexity_mmcv.macs(model, result.input))


def _with_kernels(cfg: Config, kernels: list[int]) -> Config:
    arch = cfg.model.backbone.arch
    settings = RepLKNet.arch_settings[arch] if isinstance(arch, str) else arch
    other = Config(cfg.to_dict(), filename=cfg.filename)
    other.model.backbone.arch = {**settings, 'large_kernel_sizes': kernels}
    return other


def difference(count: dict[str, Any], row: dict[str, Any], what: str) -> float:
    """By how many percent a count of ``'parameters'`` or ``'macs'`` is above the published figure."""
    stated = row['published']['parameters_m'] * 1e6 if what == 'parameters' else row['published']['macs_g'] * 1e9
    return 100 * (count[what] / stated - 1)


def rounds(count: dict[str, Any], row: dict[str, Any], what: str) -> bool:
    """Whether a count gives the published figure, which is a whole number of millions or billions, when rounded."""
    unit, stated = (1e6, 'parameters_m') if what == 'parameters' else (1e9, 'macs_g')
    return round(count[what] / unit) == row['published'][stated]


def fits(count: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether parameters and multiply-accumulates are within :data:`TOLERANCES` of the published ones."""
    return all(abs(difference(count, row, what)) <= limit for what, limit in TOLERANCES.items())


def status_of(row: dict[str, Any]) -> str:
    """``'within'`` the tolerances as we count, ``'explained'``: within as the authors count, or ``'unexplained'``."""
    return 'within' if fits(row['counts'][OURS], row) else 'explained' if fits(row['authors'], row) else 'unexplained'


def summary(row: dict[str, Any]) -> str:
    """A row in one line."""
    ours, authors = row['counts'][OURS], row['authors']
    return (f'{row["config"]}: {ours["parameters"] / 1e6:.1f} M ({difference(ours, row, "parameters"):+.1f} %), '
            f'{ours["macs"] / 1e9:.1f} G ({difference(ours, row, "macs"):+.2f} %); as the authors count '
            f'{authors["parameters"] / 1e6:.1f} M, {authors["macs"] / 1e9:.1f} G '
            f'({difference(authors, row, "macs"):+.2f} %): {row["status"]}')
