"""What tests of configs share: the files, the published rows that belong to them, small substitutes of their models."""
import copy
import functools
from functools import cache
from pathlib import Path

import mmengine.config.utils
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from replk_mm.engine.config import fit_to_machine
from replk_mm.models import ConvNeXt, RepLKNet

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
# Those on generated scenes are commands more than recipes.
LEAVES = sorted(p.name for p in CONFIGS.glob('*.py') if not p.stem.endswith(('_demo', '_context')))
NANO = [name for name in LEAVES if '-nano_' in name]

# Read here once more, not through the package's own reader: the published rows, by the name of their config.
PUBLISHED = yaml.safe_load((ROOT / 'replk_mm' / 'bench' / 'published.yaml').read_text())
RECIPES = PUBLISHED['recipes']
ROWS = {row['config']: row for task in ('segmentation', 'detection') for row in PUBLISHED[task]}

# Written out by hand from the papers: the width of the four stages.
CHANNELS = {
    'RepLKNet-31B': [128, 256, 512, 1024], 'RepLKNet-31L': [192, 384, 768, 1536],
    'RepLKNet-XL': [256, 512, 1024, 2048], 'ConvNeXt-T': [96, 192, 384, 768], 'ConvNeXt-S': [96, 192, 384, 768],
    'ConvNeXt-B': [128, 256, 512, 1024], 'ConvNeXt-L': [192, 384, 768, 1536], 'ConvNeXt-XL': [256, 512, 1024, 2048],
}
ARCH = {
    'RepLKNet-31B': '31B', 'RepLKNet-31L': '31L', 'RepLKNet-XL': 'XL', 'ConvNeXt-T': 'tiny', 'ConvNeXt-S': 'small',
    'ConvNeXt-B': 'base', 'ConvNeXt-L': 'large', 'ConvNeXt-XL': 'xlarge',
}
CLASSES = {'ade20k': 150, 'cityscapes': 19, 'coco': 80}

# mmengine reads all metafiles of a package for each base file that a config has there: a second a config.
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)


@cache
def load(name: str) -> Config:
    """The config of that name; not to be changed."""
    return Config.fromfile(CONFIGS / name)


def build(cfg: Config, device: str = 'meta') -> torch.nn.Module:
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry, torch.device(device):
        return registry.build(copy.deepcopy(cfg.model))


@cache
def meta_model(name: str) -> torch.nn.Module:
    return build(load(name))


