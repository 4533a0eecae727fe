"""Backbones of timm and transformers, and the names under which the catalogue finds those of OpenMMLab."""

import ast
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from replk_mm.backbones.catalogue import ADAPTERS, IMAGENET, PERMISSIVE, CatalogueEntry, Weights, run_on_meta
from replk_mm.backbones.layers import LayerNorm2d
from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.key_formats import efficientnet_to_timm
from replk_mm.errors import UserError, did_you_mean, explain_errors, format_list
from replk_mm.registry import MODELS

#: Strides that heads and necks expect.
STRIDES = (4, 8, 16, 32)
_ENTRIES_OF_FILES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')  # averages first, as in timm
_OUTPUT_NORMS = 'hidden_states_norms.'  # of transformers; classifiers lack them, and they start as the identity


def require(package: str, name: str) -> Any:
    """Import an optional package.

    Raises:
        UserError: If it is not installed.
    """
    if find_spec(package) is None:
        raise UserError(
            f'{name}: the package {package} is not installed\n'
            f'Run make setup EXTRAS={package}, or pip install {package}.'
        )
    return import_module(package)


class Rescale(nn.Sequential):
    """Bring a feature map to another stride, as ViTDet does (arXiv:2203.16527, section 3).

    Transposed 2x2 convolutions, with LayerNorm and GELU in between, enlarge it; max pooling reduces it. What is left
    to a power of two, for example of patches of 14 pixels, is bilinear interpolation.

    Args:
        channels: Of the map.
        stride: Of the input.
        target: Stride of the output.
    """

    def __init__(self, channels: int, stride: int, target: int) -> None:
        steps = round(math.log2(stride / target))
        layers: list[nn.Module] = [nn.MaxPool2d(2**-steps, ceil_mode=True)] if steps < 0 else []
        for step in range(steps):
            layers += [LayerNorm2d(channels), nn.GELU()] if step else []
            layers.append(nn.ConvTranspose2d(channels, channels, 2, 2))
        super().__init__(*layers)
        self.factor = stride / 2.0**steps / target

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.factor == 1 else F.interpolate(x, scale_factor=self.factor, mode='bilinear')


@dataclass(frozen=True)
class _Probe:
    """What a network does with images."""

    options: dict[str, Any]  #: of the network, also those that let it process images of any size
    channels: list[int]  #: of all its feature maps, as the strides
    strides: list[int]
    multiple: tuple[int, int] | None  #: images are padded to a multiple of this height and width; None: to ``size``
    size: tuple[int, int]  #: of the images for which the network was built
    used: frozenset[str]  #: parameters that change the feature maps that are used
    depths: dict[str, int]  #: layer of each parameter, for layer-wise learning-rate decay


_PROBES: dict[str, _Probe] = {}


