"""Parameters and MACs of a config's network, before and after reparameterization."""

import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config

from replk_mm import published
from replk_mm.analysis.complexity import Complexity, count_complexity
from replk_mm.data.datasets import crop_of
from replk_mm.deploy.reparameterize import Changes, reparameterize
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError, explain_errors

#: Libraries whose versions may change a count.
_LIBRARIES = ('torch', 'mmengine', 'mmcv', 'mmsegmentation', 'mmdet')


@dataclass(frozen=True)
class ConfigComplexity:
    """Complexity of a config's network in both forms."""

    config: str  #: path or name of the config, as given
    shape: tuple[int, int]  #: height and width of the image in pixels
    shape_from: str  #: origin of ``shape``
    training: Complexity  #: the network as the config builds it
    deployed: Complexity  #: the same network with parallel kernels merged and BatchNorm folded
    changes: str  #: summary of the merged and folded layers

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the help of the command ``complexity`` describes the fields."""
        return dict(
            config=self.config,
            shape=list(self.shape),
            shape_from=self.shape_from,
            training=_to_dict(self.training),
            reparameterized=_to_dict(self.deployed),
            changes=self.changes,
            notes=self.training.notes,
            versions=library_versions(),
        )


def _to_dict(form: Complexity) -> dict[str, Any]:
    return dict(
        parameters=form.parameters,
        inference_parameters=form.inference_parameters,
        macs=form.macs,
        parts=[asdict(part) for part in form.parts],
        uncounted=[asdict(operator) for operator in form.uncounted],
    )


def config_complexity(
    config: str, shape: tuple[int, int] | None = None, options: dict | None = None
) -> ConfigComplexity:
    """Count parameters and MACs of a config's network in both forms, without allocating weights.

    Args:
        config: Path, or ``PACKAGE::NAME.py``. Only its ``model`` is needed.
        shape: Height and width in pixels. Defaults to the size of the published row, or else to the config's crop.
        options: Overrides of config fields.

    Raises:
        UserError: If the config cannot be read or built, has no size, or its network cannot take the size.
    """
    cfg = load_config(config, options, needs=('model',))
    size, source = (shape, 'given') if shape else _default_shape(cfg, config)
    return count_model(build_on_meta(cfg), config, size, source)


def count_model(model: nn.Module, config: str, shape: tuple[int, int], shape_from: str) -> ConfigComplexity:
    """Count a network that :func:`build_on_meta` has built from ``config``.

    Raises:
        UserError: If the network cannot take the size, or needs the values of tensors.
    """
    merged, changes = reparameterize_on_meta(model)
    failing = explain_errors(
        f'{config}: {type(model).__name__} cannot be counted at 1x3x{shape[0]}x{shape[1]}',
        'Try another --shape; networks whose control flow depends on values cannot be counted.',
    )
    with warnings.catch_warnings(), failing:
        warnings.simplefilter('ignore')
        training, deployed = count_complexity(model, shape), count_complexity(merged, shape)
    return ConfigComplexity(config, shape, shape_from, training, deployed, str(changes))


def build_on_meta(cfg: Config) -> Any:
    """Build the config's model on the meta device, without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the libraries' warnings concern training
        return build_model(cfg, 'meta')


def reparameterize_on_meta(model: nn.Module) -> tuple[nn.Module, Changes]:
    """Reparameterize a copy of a model on the meta device; returns the copy and the list of changes."""
    with torch.device('meta'):
        return reparameterize(model)


def _default_shape(cfg: Config, config: str) -> tuple[tuple[int, int], str]:
    """Height and width in pixels, and their origin.

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
            f'Set the size with --shape H W.'
        )
    divisor = cfg.model.get('data_preprocessor', {}).get('pad_size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in crop)
    return (height, width), "the config's crop" if (height, width) == crop else "the config's size, padded"


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that may change a count."""
    installed = {distribution.metadata['Name'] for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in _LIBRARIES if name in installed}
