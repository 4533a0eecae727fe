"""Layers that several backbones use, and their base class."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from replk_mm.checkpoints.loading import get_reparameterization, load_pretrained
from replk_mm.errors import UserError
from replk_mm.registry import MODELS


@MODELS.register_module(name=['LayerNorm2d', 'LN2d'])
class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of each pixel of ``(N, C, H, W)``.

    In channels-last memory the two permutations copy nothing.

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
    """Build a normalization layer. ``LN2d`` is ours in every scope, as configs of mmpretrain expect it."""
    if cfg['type'] in ('LN2d', 'LayerNorm2d'):
        cfg = {**cfg, 'type': f'replk_mm.{cfg["type"]}'}
    return build_norm_layer(cfg, num_features)[1]


def build_activation(cfg: dict) -> nn.Module:
    """Build an activation, in place if it supports that: no other layer reads its input."""
    cls = MODELS.get(cfg['type'])
    parameters = inspect.signature(cls).parameters if cls is not None else ()
    return build_activation_layer({'inplace': True, **cfg} if 'inplace' in parameters else cfg)


@contextmanager
def _freeze_running_stats(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every BatchNorm in ``module``, which still normalizes by batch statistics."""
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


def run_checkpointed(module: nn.Module, *inputs: Tensor, enabled: bool) -> Tensor:
    """Run ``module``; if ``enabled``, recompute its activations in the backward pass instead of storing them."""
    if enabled and inputs[0].requires_grad:
        # The recomputation must not update the running statistics a second time.
        return checkpoint(
            module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _freeze_running_stats(module))
        )
    return module(*inputs)


