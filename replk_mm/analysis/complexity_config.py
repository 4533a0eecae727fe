"""What the network of a config costs, before and after reparameterization, as data and as text."""
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config

from replk_mm.analysis.complexity import INFERENCE, NEVER, TRAINING, Count, Operator, count
from replk_mm.bench import published
from replk_mm.data.datasets import crop_of
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError
from replk_mm.reparam import reparameterize

#: Libraries whose versions a count may depend on.
_LIBRARIES = ('torch', 'mmengine', 'mmcv', 'mmsegmentation', 'mmdet')
_SHOWN = 6


@dataclass(frozen=True)
class Report:
    """What a config's network costs.

    Attributes:
        config: As it was named.
        shape: Height and width of the image in pixels.
        shape_from: Where that size is from.
        training: The network as the config builds it.
        deployed: The same with parallel kernels merged and BatchNorm folded.
        changes: What was merged and folded, in words.
    """

    config: str
    shape: tuple[int, int]
    shape_from: str
    training: Count
    deployed: Count
    changes: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``tools/complexity.py --help`` describes it."""
        return dict(config=self.config, shape=list(self.shape), shape_from=self.shape_from,
                    training=_plain(self.training), reparameterized=_plain(self.deployed), changes=self.changes,
                    notes=self.training.notes, versions=versions())


def report(config: str, shape: tuple[int, int] | None = None, options: dict | None = None) -> Report:
    """Count the network of a config in both forms; no weights are allocated.

    Args:
        config: A file, or ``PACKAGE::NAME.py``; it needs no more than a model.
        shape: Height and width in pixels; None for the size at which the published figure was counted, or else for the
            crop that the config trains on.
        options: Overrides of fields.

    Raises:
        UserError: If the config cannot be read or does not build, has no size, or its network cannot take the size.
    """
    cfg = load_config(config, options, needs=('model',))
    size, source = (shape, 'given') if shape else default_shape(cfg, config)
    model = build(cfg)
    training = counted(model, size, config)
    merged, changes = merge(model)
    return Report(config, size, source, training, counted(merged, size, config), str(changes))


def build(cfg: Config) -> Any:
    """The config's model without weights; what the libraries warn of while they build is about training."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return build_model(cfg, 'meta')


def merge(model: nn.Module) -> tuple[nn.Module, Any]:
    """A reparameterized copy of a network without weights, and what was changed."""
    with torch.device('meta'):
        return reparameterize(model)


def default_shape(cfg: Config, config: str) -> tuple[tuple[int, int], str]:
    """Height and width in pixels, and where they are from.

    Raises:
        UserError: If the config has neither a published row nor a crop nor a size that images are resized to.
    """
    row = published.for_config(config)
    if row:
        return row.input, 'the published row'
    crop = crop_of(cfg)
    if not crop:
        raise UserError(f'{config}: the config has no published row, no crop_size and no Resize with a scale\n'
                        f'Name a size with --shape H W.')
    divisor = cfg.model.get('data_preprocessor', {}).get('pad_size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in crop)
    return (height, width), "the config's crop" if (height, width) == crop else "the config's size, padded"


def counted(model: nn.Module, shape: tuple[int, int], config: str) -> Count:
    """:func:`~replk_mm.analysis.complexity.count`; what a network raises becomes a message.

    Raises:
        UserError: If the network cannot take the size, or cannot run without values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return count(model, shape)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, ZeroDivisionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f'{config}: {type(model).__name__} cannot be counted at 1x3x{shape[0]}x{shape[1]}: {first}\n'
            f'If the size is too small or does not divide, name another with --shape. Networks whose course depends on values '
            f'(queries, sparse regions) cannot be counted. REPLK_MM_TRACEBACK=1 shows where it fails.') from error


def versions() -> dict[str, str]:
    """Versions of the libraries that a count may depend on, where they are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(counts: Count) -> dict[str, Any]:
    return dict(parameters=counts.parameters, inference_parameters=counts.inference_parameters, macs=counts.macs,
                parts=[asdict(part) for part in counts.parts], uncounted=[asdict(operator) for operator in counts.uncounted])


def to_text(found: Report) -> str:
    """The report as a table and the lines that belong to it."""
    before, after = ({part.name: part for part in form.parts} for form in (found.training, found.deployed))
    names = [(name, part.runs) for name, part in before.items()]
    marks = {INFERENCE: '', TRAINING: ' *', NEVER: ' +'}
    width = max(len('in training'), *(len(name) + 2 for name, _ in names))
    lines = [f'{found.config} at 1x3x{found.shape[0]}x{found.shape[1]} ({found.shape_from})', '',
             f'{"":{width}}  {"as built for training":^25}  {"reparameterized":^25}',
             f'{"":{width}}  {"parameters":>14} {"MACs":>10}  {"parameters":>14} {"MACs":>10}']

    def row(name: str, *forms: tuple[int, int]) -> str:
        return f'{name:{width}}' + ''.join(f'  {held:14,} {used / 1e9:8.2f} G' for held, used in forms)

    lines += [row(name + marks[runs], *((form[name].parameters, form[name].macs) if name in form else (0, 0)
                                        for form in (before, after))) for name, runs in names]
    forms = found.training, found.deployed
    lines.append(row('inference', *((form.inference_parameters, form.macs) for form in forms)))
    if any(runs == TRAINING for _, runs in names):
        lines.append(row('in training', *((form.parameters, sum(p.macs for p in form.parts)) for form in forms)))
    lines += [text for mark, text in ((TRAINING, '* trains only, and is not run for inference'),
                                      (NEVER, '+ not called: its weights are used elsewhere, or it depends on the image'))
              if any(runs == mark for _, runs in names)]
    lines += ['', f'reparameterized: {found.changes}', *found.training.notes,
              f'not counted, for torch has no formula: {operators(found.training.uncounted)}',
              f'versions: {", ".join(f"{name} {number}" for name, number in versions().items())}']
    row_of_paper = published.for_config(found.config)
    if row_of_paper and row_of_paper.input == found.shape:
        lines.append(f'published: {row_of_paper.params_m:g} M parameters, {row_of_paper.flops_g:g} G ({row_of_paper.source}); '
                     f'docs/complexity.md says how they were counted')
    return '\n'.join(lines)


def operators(uncounted: Iterable[Operator]) -> str:
    """Operators in words, those with most elements in full."""
    known = list(uncounted)
    shown = [f'{o.name} ({o.calls} times, {o.elements / 1e6:.1f} M elements)' for o in known[:_SHOWN]]
    return ', '.join([*shown, *(o.name for o in known[_SHOWN:])]) or 'nothing'