def choose_maps(strides: Sequence[int]) -> list[int]:
    """Index of the feature map from which that of each of :data:`STRIDES` is made.

    It is the last map of the closest stride. Plain vision transformers have one stride: theirs are four maps at equal
    distances in depth, as in BEiT (arXiv:2106.08254).
    """
    count = len(strides)
    if len(set(strides)) == 1:
        return [max(0, (i + 1) * count // 4 - 1) for i in range(4)]
    return [min(range(count), key=lambda i: (abs(math.log2(strides[i] / stride)), -i)) for stride in STRIDES]


class _Adapter(nn.Module):
    """Base class: fit the feature maps of a network to strides 4, 8, 16, 32."""

    package: str
    channels_argument: str
    _describe: Any  #: returns the number of feature maps, the size of the images, and the layer of each parameter
    _build: Any  #: builds the network with the feature maps of these indices
    _load: Any  #: loads weights under the library's names, or its own

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        rescale: bool = True,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.name, self.model_name, self.pretrained = f'{type(self).__name__} {model_name}', model_name, pretrained
        self.init_cfg, self.out_indices = init_cfg, [i + 4 if i < 0 else i for i in out_indices]
        if not self.out_indices or not set(self.out_indices) <= set(range(4)):
            raise UserError(f'{self.name}: out_indices={tuple(out_indices)}: there are four maps\nUse 0 to 3.')
        if init_cfg and (init_cfg.get('type') != 'Pretrained' or init_cfg.keys() != {'type', 'checkpoint'}):
            raise UserError(
                f'{self.name}: init_cfg={init_cfg!r}: takes type Pretrained and checkpoint only\nOmit the rest.'
            )
        require(self.package, self.name)
        self.options = {**kwargs, self.channels_argument: in_channels}
        with explain_errors(self.name, 'Choose another network, or correct the arguments.'):
            key = repr((self.name, sorted(self.options.items()), self.out_indices))
            self.probe = _PROBES[key] = _PROBES.get(key) or self._probe(in_channels)
            self.options = self.probe.options
            maps = [choose_maps(self.probe.strides)[i] for i in self.out_indices]
            self.net: Any = self._build(sorted(set(maps)))
        self.maps = [sorted(set(maps)).index(i) for i in maps]
        #: Channels and stride of each map, as in timm.
        self.feature_info = [
            dict(num_chs=self.probe.channels[i], reduction=STRIDES[j] if rescale else self.probe.strides[i])
            for i, j in zip(maps, self.out_indices, strict=True)
        ]
        self.neck = nn.ModuleList(
            Rescale(info['num_chs'], self.probe.strides[i], info['reduction'])
            for i, info in zip(maps, self.feature_info, strict=True)
        )
        #: Parameters that the library creates and that change no feature map. They are frozen, which DDP needs.
        self.unused = [name for name, _ in self.net.named_parameters() if name not in self.probe.used]
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name in self.probe.used)

    @property
    def library(self) -> Any:
        return import_module(self.package)  # a module as an attribute could not be copied

    @torch.enable_grad()
    def _probe(self, in_channels: int) -> _Probe:
        """Run the network as :func:`run_on_meta` does."""

        def run() -> tuple:
            count, size, depths = self._describe()
            size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
            net = self._build(list(range(count))).eval()
            return net, size, depths, *_try_sizes(net, in_channels, size)

        net, size, depths, maps, strides, multiple = run_on_meta(run)
        chosen = choose_maps(strides)
        named = dict(net.named_parameters())
        total: Any = sum(maps[chosen[i]].sum() for i in self.out_indices)
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        used = frozenset(key for key, gradient in zip(named, gradients, strict=True) if gradient is not None)
        return _Probe(self.options, [x.shape[1] for x in maps], strides, multiple, size, used, depths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of images ``(N, C, H, W)``.

        Raises:
            UserError: If the images are larger than the network can process.
        """
        (height, width), size = x.shape[-2:], self.probe.size
        if self.probe.multiple is None and (height > size[0] or width > size[1]):
            raise UserError(
                f'{self.name}: position embeddings are for {size[0]}x{size[1]} images, not for {height}x{width}\n'
                f'Set img_size={(height, width)} of the backbone, or test in windows of this size (test_cfg.mode).'
            )
        rows, columns = ((m - n % m) % m for n, m in zip((height, width), self.probe.multiple or size, strict=True))
        maps = _feature_maps(self.net, F.pad(x, (0, columns, 0, rows)) if rows or columns else x)
        strides = [info['reduction'] for info in self.feature_info]
        return tuple(
            neck(maps[i])[..., : (height + s - 1) // s, : (width + s - 1) // s].contiguous()
            for neck, i, s in zip(self.neck, self.maps, strides, strict=True)
        )

    def init_weights(self) -> None:
        """Load pretrained weights. The library has initialized the network at random."""
        if self.unused:
            print_log(f'{self.name}: frozen, since no feature map needs them: {", ".join(self.unused)}', 'current')
        if self.init_cfg:
            self.load_checkpoint(self.init_cfg['checkpoint'])
        elif self.pretrained:
            with explain_errors(f'{self.name}: pretrained weights', 'Without a network, use --pretrained FILE.'):
                self._load(None)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load a file under the library's names, or one of this class; whole or not at all.

        Raises:
            UserError: If the file cannot be read or does not fit.
        """
        loaded: Mapping = read_checkpoint(checkpoint)
        loaded = next((loaded[key] for key in _ENTRIES_OF_FILES if isinstance(loaded.get(key), Mapping)), loaded)
        state = {str(k).removeprefix('module.'): v for k, v in loaded.items() if isinstance(v, Tensor)}
        ours = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith(('backbone.', 'net.'))}
        with explain_errors(f'{checkpoint}: does not fit {self.name}', 'Use the weights of this network.'):
            self.load_state_dict(ours) if ours else self._load(state)


def _feature_maps(net: Any, x: Tensor) -> list[Tensor]:
    """Feature maps ``(N, C, H, W)`` of a network of timm, which may return ``(N, H, W, C)``, or transformers."""
    maps = net(x)
    if str(getattr(net, 'output_fmt', '')).endswith('NHWC'):
        return [m.permute(0, 3, 1, 2) for m in maps]
    return list(getattr(maps, 'feature_maps', maps))


def _try_sizes(net: nn.Module, channels: int, size: tuple[int, int]) -> tuple[list[Tensor], list[int], Any]:
    """Feature maps of a network, their strides, and the multiple to which images must be padded."""
    failed: Exception | None = None
    tries: tuple = (
        ((1, 1), ((103, 133), (448, 480))),
        ((32, 32), ((448, 480),)),
        (size, ((size[0], 2 * size[1]),)),  # windows
        (None, (size,)),  # position embeddings that are not interpolated
    )
    for multiple, shapes in tries:
        try:
            maps = [_feature_maps(net, torch.zeros(1, channels, *shape)) for shape in shapes][-1]
        except Exception as error:  # networks check sizes by any exception
            failed = failed or error
            continue
        strides = [tuple(round(n / m) for n, m in zip(shapes[-1], x.shape[2:], strict=True)) for x in maps]
        if any(rows != columns for rows, columns in strides):
            raise ValueError(f'strides {strides} differ in height and width')
        if multiple == (1, 1) and len(set(strides)) == 1:
            multiple = strides[0]  # whole patches: a network of transformers would leave out the others
        return maps, [rows for rows, _ in strides], multiple
    raise failed or ValueError('processes no images')


@MODELS.register_module()
class TimmBackbone(_Adapter):
    """A network of timm with ``features_only``; :func:`choose_maps` and :class:`Rescale` give strides 4, 8, 16, 32.

    Images of any size are accepted where the network can: position embeddings are interpolated, and images are padded
    to whole patches and windows.

    Args:
        model_name: In timm, such as ``'resnet50.a1_in1k'``.
        pretrained: Load timm's weights.
        in_channels: Of the images.
        out_indices: Of the four maps, those that are returned.
        rescale: False returns the maps at the network's own strides, without the layers of :class:`Rescale`.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` loads a file under timm's names.
        **kwargs: Arguments of ``timm.create_model``, such as ``drop_path_rate``. ``img_size`` is for networks that
            process one size only; timm interpolates pretrained position embeddings to it.

    Raises:
        UserError: If timm is not installed, has no feature maps of such a network, or rejects an argument.
    """

    package, channels_argument = 'timm', 'in_chans'

    @classmethod
    def accepts(cls, model_name: str, argument: str) -> bool:
        """Whether the network has an argument, such as ``drop_path_rate``."""
        network = run_on_meta(lambda: require('timm', model_name).create_model(model_name))
        return argument in inspect.signature(type(network).__init__).parameters

    def _describe(self) -> tuple[int, Any, dict[str, int]]:
        from timm.models import group_parameters

        base = self.library.create_model(self.model_name, **self.options)
        accepted = inspect.signature(type(base).__init__).parameters
        flags = dict(dynamic_img_size=True, dynamic_img_pad=True, strict_img_size=False)
        self.options = {**{key: flag for key, flag in flags.items() if key in accepted}, **self.options}
        layers = group_parameters(base, base.group_matcher(coarse=False), reverse=True)
        size = self.options.get('img_size') or base.pretrained_cfg.get('input_size') or 224
        return len(base.feature_info), size, {_flat(name): layer for name, layer in layers.items()}

    def _build(self, indices: list[int]) -> nn.Module:
        return self.library.create_model(self.model_name, features_only=True, out_indices=indices, **self.options)

    def _load(self, state: dict[str, Tensor] | None) -> None:
        """Let timm load the whole classifier, which it does strictly, and copy what is in ``net``."""
        overlay = {} if state is None else {'pretrained_cfg_overlay': dict(state_dict=efficientnet_to_timm(state))}
        whole = self.library.create_model(self.model_name, pretrained=True, **overlay, **self.options)
        weights = {_flat(key): value for key, value in whole.state_dict().items()}
        self.net.load_state_dict({key: weights[_flat(key)] for key in self.net.state_dict()})

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer id of a parameter and the number of ids; the groups are timm's (``group_matcher``).

        Raises:
            ValueError: If the network has no such parameter.
        """
        depths, key = self.probe.depths, name.removeprefix(prefix)
        count = max(depths.values()) + 1
        if not name.startswith(prefix) or key.startswith('neck.'):
            return count - 1, count
        if (flat := _flat(key.removeprefix('net.'))) not in depths:
            raise ValueError(f'{self.name} has no parameter {key!r}')
        return depths[flat], count


def _flat(name: str) -> str:
    """The name of a weight, with and without ``features_only``: timm then replaces some of the dots."""
    return name.removeprefix('model.').replace('.', '_')


@MODELS.register_module()
class HFBackbone(_Adapter):
    """An ``AutoBackbone`` of transformers; :func:`choose_maps` and :class:`Rescale` give strides 4, 8, 16, 32.

    Arguments and errors are those of :class:`TimmBackbone`, except for

    Args:
        model_name: Model type such as ``'dinov2'``, local folder, or name on the hub.
        **kwargs: Fields of the network's config, such as ``drop_path_rate``.
    """

    package, channels_argument = 'transformers', 'num_channels'

    def _describe(self) -> tuple[int, Any, dict[str, int]]:
        config = self._config()
        return len(_stages(config)), getattr(config, 'image_size', None) or 224, {}

    @classmethod
    def accepts(cls, model_name: str, argument: str) -> bool:
        """Whether the network's config has a field, such as ``drop_path_rate``."""
        return hasattr(_hf_config(model_name), argument)

    def _config(self) -> Any:
        config = _hf_config(self.model_name, **self.options)
        for field, value in vars(config).items():
            if isinstance(value, tuple):  # defaults of some types, which their own networks reject
                setattr(config, field, list(value))
        return config

    def _build(self, indices: list[int]) -> nn.Module:
        config = self._config()
        config.out_features = [_stages(config)[i] for i in indices]
        return self.library.AutoBackbone.from_config(config)

    def _load(self, state: dict[str, Tensor] | None) -> None:
        source = self.model_name if state is None else None
        load = type(self.net).from_pretrained
        whole, report = load(source, state_dict=state, config=self.net.config, output_loading_info=True)
        own = {key.partition('.')[0] for key in self.net.state_dict()}
        wrong = [key for key in report['missing_keys'] if not key.startswith(_OUTPUT_NORMS)]
        wrong += [key for key in report['unexpected_keys'] if own & set(key.split('.')[:2])]
        wrong += [key for key, *_ in report['mismatched_keys']]
        if wrong:
            raise ValueError(f'missing, unexpected or of another shape: {format_list(sorted(wrong), 5)}')
        self.net.load_state_dict(whole.state_dict())


def _hf_config(model_name: str, **fields: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    read = AutoConfig.for_model if model_name in CONFIG_MAPPING else AutoConfig.from_pretrained
    return read(model_name, **fields)


def _stages(config: Any) -> list[str]:
    return [name for name in config.stage_names if name != 'stem']


def _timm_entry(name: str) -> CatalogueEntry:
    timm, model_name = require('timm', name), name.partition('/')[2]
    base, _, tag = model_name.partition('.')
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models()) or 'timm.list_models() shows all names.'
        raise UserError(f'{name}: timm has no such network\n{hint}')
    with explain_errors(name, f"timm.list_pretrained('{base}*') shows all tags."):
        cfg = timm.get_pretrained_cfg(model_name, allow_unregistered=False)
    tag = tag or cfg.tag or ''
    licence = next((known for known in PERMISSIVE if known.lower() == cfg.license), cfg.license)
    weights = Weights(tag, tag or 'unknown', licence=licence, arguments=dict(pretrained=True))
    return CatalogueEntry(
        name=f'timm/{base}',
        config=dict(type='replk_mm.TimmBackbone', model_name=f'{base}.{tag}'.rstrip('.')),
        source='timm, github.com/huggingface/pytorch-image-models',
        licence='Apache-2.0',
        weights=(weights,) if cfg.has_weights else (),
        mean=tuple(255 * x for x in cfg.mean),
        std=tuple(255 * x for x in cfg.std),
    )


def _hf_entry(name: str) -> CatalogueEntry:
    transformers, model_name = require('transformers', name), name.partition('/')[2]
    processor: dict[str, Any] = {}
    weights: tuple[Weights, ...] = ()
    if model_name not in transformers.CONFIG_MAPPING:
        if '/' not in model_name and not Path(model_name).is_dir():
            hint = did_you_mean(model_name, transformers.CONFIG_MAPPING)
            raise UserError(f'{name}: no such model type or folder\n{hint}Names on the hub are OWNER/NAME.')
        from transformers.models.auto.image_processing_auto import get_image_processor_config

        weights = (Weights('', model_name, arguments=dict(pretrained=True)),)
        with explain_errors(name, 'Use a model type, a local folder, or a name on the hub where there is a network.'):
            processor = get_image_processor_config(model_name)
    scale = 1 / (processor.get('rescale_factor') or 1 / 255)
    mean, std = (tuple(scale * x for x in processor.get(f'image_{key}') or ()) for key in ('mean', 'std'))
    return CatalogueEntry(
        name=name,
        config=dict(type='replk_mm.HFBackbone', model_name=model_name),
        source='transformers, github.com/huggingface/transformers',
        licence='Apache-2.0',
        weights=weights,
        bgr=bool(processor.get('do_flip_channel_order')),
        mean=mean or IMAGENET[0],
        std=std or IMAGENET[1],
    )


def _openmmlab_entry(name: str) -> CatalogueEntry:
    """``mmseg.MixVisionTransformer``, or with arguments ``mmdet.ResNet(depth=50)``."""
    library = name.partition('.')[0]
    require(library, name)
    kind, _, arguments = name.partition('(')
    with explain_errors(name, f'Write {kind}(argument=value, ...).'):
        call: Any = ast.parse(f'f({arguments or ")"}', mode='eval').body
        config = {'type': kind, **{word.arg: ast.literal_eval(word.value) for word in call.keywords}}
    cls = MODELS.get(kind)
    if cls is None:
        raise UserError(f'{name}: {library} has no such backbone\nUse the name of a registered class.')
    parameters = inspect.signature(cls).parameters.values()
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL and p.name not in config
    ]
    if missing:
        raise UserError(f'{name}: needs {", ".join(missing)}\nWrite {kind}({missing[0]}=...), in quotes.')
    return CatalogueEntry(name=name, config=config, source=library, licence='Apache-2.0')


ADAPTERS.update(timm=_timm_entry, hf=_hf_entry, mmseg=_openmmlab_entry, mmdet=_openmmlab_entry)
ADAPTERS.update(mmpretrain=_openmmlab_entry)