class Stage(nn.Sequential):
    """Blocks of one resolution, each called as ``block(x)``, or with a context as ``block(x, context)``.

    Args:
        *blocks: In the order of execution.
        with_cp: Recompute the activations of each block in the backward pass. This saves memory and takes about a third
            more time.
    """

    def __init__(self, *blocks: nn.Module, with_cp: bool = False) -> None:
        super().__init__(*blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        others = () if context is None else (context,)
        for block in self:
            x = run_checkpointed(block, x, *others, enabled=self.with_cp)
        return x


def add_residual(shortcut: Tensor, branch: Tensor, drop_path: Any, scale: Tensor | None = None) -> Tensor:
    """Compute ``shortcut + drop_path(scale * branch)`` in one pass over the map, with the draws of mmcv's DropPath.

    Args:
        shortcut: ``(N, C, H, W)``.
        branch: Of the same shape.
        drop_path: A ``DropPath``.
        scale: Layer scale, ``(C,)``. Defaults to None.
    """
    factor = None if scale is None else scale.view(-1, 1, 1)
    if drop_path.training and drop_path.drop_prob > 0:
        keep = 1 - drop_path.drop_prob
        kept = torch.rand(len(branch), 1, 1, 1, dtype=branch.dtype, device=branch.device).add_(keep).floor_().div_(keep)
        factor = kept if factor is None else kept * factor
    return shortcut + branch if factor is None else torch.addcmul(shortcut, branch, factor)


@torch.fx.wrap  # opaque when traced, since it looks at the device
def _to_channels_last_on_cpu(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == 'cpu' else x


class Backbone(BaseModule):
    """Base class of all backbones: variants, pretrained weights, frozen stages, depth of parameters, memory layout.

    Args:
        depths: Number of blocks of each stage.
        channels: Channels of each stage.
        out_indices: Stages whose features are returned. Negative numbers count from the last stage.
        frozen_stages: Number of stages to freeze; the smallest value, :attr:`min_frozen_stages`, freezes nothing.
        norm_eval: Keep BatchNorm layers in evaluation mode during training.
        out_memory_format: Memory layout of the returned features. ``'contiguous_format'`` works with every operator.
            ``'preserve_format'`` returns channels-last memory on CPUs: it copies nothing and is faster for
            convolutional heads, but mmcv's compiled operators, such as RoIAlign, misread it.
        init_cfg: Initialization as in mmengine. ``dict(type='Pretrained', checkpoint=...)`` loads every format that
            :mod:`replk_mm.checkpoints.key_formats` supports, with an optional ``prefix``.
        stem_stride: Stride of the first stage; each later stage halves the resolution. Defaults to 4.

    Attributes:
        arch_settings: Variants: name to settings. All have the same keys.
        arch_options: Optional keys of a variant with their defaults.
        feature_info: One dict for each returned feature, as in timm: channels ``num_chs``, stride ``reduction`` and
            the name of the ``module``.
        channels_last: Compute in channels-last memory on CPUs, where most layers are fastest. Values stay the same.

    Raises:
        ValueError: If a value is out of range, ``arch`` of a subclass is unknown or incomplete, ``depths`` and
            ``channels`` differ in length, or ``out_indices`` is empty or repeats a stage.
    """

    init_cfg: Any
    stages: Any
    downsample_layers: Any
    arch_settings: dict[str, dict]
    arch_options: dict = {}
    min_frozen_stages: int = 0
    channels_last: bool = True

    def __init__(
        self,
        depths: Sequence[int],
        channels: Sequence[int],
        out_indices: int | Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        out_memory_format: str,
        init_cfg: dict | list[dict] | None,
        stem_stride: int = 4,
    ) -> None:
        super().__init__(init_cfg)
        num_stages, family = len(channels), type(self).__name__
        if len(depths) != num_stages:
            raise ValueError(f'{family}: depths {depths} and channels {channels} must have one entry for each stage')
        if not self.min_frozen_stages <= frozen_stages <= num_stages:
            bounds = f'{self.min_frozen_stages}..{num_stages}'
            raise ValueError(f'{family}: frozen_stages={frozen_stages} must be in {bounds}')
        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        self.out_indices = tuple(i + num_stages if i < 0 else i for i in indices)
        unique = set(self.out_indices)
        if not indices or len(unique) < len(indices) or not unique <= set(range(num_stages)):
            raise ValueError(f'{family}: out_indices={out_indices} must be different stages in 0..{num_stages - 1}')
        if out_memory_format not in ('contiguous_format', 'preserve_format'):
            raise ValueError(
                f'{family}: out_memory_format={out_memory_format!r} must be contiguous_format or preserve_format'
            )
        self.feature_info = [
            dict(num_chs=channels[i], reduction=stem_stride * 2**i, module=f'stages.{i}') for i in sorted(unique)
        ]
        self.depths, self.frozen_stages, self.norm_eval = list(depths), frozen_stages, norm_eval
        self.out_memory_format = out_memory_format

    @classmethod
    def resolve_arch(cls, arch: str | dict) -> dict:
        """Return the settings of a variant, given its name in :attr:`arch_settings` or a dict with the same keys.

        Raises:
            ValueError: If the name is unknown, or the dict has missing or unknown keys.
        """
        table, options = cls.arch_settings, cls.arch_options
        if not isinstance(arch, dict):
            if arch not in list(table):
                raise ValueError(f'{cls.__name__}: arch={arch!r} must be one of {", ".join(table)}, or a dict')
            arch = table[arch]
        required = set(next(iter(table.values())))
        missing, unknown = required - set(arch), set(arch) - required - set(options)
        if missing or unknown:
            raise ValueError(
                f'{cls.__name__}: arch has missing keys {sorted(missing)}, unknown keys {sorted(unknown)}; '
                f'the keys are {sorted(required | set(options))}'
            )
        return options | arch

    def drop_path_rates(self, max_rate: float) -> Iterator[float]:
        """Yield the drop path rate of each block, from 0 to ``max_rate`` in equal steps.

        Raises:
            ValueError: If ``max_rate`` is not in ``[0, 1)``.
        """
        if not 0 <= max_rate < 1:
            raise ValueError(f'{type(self).__name__}: drop_path_rate={max_rate} must be in 0 <= rate < 1')
        return iter(torch.linspace(0, max_rate, sum(self.depths), device='cpu').tolist())

    def _to_compute_format(self, x: Tensor) -> Tensor:
        return _to_channels_last_on_cpu(x) if self.channels_last else x

    def _to_output_format(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() if self.out_memory_format == 'contiguous_format' else x for x in features)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of a batch of images.

        This one is for modules ``downsample_layers``, ``stages`` and ``norm0`` to ``norm3``, as in ConvNeXt.

        Args:
            x: ``(N, in_channels, H, W)``.

        Returns:
            One ``(N, C_i, H / s_i, W / s_i)`` for each of ``out_indices``, with strides 4, 8, 16 and 32; padded layers
            round up, patches that do not fit are cut off.
        """
        x = self._to_compute_format(x)
        outs = []
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            if i in self.out_indices:
                outs.append(self._normalize(i, x))
        return self._to_output_format(outs)

    def _normalize(self, i: int, x: Tensor) -> Tensor:
        """The returned features of stage ``i``."""
        return getattr(self, f'norm{i}')(x)

    def init_weights(self) -> None:
        """Initialize the weights at random, then load the ``Pretrained`` checkpoint of ``init_cfg``."""
        init_cfg = self.init_cfg
        cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg] if init_cfg else []
        pretrained = [cfg for cfg in cfgs if cfg['type'] == 'Pretrained']
        if self.is_init:
            return
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = cfgs
        for cfg in pretrained:
            load_pretrained(self, **{key: value for key, value in cfg.items() if key != 'type'})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Reject weights of the other form; mmengine, mmseg and mmdet would load a part of them and log the rest."""
        keys = {key for key in state_dict if key.startswith(prefix)}
        own = {f'{prefix}{name}' for name, _ in (*self.named_parameters(), *self.named_buffers())}
        theirs = get_reparameterization({}, keys)
        # A part of the weights, such as the buffers, may lack the keys that tell the form.
        certain = len(keys) >= len(own) - 1 or get_reparameterization({}, keys - own)
        if certain and theirs != get_reparameterization({}, own):
            form = ', '.join(f'{key}={value}' for key, value in (theirs or {}).items())
            raise UserError(
                f'{type(self).__name__}: the weights are in {f"merged form ({form})" if form else "training form"}, '
                f'but the network is not\nLoad them into a network in training form'
                + (f' after replk_mm.reparam.reparameterize(model, {form}, inplace=True).' if form else '.')
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Depth of parameters for layer-wise learning-rate decay, as in the ConvNeXt authors' code:
    # github.com/facebookresearch/ConvNeXt, optim_factory.py, and mmcv_custom/layer_decay_optimizer_constructor.py of
    # its detection and segmentation code. The paper (arXiv:2201.03545) follows BEiT (arXiv:2106.08254).

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        """Return the stage and the block of a parameter, both from 0.

        This one is for modules ``downsample_layers``, ``stages`` and ``norm0`` to ``norm3``, as in ConvNeXt.

        Args:
            parts: The parameter's name in the backbone, split at the dots.

        Returns:
            The block is None for the stem and the downsampling layer before the stage. The result is None for norms of
            the returned features.

        Raises:
            ValueError: If the backbone has no such parameter.
        """
        match parts:
            case ['downsample_layers', stage, *_]:
                return int(stage), None
            case ['stages', stage, block, *_]:
                return int(stage), int(block)
            case [norm, *_] if norm in {f'norm{i}' for i in self.out_indices}:
                return None
        raise ValueError(f'{type(self).__name__} has no parameter {".".join(parts)!r}')

    def _locate(self, name: str, prefix: str) -> tuple[int, int | None] | None:
        return self._locate_parameter(name[len(prefix) :].split('.')) if name.startswith(prefix) else None

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer id of a parameter; the interface is mmpretrain's.

        Id 0 is the stem. In a network of four stages, every three blocks of the third stage are a layer and each other
        stage is one layer. In other networks each stage is one layer. A downsampling layer belongs to the first layer
        of the stage after it. The largest id has the full learning rate: parameters outside the backbone, and norms of
        the returned features.

        Args:
            name: Full name of the parameter.
            prefix: Prefix of the backbone's parameters, such as ``'backbone.'``.

        Returns:
            The layer id, and the number of ids: the layers plus two.

        Raises:
            ValueError: If the name starts with the prefix and the backbone has no such parameter.
        """
        layers = [-(-n // 3) if len(self.depths) == 4 and i == 2 else 1 for i, n in enumerate(self.depths)]
        count = sum(layers) + 2
        location = self._locate(name, prefix)
        if location is None:
            return count - 1, count
        stage, block = location
        if block is None and stage == 0:
            return 0, count
        return 1 + sum(layers[:stage]) + min((block or 0) // 3, layers[stage] - 1), count

    def get_stage_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Return the stage id of a parameter. Arguments, errors and largest id are those of :meth:`get_layer_depth`.

        Id 0 is the stem and, as in the authors' code, all downsampling layers. The stages follow.

        Returns:
            The stage id, and the number of ids: the stages plus two.
        """
        count = len(self.depths) + 2
        location = self._locate(name, prefix)
        if location is None:
            return count - 1, count
        stage, block = location
        return (0 if block is None else stage + 1), count

    def _frozen_modules(self) -> list[nn.Module]:
        """Return the modules that ``frozen_stages`` freezes: the first stages and the layers before each."""
        return [*self.downsample_layers[: self.frozen_stages], *self.stages[: self.frozen_stages]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Backbone':
        """Set the mode. Frozen stages, and with ``norm_eval`` all BatchNorm layers, stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


#: Initialization with weights of variance ``2 / fan_out`` and zero biases.
FAN_OUT_INIT: list[dict] = [
    dict(type='Kaiming', layer='Conv2d'),
    # The fan_out of a group. That of torch is for ungrouped convolutions, and its fan_in has this value.
    dict(type='Kaiming', layer='DepthwiseConv2d', mode='fan_in'),
]


class PatchEmbedBackbone(Backbone):
    """Base class for modules ``patch_embed1``, ``block1``, ``norm1``, ``patch_embed2`` and so on, as in PVT.

    Each norm is in the trunk: its output is the feature of the stage, and the input of the next stage. Arguments are
    those of :class:`Backbone`.
    """

    blocks_name: str = 'block'  #: name of the blocks of a stage, without its number

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for i, info in zip(sorted(self.out_indices), self.feature_info, strict=True):
            info['module'] = f'norm{i + 1}'

    def _layers(self, name: str) -> list[Any]:
        return [getattr(self, f'{name}{i + 1}') for i in range(len(self.depths))]

    @property
    def stages(self) -> list[Any]:
        """The blocks of each stage."""
        return self._layers(self.blocks_name)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round up."""
        x, features = self._to_compute_format(x), []
        layers = zip(self._layers('patch_embed'), self.stages, self._layers('norm'), strict=True)
        for i, (embed, stage, norm) in enumerate(layers):
            x = norm(stage(embed(x)))
            if i in self.out_indices:
                features.append(x)
        return self._to_output_format(features)

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        match = re.fullmatch(rf'(patch_embed|{self.blocks_name}|norm)(\d)', parts[0])
        if match is None or not hasattr(self, parts[0]):
            raise ValueError(f'{type(self).__name__} has no parameter {".".join(parts)!r}')
        stage = int(match[2]) - 1
        if match[1] == self.blocks_name:
            return stage, int(parts[1])
        return stage, self.depths[stage] if match[1] == 'norm' else None  # the norm is after the blocks

    def _frozen_modules(self) -> list[nn.Module]:
        names = ('patch_embed', self.blocks_name, 'norm')
        return [layer for name in names for layer in self._layers(name)[: self.frozen_stages]]
