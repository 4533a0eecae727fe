"""Every published result counted at its published size beside the published figure, and the page docs/complexity.md."""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn as nn
from mmengine.config import Config

from replk_mm import published
from replk_mm.analysis import complexity
from replk_mm.analysis.complexity import INFERENCE, NEVER, TRAINING, Count, Operator, count
from replk_mm.backbones import RepLKNet
from replk_mm.data.datasets import crop_of
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError, explained
from replk_mm.published import Result
from replk_mm.text import text_table

#: Libraries whose versions a count may depend on.
_LIBRARIES = ('torch', 'mmengine', 'mmcv', 'mmsegmentation', 'mmdet')
#: Operators that are described in full.
_SHOWN = 6


@dataclass(frozen=True)
class Report:
    """What a config's network costs."""

    config: str  #: name of the config, as given
    shape: tuple[int, int]  #: height and width of the image in pixels
    shape_from: str  #: where that size comes from
    training: Count  #: the network as the config builds it
    deployed: Count  #: the same with parallel kernels merged and BatchNorm folded
    changes: str  #: what was merged and folded

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``tools/complexity.py --help`` describes the fields."""
        return dict(
            config=self.config,
            shape=list(self.shape),
            shape_from=self.shape_from,
            training=_plain(self.training),
            reparameterized=_plain(self.deployed),
            changes=self.changes,
            notes=self.training.notes,
            versions=versions(),
        )


def report(config: str, shape: tuple[int, int] | None = None, options: dict | None = None) -> Report:
    """Count the network of a config in both forms; no weights are allocated.

    Args:
        config: A file, or ``PACKAGE::NAME.py``; only its model is needed.
        shape: Height and width in pixels. Defaults to the size of the published figure, or else to the config's crop.
        options: Overrides of fields.

    Raises:
        UserError: If the config cannot be read or built, has no size, or its network cannot take the size.
    """
    cfg = load_config(config, options, needs=('model',))
    size, source = (shape, 'given') if shape else default_shape(cfg, config)
    return count_forms(cfg, config, size, source)[0]


def count_forms(cfg: Config, config: str, shape: tuple[int, int], shape_from: str) -> tuple[Report, nn.Module]:
    """The report of a config at a size, and its network in the training form, without weights.

    Raises:
        UserError: If the network cannot be built, cannot take the size, or cannot run without values.
    """
    model = build(cfg)
    merged, changes = merge(model)
    with (
        warnings.catch_warnings(),
        explained(
            f'{config}: {type(model).__name__} cannot be counted at 1x3x{shape[0]}x{shape[1]}',
            'Try another --shape; networks whose control flow depends on values cannot be counted.',
        ),
    ):
        warnings.simplefilter('ignore')
        return Report(config, shape, shape_from, count(model, shape), count(merged, shape), str(changes)), model


def build(cfg: Config) -> Any:
    """The config's model without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the libraries' remarks are about training
        return build_model(cfg, 'meta')


def merge(model: nn.Module) -> tuple[nn.Module, Any]:
    """A reparameterized copy of a network without weights, and the list of changes."""
    with torch.device('meta'):
        return reparameterize(model)


