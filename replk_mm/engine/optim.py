"""Optimizers: bfloat16 on CPUs, and layer-wise learning-rate decay."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from torch.nn.modules.conv import _ConvNd

from replk_mm.errors import UserError, did_you_mean
from replk_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from replk_mm.wrappers import named_unwrapped_parameters, unwrap_model


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Run forward passes under CPU autocast to bfloat16. mmengine's ``AmpOptimWrapper`` rejects CPUs.

    bfloat16 has the range of float32, so the loss needs no scaling.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


FIELD = 'optim_wrapper.paramwise_cfg'
#: Backbone method that gives depths, by ``decay_type``.
DEPTHS = {'layer_wise': 'get_layer_depth', 'stage_wise': 'get_stage_depth'}
MULTIPLIERS = ('bias_lr_mult', 'norm_decay_mult', 'bias_decay_mult', 'dwconv_decay_mult', 'flat_decay_mult')
FIELDS = ('decay_rate', 'decay_type', 'num_layers', *MULTIPLIERS, 'custom_keys', 'bypass_duplicate')
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
#: Embeddings and tokens, by the last part of their name. They have no weight decay.
EMBEDDINGS = ('pos_embed', 'cls_token', 'mask_token')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay: group parameters by their depth in ``model.backbone``.

    A parameter of layer ``i`` learns at ``lr * decay_rate ** (num_layers + 1 - i)``: layer 0 is the stem, ``num_layers
    + 1`` everything outside the backbone and the norms of its output features. Parameters of one dimension, biases, and
    position embeddings and tokens have no weight decay. Frozen parameters are in no group.

    Wrappers of the model or of its modules, such as DDP, ``fully_shard`` and ``torch.compile``, change nothing.

    For ConvNeXt, groups, their order, rates and weight decays are those of mmdet's and mmseg's
    ``LearningRateDecayOptimizerConstructor``, so that their runs can be resumed. Unlike theirs, a ``num_layers`` below
    the network's, parameters of the backbone without a depth, and other values of ``decay_type`` are rejected; position
    embeddings and tokens are recognised inside the backbone too.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its ``optimizer`` has ``lr`` and ``weight_decay``.
        paramwise_cfg: A dict with

            - ``decay_rate``: factor from one layer to the one before it, above 0, 1 at most.
            - ``decay_type``: ``'layer_wise'`` (default) uses the backbone's ``get_layer_depth(name, prefix)``,
              ``'stage_wise'`` its ``get_stage_depth(name, prefix)``; both return an id and the number of ids.
            - ``num_layers``: layers without the stem and the heads; by default as many as the backbone has layers or
              stages. It may be larger, as in published recipes: then all stages are as many steps further from the
              full rate; layer-wise, the last stage is not.
            - ``norm_decay_mult``, ``bias_decay_mult``, ``dwconv_decay_mult``, ``flat_decay_mult``: factors of the
              weight decay of norms, biases, depthwise convolutions and parameters of one dimension; the first that fits
              replaces the rule above. ``bias_lr_mult``: factor of the rate of biases other than those of norms.
            - ``custom_keys``: parts of names to ``dict(lr_mult=..., decay_mult=...)``; the longest part that a name has
              counts. ``lr_mult`` multiplies the layer's rate, ``decay_mult`` replaces the rules for weight decay.
            - ``bypass_duplicate``: a parameter of several names has the settings of the first one. Defaults to False,
              which rejects such a parameter where they differ.

    Raises:
        UserError: If a field is unknown, missing or out of its range, ``model`` has no backbone, or the backbone has no
            depth for one of its parameters.
    """

    optimizer_cfg: dict
    paramwise_cfg: dict[str, Any]
    custom: dict[str, dict]

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        rate: Any = cfg.get('decay_rate')
        kind, layers = cfg.get('decay_type', 'layer_wise'), cfg.get('num_layers')
        _check_fields(FIELD, cfg, FIELDS)
        numbers = {f'optim_wrapper.optimizer.{key}': self.optimizer_cfg.get(key) for key in ('lr', 'weight_decay')}
        numbers |= {f'{FIELD}.{key}': cfg[key] for key in MULTIPLIERS if key in cfg}
        for key, factors in cfg.get('custom_keys', {}).items():
            _check_fields(f'{FIELD}.custom_keys[{key!r}]', factors, ('lr_mult', 'decay_mult'))
            numbers |= {f'{FIELD}.custom_keys[{key!r}].{field}': factor for field, factor in factors.items()}
        for name, value in numbers.items():
            if not _is_number(value):
                raise UserError(f'{name}={value!r}: must be a number\nUse 0 for none.')
        if not _is_number(rate) or not 0 < rate <= 1:
            raise UserError(
                f'{FIELD}.decay_rate={rate!r}: must be above 0 and at most 1\n'
                f'It is the factor between adjacent layers, such as 0.9.'
            )
        if kind not in DEPTHS:
            raise UserError(f'{FIELD}.decay_type={kind!r}: is unknown\nUse one of: {", ".join(DEPTHS)}.')
        if layers is not None and (type(layers) is not int or layers < 1):
            raise UserError(
                f'{FIELD}.num_layers={layers!r}: must be a positive integer\n'
                f'Omit it to use the number of layers of the backbone.'
            )
        # Longest first, as mmengine does.
        self.custom = dict(sorted(cfg.get('custom_keys', {}).items(), key=lambda item: (-len(item[0]), item[0])))

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Add the groups of the whole model, in the order of its parameters.

        Args:
            params: Extended in place.
            module: The model.
            **kwargs: Arguments of mmengine's recursion; unused.
        """
        named = list(named_unwrapped_parameters(module))
        names = [name for name, *_ in named]
        matrices = [name for name, _, owner in named if isinstance(owner, (nn.Linear, _ConvNd)) and '.weight' in name]
        hidden = [name for name, p, _ in named if '_flat_param' in name or p.ndim == 1 and name in matrices]
        layer_of, num_layers = ({}, 0) if hidden else self._layers(module)
        hidden += set(layer_of).difference(names)
        if hidden:
            raise UserError(
                f'{hidden[0]}: {type(module).__name__} hides the layer or the shape of this parameter\n'
                f'Use a wrapper that keeps them, such as fully_shard instead of FSDP.'
            )
        first: dict[int, tuple[str, tuple]] = {}
        groups: dict[tuple, dict[str, Any]] = {}
        for name, param, owner in named:
            if not param.requires_grad:
                continue
            layer = layer_of.get(name, num_layers + 1)
            scale = self.paramwise_cfg['decay_rate'] ** (num_layers + 1 - layer)
            lr_mult, decay_mult = self._multipliers(name, param, owner)
            # Name and factor as in mmdet and mmseg.
            key = (f'layer_{layer}_{"decay" if decay_mult else "no_decay"}', scale * lr_mult, decay_mult)
            if id(param) in first:
                other, its_key = first[id(param)]
                if key != its_key and not self.paramwise_cfg.get('bypass_duplicate', False):
                    raise UserError(
                        f'{FIELD}: {other} and {name} share one parameter, but have different rates or '
                        f'weight decays\nSet bypass_duplicate=True to use those of the first name.'
                    )
                continue
            first[id(param)] = name, key
            group = groups.setdefault(
                key,
                {
                    'params': [],
                    'param_names': [],
                    'group_name': key[0],
                    'lr_scale': key[1],
                    'lr': key[1] * self.base_lr,
                    'weight_decay': decay_mult * self.base_wd,
                },
            )
            group['params'].append(param)
            group['param_names'].append(name)
        self._check_custom_keys(names)
        params.extend(groups.values())

    def _layers(self, model: nn.Module) -> tuple[dict[str, int], int]:
        """The layer of every parameter of the backbone that is trained, and the number of layers."""
        backbone = unwrap_model(getattr(unwrap_model(model), 'backbone', None))
        decay_type = self.paramwise_cfg.get('decay_type', 'layer_wise')
        method, kind = DEPTHS[decay_type], type(backbone).__name__
        if not isinstance(backbone, nn.Module):
            raise UserError(
                f'optim_wrapper.constructor={type(self).__name__!r}: {type(model).__name__} has no '
                f'backbone\n'
                f'Omit the constructor; the whole model then learns at one rate.'
            )
        if not hasattr(backbone, method):
            raise UserError(
                f'model.backbone.type={kind!r}: has no method {method}(name, prefix)\n'
                f'Add it in a subclass, or omit the constructor.'
            )
        depths, own = {}, None
        for name, param, _ in named_unwrapped_parameters(backbone, 'backbone.'):
            if param.requires_grad:
                try:
                    depths[name], count = getattr(backbone, method)(name, 'backbone.')
                except (ValueError, LookupError) as error:
                    raise UserError(
                        f'{name}: {kind}.{method} gives no depth for this parameter: {error}\n'
                        f'Freeze the parameter, or extend {method} in a subclass of {kind}.'
                    ) from error
                own = count - 2
        given = self.paramwise_cfg.get('num_layers')
        if own is None:
            return {}, given or 0
        if given is not None and given < own:
            raise UserError(
                f'{FIELD}.num_layers={given}: this {kind} has {own} {decay_type.split("_")[0]}s\n'
                f'Omit num_layers, or set it to {own} or more.'
            )
        more = (given or own) - own
        # The largest id of the backbone has the full rate; layer-wise, the last stage keeps its distance from it.
        first = own if decay_type == 'layer_wise' else own + 1
        return {name: depth + more * (depth >= first) for name, depth in depths.items()}, own + more

    def _multipliers(self, name: str, param: nn.Parameter, owner: nn.Module) -> tuple[float, float]:
        """Factors of the learning rate of a parameter, in addition to its layer's, and of its weight decay."""
        cfg, leaf = self.paramwise_cfg, name.rpartition('.')[2]
        norm, bias, flat = isinstance(owner, NORMS), leaf == 'bias', param.ndim == 1
        depthwise = isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups
        lr = cfg.get('bias_lr_mult', 1.0) if bias and not norm else 1.0
        decay = 0.0 if flat or bias or leaf in EMBEDDINGS else 1.0
        # In mmengine's order.
        for key, fits in (('norm', norm), ('bias', bias), ('dwconv', depthwise), ('flat', flat)):
            if fits and f'{key}_decay_mult' in cfg:
                decay = cfg[f'{key}_decay_mult']
                break
        custom = next((value for key, value in self.custom.items() if key in name), {})
        return custom.get('lr_mult', lr), custom.get('decay_mult', decay)

    def _check_custom_keys(self, names: list[str]) -> None:
        for key in self.custom:
            if not any(key in name for name in names):
                close = did_you_mean(key, {part for name in names for part in name.split('.')})
                raise UserError(
                    f'{FIELD}.custom_keys[{key!r}]: matches no parameter name\n'
                    f'{close}Examples of names: {names[0]}, {names[-1]}.'
                )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_fields(where: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        raise UserError(f'{where}={given!r}: must be a dict\nIt takes: {", ".join(known)}')
    for key in given:
        if key not in known:
            raise UserError(f'{where}.{key}: no such field\n{did_you_mean(key, known)}It takes: {", ".join(known)}')
