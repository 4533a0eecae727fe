"""The catalogue of backbones: config, pretrained weights, published results and training recipes of each variant.

A family registers its variants with :func:`register_variants`, at the end of its file. A name is the paper's name in
lower case, a hyphen and the variant, and after a dot the pretraining: ``convnext-base.in22k``.
"""

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from torch.utils._python_dispatch import TorchDispatchMode

from replk_mm import published
from replk_mm.checkpoints.io import sha256_in_name
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.errors import UserError, did_you_mean, explain_errors, format_list
from replk_mm.published import PublishedResult
from replk_mm.registry import MODELS

#: Mean and standard deviation of ImageNet's pixels, RGB, 0 to 255.
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
#: Licences that allow commercial use, by SPDX identifier.
PERMISSIVE = ('Apache-2.0', 'BSD-2-Clause', 'BSD-3-Clause', 'CC-BY-4.0', 'CC0-1.0', 'ISC', 'MIT')
#: Side of the image that :func:`measure_features` uses, in pixels.
_SIDE = 128


@dataclass(frozen=True)
class Weights:
    """Pretrained weights of a backbone."""

    tag: str  #: what follows the dot in a name, such as ``'in22k'``
    pretraining: str  #: data, as the papers' tables name it
    url: str | None = None  #: for :func:`fetch_checkpoint`; None if another library has the weights
    licence: str | None = None  #: SPDX identifier; None if the authors do not state one for the weights
    arguments: Mapping[str, Any] | None = None  #: of the backbone, to load them; by default an ``init_cfg``

    @property
    def sha256(self) -> str | None:
        """The known first digits of the file's SHA-256; None if unknown."""
        return sha256_in_name(self.url or '')

    def to_config(self) -> dict[str, Any]:
        """Arguments of the backbone that load the weights."""
        return dict(self.arguments or dict(init_cfg=dict(type='Pretrained', checkpoint=self.url)))


@dataclass(frozen=True)
class Recipe:
    """How the authors fine-tuned a backbone for dense prediction, with AdamW."""

    lr: float  #: for ``global_batch`` images
    betas: tuple[float, float]
    weight_decay: float
    drop_path: float
    global_batch: int  #: images of one iteration on all GPUs
    paramwise_cfg: Mapping[str, Any]  #: layer-wise learning-rate decay, factors of weight decay
    source: str  #: name in the published recipes, with the variant


def recipe_of(result: PublishedResult) -> Recipe | None:
    """The recipe of a published row; None if the authors did not publish the values that they chose."""
    if result.recipe is None:
        return None
    table = published.table('recipes')[result.recipe]

    def value(of: Any) -> Any:
        return of[result.variant] if isinstance(of, Mapping) else of

    decay = table.get('layer_decay')
    custom = {key: dict(lr_mult=value(factor)) for key, factor in table.get('lr_mult', {}).items()}
    if decay and value(decay['rate']) is not None:
        paramwise = dict(
            decay_rate=value(decay['rate']), decay_type=decay['type'], num_layers=value(table.get('num_layers'))
        )
    else:
        paramwise = {} if 'no_decay' in table else dict(norm_decay_mult=0.0)
        custom |= {key: dict(decay_mult=0.0) for key in table.get('no_decay', ())}
    return Recipe(
        lr=value(table['lr']),
        betas=tuple(table['betas']) if 'betas' in table else (0.9, 0.999),
        weight_decay=value(table['weight_decay']),
        drop_path=value(table['drop_path']),
        global_batch=value(table['global_batch']),
        paramwise_cfg={**paramwise, **(dict(custom_keys=custom) if custom else {})},
        source=' '.join(filter(None, (result.recipe, result.variant))),
    )