def default_shape(cfg: Config, config: str) -> tuple[tuple[int, int], str]:
    """Height and width in pixels, and where they come from.

    Raises:
        UserError: If the config has neither a published row nor a crop nor a Resize.
    """
    row = published.for_config(config)
    if row:
        return row.input, 'the published row'
    crop = crop_of(cfg)
    if not crop:
        raise UserError(
            f'{config}: the config has no published row, no crop_size and no Resize with a scale\n'
            f'Name a size with --shape H W.'
        )
    divisor = cfg.model.get('data_preprocessor', {}).get('pad_size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in crop)
    return (height, width), "the config's crop" if (height, width) == crop else "the config's size, padded"


def versions() -> dict[str, str]:
    """Versions of the installed libraries that a count may depend on."""
    installed = {distribution.metadata['Name'] for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in _LIBRARIES if name in installed}


def _plain(counts: Count) -> dict[str, Any]:
    return dict(
        parameters=counts.parameters,
        inference_parameters=counts.inference_parameters,
        macs=counts.macs,
        parts=[asdict(part) for part in counts.parts],
        uncounted=[asdict(operator) for operator in counts.uncounted],
    )


def to_text(found: Report) -> str:
    """The report as a table, with notes."""
    forms = found.training, found.deployed
    marks = {INFERENCE: '', TRAINING: ' *', NEVER: ' +'}
    by_name = [{part.name: part for part in form.parts} for form in forms]
    runs = {part.runs for part in found.training.parts}

    def row(name: str, *pairs: tuple[int, int]) -> list[str]:
        return [name, *(cell for held, used in pairs for cell in (f'{held:,}', f'{used / 1e9:.2f} G'))]

    rows = [['', 'parameters', 'MACs', 'reparameterized: parameters', 'MACs']]
    for part in found.training.parts:
        pairs = [
            (parts[part.name].parameters, parts[part.name].macs) if part.name in parts else (0, 0) for parts in by_name
        ]
        rows.append(row(part.name + marks[part.runs], *pairs))
    rows.append(row('inference', *((form.inference_parameters, form.macs) for form in forms)))
    if TRAINING in runs:
        rows.append(row('in training', *((form.parameters, sum(part.macs for part in form.parts)) for form in forms)))
    lines = [f'{found.config} at 1x3x{found.shape[0]}x{found.shape[1]} ({found.shape_from})', '', text_table(rows)]
    if TRAINING in runs:
        lines.append('* runs in training only')
    if NEVER in runs:
        lines.append('+ not called: its weights are used elsewhere, or it depends on the image')
    lines += [
        '',
        f'reparameterized: {found.changes}',
        *found.training.notes,
        f'not counted, because torch has no formula: {operators(found.training.uncounted)}',
        f'versions: {", ".join(f"{name} {number}" for name, number in versions().items())}',
    ]
    paper = published.for_config(found.config)
    if paper and paper.input == found.shape:
        lines.append(
            f'published: {paper.params_m:g} M parameters, {paper.flops_g:g} G ({paper.source}); '
            f'see docs/complexity.md for how they were counted'
        )
    return '\n'.join(lines)


def operators(uncounted: Iterable[Operator]) -> str:
    """Operators as text, those with most elements in full."""
    known = list(uncounted)
    shown = [f'{o.name} ({o.calls} times, {o.elements / 1e6:.1f} M elements)' for o in known[:_SHOWN]]
    return ', '.join([*shown, *(o.name for o in known[_SHOWN:])]) or 'nothing'


#: Folder of the configs that follow the published recipes, from the root of the repository.
CONFIGS = 'configs'
COMMAND = 'python tools/complexity.py --published'
#: Accepted deviations from the published figures, in percent.
TOLERANCES = {'parameters': 2.0, 'macs': 1.0}
#: Ways to count: which form of the network, which counter, with the auxiliary heads' parameters or without.
COUNTINGS = {
    'deployed': "torch's counter; kernels merged, BatchNorm folded; parameters without auxiliary heads",
    'training': "torch's counter; as built for training; parameters with auxiliary heads",
    'mmcv_training': "mmcv's counter; as built for training; parameters with auxiliary heads",
    'mmcv_merged': "mmcv's counter; backbone merged and folded, heads as trained; parameters without auxiliary heads",
}
#: The way that we report for every network.
OURS = 'deployed'
#: The way of :data:`COUNTINGS` that fits the figures of each family's authors best.
AUTHORS = {'RepLKNet': 'mmcv_merged', 'ConvNeXt': 'mmcv_training'}
#: Kernels of the four stages that reproduce the authors' figures where the released network has other ones.
AUTHORS_KERNELS = {'RepLKNet-XL': [31, 29, 27, 13]}
#: Unit and decimals of a figure, and its name among the published ones.
_UNITS = {'parameters': (1e6, 1, 'parameters_m'), 'macs': (1e9, 2, 'macs_g')}
_PAGE = Path(__file__).with_name('complexity.md.j2')


def run(pattern: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Count the published rows without allocating weights.

    Args:
        pattern: Regular expression searched for in the names of the configs. Defaults to None: all rows.
        say: Called with a line of progress for each row.

    Returns:
        Plain data: ``command``, ``versions``, ``tolerance_percent``, ``countings`` (names and meaning) and ``rows``,
        each with ``config``, ``task``, ``backbone``, ``pretraining``, ``dataset``, ``method``, ``input`` (height,
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
            f'They are: {", ".join(str(row.config) for row in published.results())}'
        )
    rows = []
    for number, result in enumerate(chosen, 1):
        row = count_row(result)
        rows.append(row)
        say(
            f'{number}/{len(chosen)} {row["config"]}: ours {shown(row["counts"][OURS], row)}; as the authors count '
            f'{shown(row["authors"], row)}: {row["status"]}'
        )
    return dict(command=COMMAND, versions=versions(), tolerance_percent=TOLERANCES, countings=COUNTINGS, rows=rows)


def count_row(result: Result) -> dict[str, Any]:
    """All countings of one published row; see :func:`run`."""
    path = str(Path(CONFIGS) / str(result.config))
    cfg = load_config(path)
    forms, model = count_forms(cfg, path, result.input, 'the published row')
    training, deployed = forms.training, forms.deployed
    counts = dict(
        deployed=dict(parameters=deployed.inference_parameters, macs=deployed.macs),
        training=dict(parameters=training.parameters, macs=training.macs),
        mmcv_training=dict(parameters=training.parameters, macs=complexity.mmcv_macs(model, result.input)),
        mmcv_merged=_mmcv_merged(model, result),
    )
    kernels = AUTHORS_KERNELS.get(result.backbone)
    authors = counts[AUTHORS[result.family]]
    if kernels:
        authors = _mmcv_merged(build(_with_kernels(cfg, kernels)), result)
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


def _mmcv_merged(model: Any, result: Result) -> dict[str, int]:
    model = complexity.on_meta(model)
    with torch.device('meta'):
        model.backbone = reparameterize(model.backbone)[0]
    return dict(parameters=complexity.inference_parameters(model), macs=complexity.mmcv_macs(model, result.input))


def _with_kernels(cfg: Config, kernels: list[int]) -> Config:
    arch = cfg.model.backbone.arch
    settings = RepLKNet.arch_settings[arch] if isinstance(arch, str) else arch
    other = Config(cfg.to_dict(), filename=cfg.filename)
    other.model.backbone.arch = {**settings, 'large_kernel_sizes': kernels}
    return other


def difference(count: dict[str, Any], row: dict[str, Any], what: str) -> float:
    """By how many percent a count of ``'parameters'`` or ``'macs'`` exceeds the published figure."""
    unit, _, name = _UNITS[what]
    return 100 * (count[what] / (row['published'][name] * unit) - 1)


def rounds(count: dict[str, Any], row: dict[str, Any], what: str) -> bool:
    """Whether a count, rounded to whole millions or billions, is the published figure."""
    unit, _, name = _UNITS[what]
    return round(count[what] / unit) == row['published'][name]


def status_of(row: dict[str, Any]) -> str:
    """``'within'`` the tolerances as we count, ``'explained'``: within as the authors count, or ``'unexplained'``."""
    for status, counted in (('within', row['counts'][OURS]), ('explained', row['authors'])):
        if all(abs(difference(counted, row, what)) <= limit for what, limit in TOLERANCES.items()):
            return status
    return 'unexplained'


def shown(count: dict[str, Any], row: dict[str, Any], what: str | None = None) -> str:
    """A count with its difference from the published figure; both of its figures by default."""
    if what is None:
        return f'{shown(count, row, "parameters")} M, {shown(count, row, "macs")} G'
    unit, digits, _ = _UNITS[what]
    return f'{count[what] / unit:.1f} ({difference(count, row, what):+.{digits}f} %)'


def agreement(record: dict[str, Any], family: str, way: str, what: str) -> str:
    """How many rows of a family a way of counting reproduces when rounded, and its largest difference in percent."""
    members = [
        (row['authors'] if way == 'authors' else row['counts'][way], row)
        for row in record['rows']
        if row['backbone'].startswith(family)
    ]
    worst = max((difference(count, row, what) for count, row in members), key=abs)
    return f'{sum(rounds(count, row, what) for count, row in members)} of {len(members)}, {worst:+.2f} %'


def page(record: dict[str, Any], tables_only: bool = False) -> str:
    """The text of docs/complexity.md, from a record of :func:`run`."""
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
        shown=shown,
        agreement=agreement,
        record=record,
        families=[family for family in AUTHORS if any(row['backbone'].startswith(family) for row in rows)],
        authors=AUTHORS,
        authors_kernels=AUTHORS_KERNELS,
        share=100 * deviation,
        largest=config,
        operators=sorted({operator['name'] for row in rows for operator in row['uncounted']}),
        notes=list(dict.fromkeys(note for row in rows for note in row['notes'])),
        missed=[row for row in rows if not all(rounds(row['authors'], row, what) for what in _UNITS)],
    )
