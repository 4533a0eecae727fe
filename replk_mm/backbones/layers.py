"""Parts that more than one family uses."""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.registry import MODELS


@MODELS.register_module(name=['LayerNorm2d', 'LN2d'])
class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of ``(N, C, H, W)``, at every pixel by itself.

    In channels-last memory both permutations are free: the layer then runs on contiguous rows of channels.

    Args:
        num_channels: Channels of the input.
        eps: Added to the variance. Defaults to 1e-6.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def build_norm(cfg: dict, num_features: int) -> nn.Module:
    """The normalization layer that ``cfg`` describes. ``LN2d`` is ours in every scope: mmpretrain's configs name it."""
    if cfg['type'] in ('LN2d', 'LayerNorm2d'):
        cfg = {**cfg, 'type': f'replk_mm.{cfg["type"]}'}
    return build_norm_layer(cfg, num_features)[1]


def build_activation(cfg: dict) -> nn.Module:
    """The activation that ``cfg`` describes, in place where it can be: nothing else reads its input."""
    kind = MODELS.get(cfg['type'])
    takes = inspect.signature(kind).parameters if kind is not None else ()
    return build_activation_layer({'inplace': True, **cfg} if 'inplace' in takes else cfg)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every BatchNorm in ``module``; what it computes while training stays the same."""
    tracking = [
        (m, m.momentum, m.num_batches_tracked.clone())
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    for norm, *_ in tracking:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in tracking:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def run_checkpointed(module: nn.Module, x: Tensor, enabled: bool) -> Tensor:
    """``module(x)``, recomputed in the backward pass instead of kept in memory if ``enabled``."""
    if enabled and x.requires_grad:
        # The second run sees the same batch, which must not count twice in the running statistics.
        return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(module)))
    return module(x)


def resolve_arch(arch: str | dict, table: dict[str, dict], options: dict, family: str) -> dict:
    """The settings of a named or given variant.

    Args:
        arch: A name in ``table``, or a dict with the keys of its rows.
        table: The family's variants.
        options: Keys that a dict may leave out, with what they are then.
        family: For messages.

    Raises:
        ValueError: If the name is unknown, or the dict has missing or unknown keys.
    """
    if isinstance(arch, str):
        if arch not in table:
            raise ValueError(f'{family}: arch={arch!r} is unknown; choose one of {", ".join(table)}, or give a dict')
        return options | table[arch]
    if not isinstance(arch, dict):
        raise ValueError(f'{family}: arch={arch!r} must be one of {", ".join(table)}, or a dict')
    needed = set(next(iter(table.values())))
    missing, unknown = needed - set(arch), set(arch) - needed - set(options)
    if missing or unknown:
        raise ValueError(
            f'{family}: arch has missing keys {sorted(missing)}, unknown keys {sorted(unknown)}; '
            f'it takes {sorted(needed | set(options))}'
        )
    return options | arch


def drop_path_rates(last: float, blocks: int, family: str) -> list[float]:
    """Stochastic depth of each block, from 0 in even steps to ``last``.

    Raises:
        ValueError: If ``last`` is no probability below 1.
    """
    if not 0 <= last < 1:
        raise ValueError(f'{family}: drop_path_rate={last} must be in 0 <= rate < 1')
    return torch.linspace(0, last, blocks, device='cpu').tolist()


class Backbone(BaseModule):
    """What every family shares: weights of any known format, frozen stages, depth of parameters, memory layout.

    Args:
        out_indices: Stages whose features are returned; negative numbers count from the last stage.
        num_stages: Stages the network has.
        norm_eval: Keep BatchNorm layers in evaluation mode while training.
        init_cfg: Initialization as in mmengine; ``dict(type='Pretrained', checkpoint=...)`` takes every format that
            :mod:`replk_mm.checkpoints.io` knows, with or without ``prefix``.
        out_memory_format: ``'contiguous_format'`` or ``'preserve_format'``: the layout of the returned features.

    Attributes:
        channels_last: Compute in channels-last memory on CPUs, where most layers run fastest. Values stay the same.

    Raises:
        ValueError: If ``out_indices`` is empty, repeats or names a stage that does not exist, or ``out_memory_format``
            is unknown.
    """

    init_cfg: Any
    channels_last: bool = True

    def __init__(
        self,
        out_indices: int | Sequence[int],
        num_stages: int,
        norm_eval: bool,
        init_cfg: dict | list[dict] | None,
        out_memory_format: str,
    ) -> None:
        super().__init__(init_cfg)
        given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        self.out_indices = tuple(i + num_stages if i < 0 else i for i in given)
        if not given or len(set(self.out_indices)) < len(given) or not set(self.out_indices) <= set(range(num_stages)):
            raise ValueError(
                f'{type(self).__name__}: out_indices={out_indices} must name different stages out of '
                f'0..{num_stages - 1}'
            )
        if out_memory_format not in ('contiguous_format', 'preserve_format'):
            raise ValueError(
                f'{type(self).__name__}: out_memory_format={out_memory_format!r} must be '
                f'contiguous_format or preserve_format'
            )
        self.norm_eval = norm_eval
        self.out_memory_format = out_memory_format

    def _enter(self, x: Tensor) -> Tensor:
        """``x`` in the layout that the backbone computes in."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.device.type == 'cpu' else x

    def _leave(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``features`` in the layout that the backbone returns."""
        return tuple(x.contiguous() if self.out_memory_format == 'contiguous_format' else x for x in features)

    def init_weights(self) -> None:
        """Initialize at random, then overwrite with the ``Pretrained`` checkpoint if ``init_cfg`` names one."""
        given = self.init_cfg
        cfgs = given if isinstance(given, list) else [given] if given else []
        pretrained = [cfg for cfg in cfgs if cfg['type'] == 'Pretrained']
        if self.is_init:
            return
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = cfgs
        for cfg in pretrained:
            load_pretrained(self, **{key: value for key, value in cfg.items() if key != 'type'})

    # Depth of parameters, for learning rates that fall towards the image. The rule is that of the authors of ConvNeXt
    # (github.com/facebookresearch/ConvNeXt, optim_factory.py, and mmcv_custom/layer_decay_optimizer_constructor.py of
    # its detection and segmentation; arXiv:2201.03545 follows BEiT, arXiv:2106.08254, in this).

    @abstractmethod
    def _blocks_of_stages(self) -> list[int]:
        """How many blocks each stage has."""

    @abstractmethod
    def _place(self, parts: list[str]) -> tuple[int, int | None] | None:
        """Stage and block, both from 0, of the parameter whose name in the backbone is ``parts``, joined by dots.

        The block is None for what leads to the stage (to the first one: the stem). The place is None for norms of the
        returned features. Raises ValueError if the backbone has no such parameter.
        """

    def _place_of(self, name: str, prefix: str) -> tuple[int, int | None] | None:
        return self._place(name[len(prefix) :].split('.')) if name.startswith(prefix) else None

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter by layers; mmpretrain's interface.

        Id 0 is the stem. With four stages the third has a layer for every three blocks, and each other stage is one
        layer; with another number of stages each is one. What leads to a stage belongs to its first layer. The largest
        id is for what learns at the full rate: all outside the backbone, and the norms of the returned features.

        Args:
            name: Full name of the parameter.
            prefix: What precedes the backbone's own names, such as ``'backbone.'``.

        Returns:
            The layer id of the parameter, and the number of ids: the layers and two.

        Raises:
            ValueError: If the name has the prefix and the backbone has no such parameter.
        """
        blocks = self._blocks_of_stages()
        layers = [-(-n // 3) if len(blocks) == 4 and i == 2 else 1 for i, n in enumerate(blocks)]
        count = sum(layers) + 2
        place = self._place_of(name, prefix)
        if place is None:
            return count - 1, count
        stage, block = place
        if block is None and stage == 0:
            return 0, count
        return 1 + sum(layers[:stage]) + min((block or 0) // 3, layers[stage] - 1), count

    def get_stage_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter by stages; arguments, errors and largest id as in :meth:`get_layer_depth`.

        Id 0 is the stem, and everything else that leads to a stage: the authors give all downsampling layers the rate
        of the stem. Then follow the stages.

        Returns:
            The stage id of the parameter, and the number of ids: the stages and two.
        """
        count = len(self._blocks_of_stages()) + 2
        place = self._place_of(name, prefix)
        if place is None:
            return count - 1, count
        stage, block = place
        return (0 if block is None else stage + 1), count

    @abstractmethod
    def _frozen_modules(self) -> list[nn.Module]:
        """Modules that ``frozen_stages`` fixes; each family knows its own."""

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Backbone':
        """Switch modes, leaving frozen stages (and with ``norm_eval`` every BatchNorm) in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