@dataclass(frozen=True)
class CatalogueEntry:
    """One variant of a backbone."""

    name: str  #: without the pretraining
    config: Mapping[str, Any]  #: for ``MODELS.build``; returns the feature maps that the authors hand to UperNet
    source: str  #: paper and repository
    licence: str | None  #: SPDX identifier of the code that it was written after
    package: str | None = None  #: optional package that has the network
    paper_name: str | None = None  #: in the tables of published results
    weights: tuple[Weights, ...] = ()  #: the default first; of each pretraining, those of the published rows first
    detection: Mapping[str, Any] = field(default_factory=dict)  #: further arguments, which the authors use in detectors
    mean: tuple[float, ...] = IMAGENET[0]  #: of the images, RGB, 0 to 255
    std: tuple[float, ...] = IMAGENET[1]
    bgr: bool = False  #: the network takes BGR images; mean and std have this order too

    def published(self, task: str, weights: Weights | None = None) -> list[PublishedResult]:
        """Published rows of a task, ``'segmentation'`` or ``'detection'``; only those that start from ``weights``."""
        return [
            row
            for row in published.results()
            if (row.backbone, row.task) == (self.paper_name, task)
            and (weights is None or weights is self._start_of(row))
        ]

    def _start_of(self, row: PublishedResult) -> Weights | None:
        """The weights that the authors fine-tuned for a row: the first ones of its pretraining."""
        return next((w for w in self.weights if w.pretraining.startswith(row.pretraining)), None)

    def full_name(self, weights: Weights | None) -> str:
        """The name with the tag of the weights."""
        return f'{self.name}.{weights.tag}' if weights and weights.tag else self.name

    def require_weights(self) -> Weights:
        """The default weights.

        Raises:
            UserError: If there are none.
        """
        if not self.weights:
            raise UserError(f'{self.name}: there are no pretrained weights\nUse random weights, or the path of a file.')
        return self.weights[0]


def licence_of(entry: CatalogueEntry, weights: Weights | None) -> str:
    """The licence that a user of the weights finds; of the code where the weights have none of their own."""
    code = entry.licence or 'not stated'
    return (weights.licence or f'not stated (code: {code})') if weights else f'no weights (code: {code})'


def is_permissive(entry: CatalogueEntry, weights: Weights | None) -> bool:
    """Whether nothing is known that forbids commercial use."""
    return ((weights and weights.licence) or entry.licence) in PERMISSIVE


#: Makes the entry of a name such as ``timm/NAME`` or ``mmseg.NAME``, by what is before the slash or dot.
ADAPTERS: dict[str, Callable[[str], CatalogueEntry]] = {}
_ENTRIES: dict[str, CatalogueEntry] = {}


def register_variants(
    cls: type, variants: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any] | None = None, **common: Any
) -> None:
    """Add the variants of a family to the catalogue.

    Args:
        cls: The backbone, registered in the scope ``replk_mm``.
        variants: Fields of each :class:`CatalogueEntry` by name. ``arch`` and other arguments of ``cls`` are in its
            ``config``.
        config: Arguments that all variants have in common.
        **common: Fields that all variants have in common.
    """
    for name, fields in variants.items():
        arguments = {'type': f'replk_mm.{cls.__name__}', **(config or {}), **fields.get('config', {})}
        _ENTRIES[name] = CatalogueEntry(**{**common, **fields, 'name': name, 'config': arguments})


def list_backbones(pattern: str = '*') -> list[str]:
    """Names in the catalogue without their pretraining, such as ``'convnext-base'``.

    Args:
        pattern: Shell-style pattern, or a part of the name. Defaults to ``'*'``.
    """
    return [name for name in _ENTRIES if fnmatchcase(name, pattern) or pattern in name]


def find_backbone(name: str) -> tuple[CatalogueEntry, Weights | None]:
    """Look up a name.

    Returns:
        The entry, and the weights that the name gives after a dot.

    Raises:
        UserError: If the name is not in the catalogue.
    """
    library = re.split('[/.]', name)[0]
    if library in ADAPTERS:
        adapted = ADAPTERS[library](name)
        return adapted, next((w for w in adapted.weights if w.tag and adapted.full_name(w) == name), None)
    base, _, tag = name.partition('.')
    entry = _ENTRIES.get(base)
    if entry is None:
        hint = did_you_mean(base.lower().replace('_', '-'), _ENTRIES, 0.7) or (
            f'The command backbones lists all names. Names of other libraries: timm/{name}, hf/NAME, mmdet.TYPE.'
        )
        raise UserError(f'{name}: no such backbone\n{hint}')
    weights = next((w for w in entry.weights if w.tag == tag), None)
    if tag and weights is None:
        tags = format_list([f'{base}.{w.tag}' for w in entry.weights], 10) or 'none'
        raise UserError(f'{name}: no such pretrained weights\nKnown weights: {tags}.')
    return entry, weights


