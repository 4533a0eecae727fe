"""Learning rates that fall from the heads to the image, layer by layer or stage by stage of the backbone.

Introduced for fine-tuning by BEiT (arXiv:2106.08254) and used by ConvNeXt (arXiv:2201.03545) for its published results:
layer-wise in detection, stage-wise in segmentation. RepLKNet was trained without; :mod:`replk_mm.models.depth` says how its
blocks are grouped. Which parameters share a rate is the backbone's knowledge, never a table of names here.
"""
import difflib
from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from torch.optim import Optimizer

from replk_mm.errors import UserError
from replk_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

NAME = 'LayerDecayOptimizerConstructor'
FIELD = 'optim_wrapper.paramwise_cfg'
#: What a backbone is asked for each kind of decay.
DEPTHS = {'layer_wise': 'get_layer_depth', 'stage_wise': 'get_stage_depth'}
MULTIPLIERS = ('bias_lr_mult', 'norm_decay_mult', 'bias_decay_mult', 'dwconv_decay_mult', 'flat_decay_mult')
FIELDS = ('decay_rate', 'decay_type', 'num_layers', *MULTIPLIERS, 'custom_keys', 'bypass_duplicate')
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
#: Parameters of other families that are no weights of a layer, by the last part of their name.
EMBEDDINGS = ('pos_embed', 'cls_token', 'mask_token')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Group parameters by their depth in ``model.backbone``; the learning rate falls by a factor with each group.

    A parameter of layer ``i`` learns at ``lr * decay_rate ** (num_layers + 1 - i)``: layer 0 is the stem, ``num_layers + 1``
    everything outside the backbone and the norms of its output features. Weight decay is taken from parameters of one
    dimension, biases, and position embeddings and tokens. Frozen parameters are in no group.

    For ConvNeXt, groups, their order, rates and weight decays are those of mmdet's and mmseg's
    ``LearningRateDecayOptimizerConstructor``, so that runs of theirs can be resumed, with these exceptions: a layer-wise
    ``num_layers`` that is not the network's is refused (theirs leave a gap, or give rates above ``lr``), and so are
    parameters of the backbone that have no depth (theirs have the full rate there) and other values of ``decay_type``;
    position embeddings and tokens are recognised inside the backbone too.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its ``optimizer`` has ``lr`` and ``weight_decay``.
        paramwise_cfg: A dict with

            - ``decay_rate``: factor from one layer to the one before it, above 0, 1 at most.
            - ``decay_type``: ``'layer_wise'`` (default) asks the backbone's ``get_layer_depth(name, prefix)``,
              ``'stage_wise'`` its ``get_stage_depth(name, prefix)``; both return an id and the number of ids.
            - ``num_layers``: layers without the stem and the heads; by default as many as the backbone has layers or
              stages. Stage-wise it may be larger, as in the published recipes: then the last stage is as many steps
              further from the full rate.
            - ``norm_decay_mult``, ``bias_decay_mult``, ``dwconv_decay_mult``, ``flat_decay_mult``: factors of the weight
              decay of norms, biases, depthwise convolutions and parameters of one dimension; the first that fits
              replaces the rule above. ``bias_lr_mult``: factor of the rate of biases that are not a norm's.
            - ``custom_keys``: parts of names to ``dict(lr_mult=..., decay_mult=...)``; the longest part that a name has
              counts. ``lr_mult`` comes on top of the layer's rate, ``decay_mult`` replaces the rules for weight decay;
              what is not given stays as it is without the key.
            - ``bypass_duplicate``: let a parameter of several names have the settings of the first one. Defaults to
              False, which refuses it where they differ.

    Raises:
        UserError: If a field is unknown, missing or out of its range, ``model`` has no backbone, or this tells no depth for
            a parameter of it; when an optimizer state is loaded, if its groups hold other parameters.
    """

    optimizer_cfg: dict
    paramwise_cfg: dict[str, Any]

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        if not isinstance(cfg, dict):
            raise UserError(f'{FIELD}={cfg!r}: must be a dict\nIt takes: {", ".join(FIELDS)}')
        for key in cfg:
            _check_known(key, FIELDS, FIELD)
        for key in ('lr', 'weight_decay'):
            if not _is_number(self.optimizer_cfg.get(key)):
                raise UserError(f'optim_wrapper.optimizer.{key}={self.optimizer_cfg.get(key)!r}: {NAME} needs a number\n'
                                f'Add it to the config; weight_decay=0 for none.')
        rate: Any = cfg.get('decay_rate')
        kind, layers = cfg.get('decay_type', 'layer_wise'), cfg.get('num_layers')
        if not _is_number(rate) or not 0 < rate <= 1:
            raise UserError(f'{FIELD}.decay_rate={rate!r}: must be above 0 and 1 at most\n'
                            f'It is the factor from one layer to the one before it, such as 0.9.')
        if kind not in DEPTHS:
            raise UserError(f'{FIELD}.decay_type={kind!r}: is unknown\nUse one of: {", ".join(DEPTHS)}.')
        if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 1):
            raise UserError(f'{FIELD}.num_layers={layers!r}: must be a whole number\n'
                            f'Leave it out for the number that the backbone has.')
        for key in MULTIPLIERS:
            if key in cfg and not _is_number(cfg[key]):
                raise UserError(f'{FIELD}.{key}={cfg[key]!r}: must be a number\n'
                                f'It is a factor: 0. for none, 1. for all of it.')
        if not isinstance(cfg.get('bypass_duplicate', False), bool):
            raise UserError(f'{FIELD}.bypass_duplicate={cfg["bypass_duplicate"]!r}: must be True or False\n'
                            f'Leave it out for False.')
        self.custom = _custom_keys(cfg.get('custom_keys', {}))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of a model, and what wraps it."""
        wrapper = super().__call__(model)
        wrapper.optimizer.register_load_state_dict_pre_hook(_check_loaded_groups)
        return wrapper

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Add the groups of the whole model, in the order in which its parameters first ask for them.

        Args:
            params: Extended in place.
            module: The model.
            **kwargs: mmengine's own way down the modules, which this constructor does not go.
        """
        layer_of, num_layers = self._layers(module)
        first: dict[int, tuple[str, tuple]] = {}
        groups: dict[tuple, dict[str, Any]] = {}
        for name, param in module.named_parameters(remove_duplicate=False):
            if not param.requires_grad:
                continue
            layer = layer_of.get(name, num_layers + 1)
            scale = self.paramwise_cfg['decay_rate'] ** (num_layers + 1 - layer)
            lr_mult, decay_mult = self._multipliers(name, param, module.get_submodule(name.rpartition('.')[0]))
            # The name and the factor are mmdet's and mmseg's.
            key = (f'layer_{layer}_{"decay" if decay_mult else "no_decay"}', scale * lr_mult, decay_mult)
            if id(param) in first:
                other, its_key = first[id(param)]
                if key != its_key and not self.paramwise_cfg.get('bypass_duplicate', False):
                    raise UserError(f'{FIELD}: {other} and {name} are one parameter, with different rates or weight decays\n'
                                    f'bypass_duplicate=True gives it those of the first name.')
                continue
            first[id(param)] = name, key
            group = groups.setdefault(key, {
                'params': [], 'param_names': [], 'group_name': key[0], 'lr_scale': key[1],
                'lr': key[1] * self.base_lr, 'weight_decay': decay_mult * self.base_wd})
            group['params'].append(param)
            group['param_names'].append(name)
        self._check_custom_keys(module)
        params.extend(groups.values())

    def _layers(self, model: nn.Module) -> tuple[dict[str, int], int]:
        """The layer of every parameter of the backbone that is trained, and the number of layers."""
        backbone, kind = getattr(model, 'backbone', None), self.paramwise_cfg.get('decay_type', 'layer_wise')
        if not isinstance(backbone, nn.Module):
            raise UserError(f'optim_wrapper.constructor={NAME!r}: {type(model).__name__} has no backbone\n'
                            f'Leave the constructor out: all of the model learns at one rate.')
        depths = {name: (depth, count - 2) for name, depth, count in _depths(backbone, DEPTHS[kind])}
        given = self.paramwise_cfg.get('num_layers')
        own = next((layers for _, layers in depths.values()), given or 0)
        num_layers = own if given is None else given
        if num_layers != own and (kind == 'layer_wise' or num_layers < own):
            raise UserError(f'{FIELD}.num_layers={given}: this {type(backbone).__name__} has {own} {kind.split("_")[0]}s\n'
                            f'Leave num_layers out, or set it to {own}' + ('.' if kind == 'layer_wise' else ' or more.'))
        # The ids of the backbone end with the one for the full rate.
        return {name: num_layers + 1 if depth == own + 1 else depth for name, (depth, _) in depths.items()}, num_layers

    def _multipliers(self, name: str, param: nn.Parameter, owner: nn.Module) -> tuple[float, float]:
        """The factors of a parameter's learning rate, on top of its layer's, and of its weight decay."""
        cfg, leaf = self.paramwise_cfg, name.rpartition('.')[2]
        norm, bias, flat = isinstance(owner, NORMS), leaf == 'bias', param.ndim == 1
        depthwise = isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups
        lr = cfg.get('bias_lr_mult', 1.) if bias and not norm else 1.
        decay = 0. if flat or bias or leaf in EMBEDDINGS else 1.
        # mmengine's order.
        for key, fits in (('norm', norm), ('bias', bias), ('dwconv', depthwise), ('flat', flat)):
            if fits and f'{key}_decay_mult' in cfg:
                decay = cfg[f'{key}_decay_mult']
                break
        custom = next((value for key, value in self.custom.items() if key in name), {})
        return custom.get('lr_mult', lr), custom.get('decay_mult', decay)

    def _check_custom_keys(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for key in self.custom:
            if not any(key in name for name in names):
                close = difflib.get_close_matches(key, {part for name in names for part in name.split('.')}, n=1)
                raise UserError(f'{FIELD}.custom_keys[{key!r}]: is part of no parameter name\n'
                                + (f'Did you mean {close[0]}?' if close else f'Names are such as {names[0]}, {names[-1]}.'))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_known(key: str, known: tuple[str, ...], where: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        raise UserError(f'{where}.{key}: {NAME} has no such field\n'
                        + (f'Did you mean {close[0]}? ' if close else '') + f'It takes: {", ".join(known)}')


def _custom_keys(given: object) -> dict[str, dict]:
    """Checked, the longest first; mmengine's order."""
    where = f'{FIELD}.custom_keys'
    if not isinstance(given, dict):
        raise UserError(f'{where}={given!r}: must be a dict of dicts\nSuch as {{"decode_head": dict(lr_mult=10.)}}.')
    for key, value in given.items():
        if not isinstance(value, dict):
            raise UserError(f'{where}[{key!r}]={value!r}: must be a dict\nSuch as dict(lr_mult=0.1).')
        for field, factor in value.items():
            _check_known(field, ('lr_mult', 'decay_mult'), f'{where}[{key!r}]')
            if not _is_number(factor):
                raise UserError(f'{where}[{key!r}].{field}={factor!r}: must be a number\nIt is a factor.')
    return dict(sorted(given.items(), key=lambda item: (-len(item[0]), item[0])))