def params_m(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def dataset_of(name: str) -> str:
    """``'ade20k'``, ``'cityscapes'`` or ``'coco'``."""
    return Path(name).stem.rpartition('_')[2].partition('-')[0]


def variant_of(row: dict, values):
    """The value of a recipe that holds for the row's variant."""
    return values[row['variant']] if isinstance(values, dict) else values


def groups_by_name(name: str) -> dict[str, dict]:
    """Parameter name to what the optimizer does with it."""
    cfg = load(name)
    wrapper = copy.deepcopy(cfg.optim_wrapper)
    if wrapper.type == 'AmpOptimWrapper':  # needs a GPU; it wraps the same optimizer
        wrapper = {**{k: v for k, v in wrapper.items() if k not in ('dtype', 'loss_scale')}, 'type': 'OptimWrapper'}
    with MODELS.switch_scope_and_registry(cfg.default_scope):
        optimizer = build_optim_wrapper(meta_model(name), wrapper).optimizer
    of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    return {n: of[id(p)] for n, p in meta_model(name).named_parameters()}


# ---- what holds for segmentation and detection alike

def check_backbone(name: str) -> None:
    """The backbone of a published config is what its row and recipe say."""
    backbone, row = load(name).model.backbone, ROWS[name]
    recipe = RECIPES[row['recipe']]
    assert backbone.type == 'replk_mm.' + row['backbone'].split('-')[0]
    assert backbone.arch == ARCH[row['backbone']]
    assert backbone.drop_path_rate == variant_of(row, recipe['drop_path'])
    assert list(backbone.out_indices) == [0, 1, 2, 3]
    if backbone.type == 'replk_mm.RepLKNet':
        assert backbone.norm_cfg.type == recipe['norm'] and backbone.with_cp is recipe['checkpointing']
        assert backbone.small_kernel_merged is False
        assert backbone.get('norm_intermediate_features', False) is (row['backbone'] == 'RepLKNet-XL')
    else:
        assert backbone.layer_scale_init_value == recipe['layer_scale_init']
        assert backbone.gap_before_final_norm is False


def check_input(name: str) -> None:
    """Images are normalized as for the weights that the row starts from."""
    row, preprocessor = ROWS[name], load(name).model.data_preprocessor
    if RECIPES[row['recipe']].get('mean_std', {}).get(row['variant']) == 127.5:
        assert 'replkxl' in name and preprocessor.mean == [127.5] * 3 and preprocessor.std == [127.5] * 3
    else:
        assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.std == [58.395, 57.12, 57.375]


def check_optimization(name: str) -> None:
    """Optimizer, batch, precision and learning rates by parameter are the recipe's."""
    cfg, row = load(name), ROWS[name]
    recipe, wrapper = RECIPES[row['recipe']], cfg.optim_wrapper
    assert wrapper.optimizer == {
        'type': recipe['optimizer'], 'lr': variant_of(row, recipe['lr']), 'betas': tuple(recipe['betas']),
        'weight_decay': recipe['weight_decay']}
    clip = recipe.get('grad_clip')
    assert wrapper.clip_grad == (clip and {'max_norm': clip, 'norm_type': 2})
    assert 8 * cfg.train_dataloader.batch_size == recipe['global_batch'] == cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.enable is True
    if recipe['amp']:
        assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ('AmpOptimWrapper', recipe['amp'], 'dynamic')
    else:
        assert wrapper.type == 'OptimWrapper'
    if 'layer_decay' in recipe:
        assert wrapper.constructor == 'replk_mm.LayerDecayOptimizerConstructor'
        assert wrapper.paramwise_cfg == {
            'decay_type': recipe['layer_decay']['type'], 'decay_rate': variant_of(row, recipe['layer_decay']['rate']),
            'num_layers': variant_of(row, recipe['num_layers'])}
    else:
        assert wrapper.paramwise_cfg == {'norm_decay_mult': recipe['norm_decay_mult']}


def check_decay_of_norms(name: str) -> set[str]:
    """The weights of norms do not decay, and those of all else do. Returns the names of the former."""
    model, norms = meta_model(name), (_BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm)
    of_norms = {f'{n}.{p}' for n, m in model.named_modules() if isinstance(m, norms) for p, _ in m.named_parameters()}
    for parameter, group in groups_by_name(name).items():
        assert group['weight_decay'] == (0.0 if parameter in of_norms else 0.05), parameter
    return of_norms




# ---- small substitutes

TINY = {
    'replk_mm.RepLKNet': dict(layers=[1, 1, 1, 1], channels=[8, 16, 24, 40], large_kernel_sizes=[7, 7, 7, 5],
                              dw_ratio=1),
    'replk_mm.ConvNeXt': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40]),
}
#: Smaller values of whatever has one of these keys. 32 is what GroupNorm of 32 groups takes.
SMALLER = {'channels': 8, 'fc_out_channels': 16, 'max_per_img': 8, 'nms_pre': 50, 'num': 16, 'num_convs': 1,
           'score_thr': 0.0}


def arch_of(cfg: Config) -> dict:
    """The row of the architecture table that a config's backbone is built from."""
    table = {'replk_mm.RepLKNet': RepLKNet, 'replk_mm.ConvNeXt': ConvNeXt}[cfg.model.backbone.type].arch_settings
    return table[cfg.model.backbone.arch]


def tiny_on_cpu(name: str) -> Config:
    """The config as it runs on a CPU, its backbone and heads small.

    Inputs of the backbone's features are translated from the real widths to the small ones, so that a head or neck
    whose channels are not those of its backbone fails here, with a KeyError.
    """
    cfg = copy.deepcopy(load(name))
    fit_to_machine(cfg, None, 'cpu', 1)
    model, arch = cfg.model, arch_of(cfg)
    model.backbone.pop('init_cfg', None)
    small = dict(TINY[model.backbone.type])
    if model.backbone.type == 'replk_mm.RepLKNet':
        small['small_kernel'] = arch['small_kernel'] and 3
    model.backbone.arch = small
    width = dict(zip(arch['channels'], small['channels'], strict=True))
    if 'neck' in model:
        model.neck.in_channels = [width[c] for c in model.neck.in_channels]
        inner = model.neck.out_channels
        for part in ('neck', 'rpn_head', 'roi_head', 'bbox_head', 'train_cfg', 'test_cfg'):
            _shrink(model.get(part), {inner: 32})
    else:
        model.data_preprocessor.size = (64, 64)
        model.decode_head.in_channels = [width[c] for c in model.decode_head.in_channels]
        model.auxiliary_head.in_channels = width[model.auxiliary_head.in_channels]
        for head in (model.decode_head, model.auxiliary_head):
            _shrink(head, {})
    return cfg


def _shrink(node, width: dict[int, int]) -> None:
    if isinstance(node, (list, tuple)):
        for part in node:
            _shrink(part, width)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in SMALLER and isinstance(value, (int, float)):
                node[key] = SMALLER[key]
            elif key.endswith(('in_channels', 'out_channels', 'feat_channels')) and isinstance(value, int):
                node[key] = width.get(value, value)
            else:
                _shrink(value, width)