@lru_cache(maxsize=1)
def weights_by_url() -> dict[str | None, tuple[CatalogueEntry, Weights]]:
    """Entry and weights by the address of the file."""
    return {weights.url: (entry, weights) for entry in _ENTRIES.values() for weights in entry.weights}


def build_backbone(
    name: str, pretrained: bool | str | Path = False, resize_kernels: str | None = None, **overrides: Any
) -> nn.Module:
    """Build a backbone of the catalogue.

    Args:
        name: Such as ``'convnext-base'``, or ``'convnext-base.in22k'`` to choose the pretraining.
        pretrained: True loads the weights that the name gives, or the default ones of the entry. A path or URL loads
            weights under the key names of the authors or of another known library, whole or not at all. Defaults to
            False: random weights.
        resize_kernels: ``'pad'`` or ``'interpolate'`` depthwise kernels of another size, see
            :func:`~replk_mm.checkpoints.loading.resize_kernel`. By default they are an error.
        **overrides: Arguments of the backbone.

    Returns:
        The module. ``forward`` takes ``(N, 3, H, W)`` and returns the feature maps; ``feature_info`` has a dict with
        channels ``num_chs`` and stride ``reduction`` of each.

    Raises:
        UserError: If the name is unknown, or the weights cannot be downloaded, cannot be read or do not fit.
    """
    entry, weights = find_backbone(name)
    config = {**entry.config, **overrides}
    source: str | Path | None = None if isinstance(pretrained, bool) else pretrained
    arguments: Mapping[str, Any] = {}
    if pretrained is True:
        chosen = weights or entry.require_weights()
        source, arguments = chosen.url, chosen.arguments or {}
    if resize_kernels and (not source or name.partition('/')[0] in ADAPTERS):
        raise UserError(f"{name}: resize_kernels={resize_kernels!r} needs weights of this package's families\nOmit it.")
    model: Any = MODELS.build(copy.deepcopy({**config, **arguments}))
    if not any(p.is_meta for p in model.parameters()):
        _initialize(model)
        if source:
            own = hasattr(model, 'load_checkpoint')
            model.load_checkpoint(source) if own else load_pretrained(model, source, resize_kernels=resize_kernels)
    if not hasattr(model, 'feature_info'):
        model.feature_info = measure_features(config)
    return model


def _initialize(model: Any) -> None:
    """Initialize the weights without mmengine's lines about each parameter, which no training asked for."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        model.init_weights()
    finally:
        logger.setLevel(level)


class ShapeOfSamples(TorchDispatchMode):
    """Only the shape of ``grid_sample`` on meta, where torch runs a hundred operators in Python for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.grid_sampler_2d.default and args[0].is_meta:
            return args[0].new_empty(*args[0].shape[:2], *args[1].shape[1:3])
        return func(*args, **(kwargs or {}))


def run_on_meta(function: Callable[[], Any]) -> Any:
    """Call a function that builds a network, on the meta device; on the CPU if it reads values, which meta lacks."""
    try:
        with torch.device('meta'), ShapeOfSamples():
            return function()
    except Exception:  # networks fail in any way where there are no values
        with torch.device('cpu'):
            return function()


def measure_features(config: Mapping[str, Any]) -> list[dict[str, int]]:
    """Channels ``num_chs`` and stride ``reduction`` of each feature map, found by a forward pass.

    The pass has a small image and runs as :func:`run_on_meta` does.

    Args:
        config: Of the backbone.

    Raises:
        UserError: If the backbone cannot be built or run, or returns something else than feature maps.
    """
    config = {key: value for key, value in config.items() if key != 'init_cfg'}

    @torch.no_grad()
    def run() -> Any:
        model = MODELS.build(copy.deepcopy(config))
        model.eval()  # mmdet's returns None
        return model(torch.zeros(1, config.get('in_channels', 3), _SIDE, _SIDE))

    with explain_errors(str(config['type']), 'Check its arguments.'):
        maps = run_on_meta(run)
    maps = list(maps) if isinstance(maps, (tuple, list)) else [maps]
    if any(not isinstance(x, torch.Tensor) or x.dim() != 4 for x in maps):
        raise UserError(
            f'{config["type"]}: returns something else than feature maps (N, C, H, W)\nCheck its arguments.'
        )
    return [dict(num_chs=x.shape[1], reduction=round(_SIDE / x.shape[-1])) for x in maps]