def _depths(backbone: nn.Module, method: str) -> Iterator[tuple[str, int, int]]:
    """Full name, depth and number of depths of every parameter of the backbone that is trained."""
    kind, ask = type(backbone).__name__, getattr(backbone, method, None)
    if ask is None:
        raise UserError(f'model.backbone.type={kind!r}: has no {method}(name, prefix), which {NAME} asks for depths\n'
                        f'Use a backbone that has, add it to a subclass, or leave the constructor out.')
    for own_name, param in backbone.named_parameters(remove_duplicate=False):
        if not param.requires_grad:
            continue
        name = f'backbone.{own_name}'
        try:
            depth, count = ask(name, 'backbone.')
        except (ValueError, LookupError) as error:
            raise UserError(f'{name}: {kind}.{method} tells no depth for this parameter: {error}\n'
                            f'Freeze the parameter, or extend {method} in a subclass of {kind}.') from error
        if not 0 <= depth < count:
            raise UserError(f'{name}: {kind}.{method} tells depth {depth} of {count}, which must be in 0..{count - 1}\n'
                            f'Mend {method} of {kind}.')
        yield name, depth, count


def _check_loaded_groups(optimizer: Optimizer, state: dict) -> None:
    """Refuse the state of other groups: torch tells parameters by their number alone."""
    loaded = [group.get('param_names') for group in state['param_groups']]
    own = [group['param_names'] for group in optimizer.param_groups]
    if loaded != own:
        known = [name for names in loaded for name in names or ()]
        differing = next((f', {a} and {b} first' for a, b in zip(known, (n for names in own for n in names), strict=False)
                          if a != b), '')
        raise UserError(f'the optimizer state of the checkpoint is for other parameter groups: {len(loaded)} instead of '
                        f'{len(own)}{differing}\nResume with the optim_wrapper and the frozen stages it was trained with, or '
                        f'start from its weights alone (load_from without resume).')
