"""The network as its authors' code runs it: torch's own depthwise convolution, in the default memory layout."""

import copy
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope

from replk_mm.backbones.layers import Backbone, LayerNorm2d
from replk_mm.deploy.reparameterize import Changes, reparameterize
from replk_mm.engine.config import build_model
from replk_mm.engine.explain import explaining
from replk_mm.engine.inference import load_model
from replk_mm.errors import UserError
from replk_mm.ops import DepthwiseConv2d, pack
from replk_mm.registry import SCOPE

#: Names of the networks.
PLAIN, PLAIN_TRAINING, OURS = 'plain torch', 'plain torch, training form', 'ours'


def build_networks(
    cfg: Config, whole: bool, form: str, checkpoint: str | None = None, seed: int = 0
) -> tuple[dict[str, nn.Module], Changes | None]:
    """The same network several times, with the same weights.

    Args:
        cfg: The config, fitted to this machine.
        whole: The segmentor or detector, rather than its backbone.
        form: ``'training'``, or ``'reparameterized'``: kernels merged and BatchNorm folded, in every network except
            :data:`PLAIN_TRAINING`.
        checkpoint: Weights; None for random ones, including random statistics of BatchNorm.
        seed: Of random weights.

    Returns:
        :data:`PLAIN` (the reference), :data:`PLAIN_TRAINING` if that is another network, and :data:`OURS`; and the
        changes of the reparameterization.

    Raises:
        UserError: If the config has no such network, or the checkpoint does not fit or has no training form.
    """
    torch.manual_seed(seed)
    ours = _build(cfg, cfg.model, whole)
    plain = _build(cfg, _of_the_libraries(cfg.model, cfg.get('default_scope', 'mmengine')), whole)
    if checkpoint:
        meta = load_model(ours, checkpoint)[1]
        load_model(plain, checkpoint)
        if form == 'training' and meta.get(SCOPE, {}).get('reparameterized'):
            raise UserError(
                f'{checkpoint}: is reparameterized; it has no training form\n'
                f'Use --mode inference --form reparameterized, or the checkpoint that training wrote.'
            )
    else:
        randomize_constants(ours, seed)
        plain.load_state_dict(ours.state_dict())
    found, changes = {PLAIN: plain, OURS: ours}, None
    if form == 'reparameterized':
        before = copy.deepcopy(plain)
        changes = reparameterize(ours, inplace=True)[1]
        reparameterize(plain, inplace=True)
        if changes.merged or changes.folded:
            found = {PLAIN: plain, PLAIN_TRAINING: use_plain_torch(before), OURS: ours}
    use_plain_torch(plain)
    pack(ours)  # as for evaluation
    return found, changes


def _build(cfg: Config, model: ConfigDict, whole: bool) -> nn.Module:
    part = Config(
        dict(model=copy.deepcopy(model), default_scope=cfg.get('default_scope', 'mmengine')), filename=cfg.filename
    )
    backbone = part.model.get('backbone')
    if not backbone:
        raise UserError(f'{cfg.filename}: model {part.model.get("type")} has no backbone')
    backbone.pop('init_cfg', None)
    if whole:
        return build_model(part)
    init_default_scope(part.default_scope)
    with explaining(part, 'model'):
        return MODELS.build(part.model.backbone)


def _of_the_libraries(model: Any, scope: str) -> Any:
    """``model`` with the libraries' own heads instead of our faster ones of the same names and weights."""
    if isinstance(model, (list, tuple)):
        return [_of_the_libraries(part, scope) for part in model]
    if not isinstance(model, dict):
        return model
    new = ConfigDict(
        {key: value if key == 'backbone' else _of_the_libraries(value, scope) for key, value in model.items()}
    )
    prefix, _, name = str(new.get('type', '')).rpartition('.')
    if prefix == SCOPE and MODELS.get(f'{scope}.{name}') is not None:
        new['type'] = f'{scope}.{name}'
    return new


def use_plain_torch(net: nn.Module) -> nn.Module:
    """Make ``net`` run torch's own depthwise convolutions in torch's default memory layout, in place.

    Norms over channels also return the default layout, as mmpretrain's do: ours otherwise return channels-last memory,
    and torch's convolutions keep the layout of their input.
    """
    swapped: dict[int, nn.Conv2d] = {}
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DepthwiseConv2d):
                module._modules[name] = swapped.setdefault(id(child), _plain_convolution(child))
        if type(module) is nn.Conv2d:
            module.__class__ = PlainConv2d
        elif isinstance(module, Backbone):
            module.channels_last = False
            for part in module.modules():
                if isinstance(part, nn.ReLU):
                    part.inplace = False  # as in the authors' code
        elif isinstance(module, LayerNorm2d):
            module.register_forward_hook(lambda module, args, output: output.contiguous())
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()
    return net


class PlainConv2d(nn.Conv2d):
    """torch's convolution, which our blocks do not compute together with what follows it."""


def _plain_convolution(conv: Any) -> nn.Conv2d:
    new: Any = PlainConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        device='meta',
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)


@torch.no_grad()
def randomize_constants(net: nn.Module, seed: int = 0) -> None:
    """Draw what starts as a constant: statistics and affine parameters of norms, layer scales.

    A norm that is the identity, or a block scaled by 1e-6, would hide errors in it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        if values.dim() != 1 or not values.is_floating_point() or values.unique().numel() > 1:
            continue
        noise = 0.3 * torch.randn(values.shape, generator=generator)
        scales = name.endswith(('weight', 'gamma', 'running_var'))
        values.copy_((1 + noise.clamp(-0.9, 2)) if scales else noise)
