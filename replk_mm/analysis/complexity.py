"""Parameters and multiply-accumulates (MACs) of a network and of its parts.

The published figures come from ``tools/analysis_tools/get_flops.py`` of mmdetection 2.x and mmsegmentation 0.x. Their
``forward_dummy`` selects no boxes: every box head of a two-stage detector takes the same 1000 regions, every mask head
the first 100 of them, and a segmentor ends with its class scores. :func:`forward` runs the same pass. Current versions
of ``get_flops.py`` run on a real image, where the mask heads of a cascade take all 1000 proposals.
"""

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from replk_mm import published
from replk_mm.backbones.catalogue import ShapeOfSamples
from replk_mm.data.datasets import crop_of
from replk_mm.deploy.reparameterize import Changes, reparameterize
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError, explain_errors
from replk_mm.wrappers import input_channels

#: Phases in which a part of a network runs.
INFERENCE, TRAINING, NEVER = 'inference', 'training', 'not run'
#: Name of the remainder that belongs to none of the parts.
WHOLE = '(model)'
#: Number of regions of each box head, and of each mask head.
PROPOSALS, MASK_REGIONS = 1000, 100


@dataclass(frozen=True)
class Part:
    """A part of a network: a child, or an element of one of its lists or of its RoI head."""

    name: str  #: path of the module
    parameters: int
    macs: int  #: multiply-accumulates on one image
    runs: str  #: :data:`INFERENCE`, :data:`TRAINING` for auxiliary heads, or :data:`NEVER`


@dataclass(frozen=True)
class Operator:
    """An operator that counts as zero, because torch has no formula for it."""

    name: str  #: its name in torch
    calls: int  #: number of calls
    elements: int  #: elements of the first output, summed over the calls


@dataclass(frozen=True)
class Complexity:
    """Parameters and MACs of a network."""

    parts: list[Part]  #: in the order of the network
    uncounted: list[Operator]  #: operators of inference without a formula, most elements first
    notes: list[str]  #: assumptions of the count and operations left out, one line each

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def inference_parameters(self) -> int:
        """Parameters without parts that run in training only."""
        return sum(part.parameters for part in self.parts if part.runs != TRAINING)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of inference."""
        return sum(part.macs for part in self.parts if part.runs == INFERENCE)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, training-only heads included."""
    return sum(p.numel() for p in model.parameters())


def count_inference_parameters(model: nn.Module) -> int:
    """Number of parameters without auxiliary heads, which run in training only."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith('auxiliary_head.'))


def count_complexity(model: nn.Module, shape: tuple[int, int], device: str = 'meta') -> Complexity:
    """Count parameters and multiply-accumulates by part, for one image.

    MACs are half of the figure of ``torch.utils.flop_counter``. Convolutions and matrix products count; norms,
    activations, pooling, interpolation and additions (biases included) do not.

    Args:
        model: A segmentor, detector or backbone, on any device; left unchanged.
        shape: Height and width of the image in pixels.
        device: ``'meta'`` (default) computes no values; ``'cpu'`` is for networks on the CPU that need them.

    Raises:
        RuntimeError: If the network cannot take the shape; networks may raise other types too.
    """
    model = on_meta(model) if device == 'meta' else copy.deepcopy(model)
    model.eval()  # mmdet's backbones return None
    inference, training = (_CountedPass(model, shape, run, device) for run in (forward, forward_auxiliary))
    parts, seen = [], set[int]()
    for path, part in _parts(model):
        own = {id(p): p.numel() for p in part.parameters() if id(p) not in seen}
        seen.update(own)
        if inference.uses(path, part):
            parts.append(Part(path, sum(own.values()), inference.macs(path, part), INFERENCE))
        elif training.uses(path, part):
            parts.append(Part(path, sum(own.values()), training.macs(path, part), TRAINING))
        elif own:
            parts.append(Part(path, sum(own.values()), 0, NEVER))
    rest = Part(
        WHOLE,
        count_parameters(model) - sum(part.parameters for part in parts),
        inference.total - sum(part.macs for part in parts if part.runs == INFERENCE),
        INFERENCE,
    )
    return Complexity([rest, *parts] if rest.parameters or rest.macs else parts, inference.uncounted(), inference.notes)


def on_meta(model: nn.Module) -> Any:
    """A copy in evaluation mode whose parameters and buffers are on the meta device."""
    twins: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = torch.empty_like(tensor, device='meta')
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    model = copy.deepcopy(model, twins)
    model.eval()
    return model


def _parts(owner: nn.Module, prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    for name, child in owner.named_children():
        if isinstance(child, nn.ModuleList) or name == 'roi_head':
            yield from _parts(child, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', child


class LinearClassifier(nn.Module):
    """A backbone, global average pooling and a linear layer: mmpretrain's classifier without mmpretrain.

    Args:
        backbone: Returns feature maps, or pooled features.
        head: Takes the features of its last stage.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        x = self.backbone(image)[-1]
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


