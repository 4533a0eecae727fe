"""What the network of a config costs, before and after reparameterization."""

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config

from replk_mm.analysis.complexity import INFERENCE, NEVER, TRAINING, Count, Operator, count
from replk_mm.bench import published
from replk_mm.data.datasets import crop_of
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError, explained
from replk_mm.reparam import reparameterize
from replk_mm.tables import text_table

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