class ForwardPass(nn.Module):
    """Runs a function of a model and an image as a forward pass, so that all module names have the same prefix."""

    def __init__(self, model: nn.Module, run: Callable[[Any, Tensor], list[str]]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, image: Tensor) -> list[str]:
        return self.run(self.model, image)


class _CountedPass(ShapeOfSamples):
    """One pass: the flops of each module, the called modules, and all other operators."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, int], run: Callable[[Any, Tensor], list[str]], device: str
    ) -> None:
        super().__init__()
        self._called: set[nn.Module] = set()
        self._operators: dict[Any, list[int]] = {}
        self._counter = FlopCounterMode(display=False)
        hook = register_module_forward_pre_hook(lambda module, args: self._called.add(module))
        try:
            with torch.device(device), torch.no_grad(), self, self._counter:
                self.notes = ForwardPass(model, run)(torch.zeros(1, input_channels(model), *shape))
        finally:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        takes_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        # torch 2.15 reshapes the output of a linear layer with _unsafe_view.
        is_view = func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view
        if takes_tensors and not is_view:  # neither creates nor reinterprets a tensor
            # Further outputs are for the backward pass.
            elements = next((leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), 0)
            self._operators.setdefault(func.overloadpacket, []).append(elements)
        return out

    def macs(self, path: str, part: nn.Module) -> int:
        """Multiply-accumulates of a part with all modules in it."""
        flops = self._counter.get_flop_counts().get(f'ForwardPass.model.{path}')
        if flops is None:  # detectors call methods of a head other than forward
            return sum(self.macs(f'{path}.{name}', child) for name, child in part.named_children())
        return sum(flops.values()) // 2

    @property
    def total(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return self._counter.get_total_flops() // 2

    def uses(self, path: str, part: nn.Module) -> bool:
        """Whether a part computes something; some modules are called without effect."""
        weighted = (module for module in part.modules() if next(module.parameters(recurse=False), None) is not None)
        return self.macs(path, part) > 0 or not self._called.isdisjoint(weighted)

    def uncounted(self) -> list[Operator]:
        """Operators without a formula."""
        operators = [
            Operator(str(packet), len(elements), sum(elements))
            for packet, elements in self._operators.items()
            if packet not in self._counter.flop_registry
        ]
        return sorted(operators, key=lambda operator: (-operator.elements, operator.name))


def forward(model: Any, image: Tensor) -> list[str]:
    """Run the part of inference that does not depend on pixel values.

    Args:
        model: A segmentor, detector or backbone on the meta device; its RoI extractors are replaced.
        image: ``(1, 3, H, W)``.

    Returns:
        Assumptions and operations left out, one line each.
    """
    if isinstance(getattr(model, 'roi_head', None), nn.Module):
        return _two_stages(model, image)
    if 'data_samples' not in inspect.signature(model.forward).parameters:
        model(image)
        return []
    size = tuple(image.shape[2:])
    model(
        image,
        [
            BaseDataElement(
                metainfo=dict(
                    img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0)
                )
            )
        ],
    )
    if hasattr(model, 'decode_head'):
        return [
            'not run: resizing the class scores to the image and the argmax; sliding windows and scales of a test '
            'recipe multiply the whole'
        ]
    return ['not run: decoding of boxes and non-maximum suppression (NMS)'] if hasattr(model, 'bbox_head') else []


def forward_auxiliary(model: Any, image: Tensor) -> list[str]:
    """Run a segmentor's auxiliary heads, which run in training only."""
    head = getattr(model, 'auxiliary_head', None)
    if isinstance(head, nn.Module):
        features = model.extract_feat(image)
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            part(features)
    return []


def _two_stages(model: Any, image: Tensor) -> list[str]:
    cut: Counter[tuple[int, int, int]] = Counter()
    for module in model.modules():
        if hasattr(module, 'roi_layers') and hasattr(module, 'out_channels'):
            module.forward = partial(_regions, module, cut)
    features = model.extract_feat(image)
    for name in ('rpn_head', 'semantic_head'):
        if isinstance(getattr(model, name, None), nn.Module):
            getattr(model, name)(features)
    head, boxes = model.roi_head, torch.zeros(PROPOSALS, 5, device=image.device)
    stages: list[tuple[int, ...]] = [(i,) for i in range(getattr(head, 'num_stages', 0))] or [()]
    for stage in stages if head.with_bbox else []:
        head._bbox_forward(*stage, features, boxes)
    for stage in stages if head.with_mask else []:
        head._mask_forward(*stage, features, boxes[:MASK_REGIONS])
    sizes = ', '.join(
        f'{times} x {regions} regions of {height}x{width}' for (regions, height, width), times in cut.items()
    )
    masks, pasting = (f', every mask head {MASK_REGIONS}', ', pasting of masks') if head.with_mask else ('', '')
    return [
        f'regions: every box head takes {PROPOSALS}{masks}',
        f'not run: RoIAlign ({sizes}), decoding of boxes and non-maximum suppression (NMS){pasting}',
    ]


def _regions(extractor: Any, cut: Counter, features: tuple[Tensor, ...], regions: Tensor, *_: object) -> Tensor:
    """A tensor of the shape that an RoI extractor returns: ``(regions, channels, height, width)``."""
    size = extractor.roi_layers[0].output_size
    height, width = (size, size) if isinstance(size, int) else size
    cut[len(regions), height, width] += 1
    return torch.empty(len(regions), extractor.out_channels, height, width, device=features[0].device)


#: Libraries whose versions may change a count.
_LIBRARIES = ('torch', 'mmengine', 'mmcv', 'mmcv-lite', 'mmsegmentation', 'mmdet')


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
    if named := cfg.get('catalogue', {}).get('backbone'):
        config = f'{config} --backbone {named}'
    try:
        return count_model(build_on_meta(cfg), config, size, source)
    except UserError as error:
        if 'meta' not in str(error).lower():
            raise
    found = count_model(build_model(cfg), config, size, source)
    found.training.notes.append('computed with random weights, since the network reads the values of tensors')
    return found


def count_model(model: nn.Module, config: str, shape: tuple[int, int], shape_from: str) -> ConfigComplexity:
    """Count a network built from ``config``, on the meta device or the CPU.

    Raises:
        UserError: If the network cannot take the size, or on the meta device needs the values of tensors.
    """
    device = next(model.parameters()).device.type
    with torch.device(device):
        merged, changes = reparameterize(model)
    failing = explain_errors(
        f'{config}: {type(model).__name__} cannot be counted at 1x{input_channels(model)}x{shape[0]}x{shape[1]}',
        'Try another --shape.',
    )
    with warnings.catch_warnings(), failing:
        warnings.simplefilter('ignore')
        training, deployed = (count_complexity(form, shape, device) for form in (model, merged))
    return ConfigComplexity(config, shape, shape_from, training, deployed, str(changes))


def build_on_meta(cfg: Config) -> Any:
    """Build the config's model on the meta device, without weights; a linear classifier also without mmpretrain."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the libraries' warnings concern training
        backbone: Any = cfg.model.get('backbone') or {}
        head: Any = cfg.model.get('head') or {}
        if head.get('type') == 'LinearClsHead' and str(backbone.get('type')).startswith('replk_mm.'):
            built = build_model(Config(dict(model=backbone), filename=cfg.filename), 'meta')
            return LinearClassifier(built, nn.Linear(head.in_channels, head.num_classes, device='meta'))
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
    if row and row.input:
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
