"""Exchange the backbone of a config for one of the catalogue, as ``--backbone NAME`` and suites do."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from replk_mm import published
from replk_mm.backbones.catalogue import CatalogueEntry, Recipe, Weights, find_backbone, measure_features, recipe_of
from replk_mm.data.datasets import as_list, crop_of, datasets_of, task_of
from replk_mm.engine.config_errors import walk_dicts
from replk_mm.errors import UserError
from replk_mm.logs import Note
from replk_mm.published import PublishedResult
from replk_mm.registry import MODELS

#: Names in the papers of mmdet's detectors and mmseg's heads.
METHODS = {
    'CascadeRCNN': 'Cascade Mask R-CNN',
    'MaskRCNN': 'Mask R-CNN',
    'FCOS': 'FCOS',
    'RetinaNet': 'RetinaNet',
    'FPNHead': 'Semantic FPN',
    'LightHamHead': 'SegNeXt',
    'ImageClassifier': 'classification',
}
#: Arguments of a backbone that do not depend on its family.
_KEPT = ('in_channels', 'out_indices', 'drop_path_rate', 'with_cp', 'out_memory_format')
_BATCH_NORMS = ('BN', 'SyncBN', 'MMSyncBN', 'replk_mm.SyncBN')
#: Arguments of the backbones of classifiers: the last map, pooled before its norm or normalized before the pooling.
_CLASSIFIER: dict = dict(out_indices=(3,), gap_before_final_norm=True, norm_intermediate_features=True)
_LAYER_DECAY = 'replk_mm.LayerDecayOptimizerConstructor'


def use_backbone(cfg: Config, name: str, recipe: str | None = None) -> None:
    """Exchange the backbone of a segmentor, detector or classifier.

    Channels of heads and neck, normalization of images, pretrained weights, drop path, learning rate and its decay
    follow from the catalogue. ``cfg.catalogue`` then has the full name, the pretraining, the recipe and its source, and
    the line for the log. The changed config is plain: it needs no catalogue to be run again.

    Args:
        cfg: Changed in place.
        name: In the catalogue. Without a tag, a config that starts from pretrained weights takes the default ones, and
            a config that trains from scratch keeps random weights.
        recipe: ``'authors'``: as published for this backbone, pretraining and task. ``'common'``: the optimizer of the
            config. Defaults to the authors' where weights are pretrained and the recipe is published, else the common
            one.

    Raises:
        UserError: If the name is unknown, the heads or the neck do not fit, or there is no recipe of the authors.
    """
    entry, weights = find_backbone(name)
    model = cfg.model
    old = model.get('backbone')
    if not isinstance(old, dict):
        raise UserError(f'{cfg.filename}: has no model.backbone to exchange for {name}\nUse another config.')
    cls: Any = MODELS.get(entry.config['type'])
    accepted = dict(inspect.signature(cls).parameters)
    if hasattr(cls, 'accepts') and cls.accepts(entry.config['model_name'], 'drop_path_rate'):  # timm, transformers
        accepted['drop_path_rate'] = accepted['kwargs']
    config = {**entry.config, **(entry.detection if task_of(cfg) == 'detection' else {})}
    new = ConfigDict({**config, **{key: old[key] for key in _KEPT if key in old and key in accepted}})
    _keep_batch_norm(new, accepted, (old, *(part for _, part in walk_dicts(model))))
    neck = as_list(model.get('neck'))
    indices, levels = as_list(old.get('out_indices')), as_list(neck[0].get('in_channels') if neck else None)
    if 'out_indices' in accepted and (max(indices, default=0) > 3 or (not indices and 1 < len(levels) < 4)):
        new.out_indices = tuple(range(4 - len(indices or levels), 4))  # the old backbone counts other stages
    if task_of(cfg) == 'classification':
        # The networks of the catalogue are for dense prediction.
        new.update({key: value for key, value in _CLASSIFIER.items() if key in accepted})
        if new.get('layer_scale_init_value') == 1.0:
            new.pop('layer_scale_init_value')
        model.pop('neck', None)
        if 'gap_before_final_norm' not in accepted:
            model.neck = ConfigDict(type='GlobalAveragePooling')
    # pooled features have the same channels
    pooled = new.get('gap_before_final_norm')
    features = measure_features({**new, 'gap_before_final_norm': False} if pooled else new)
    _fit_heads(cfg, entry.name, features)
    for preprocessor in (model.get('data_preprocessor'), cfg.get('data_preprocessor')):
        if preprocessor and len(preprocessor.get('mean') or entry.mean) == 3 == new.get('in_channels', 3):
            preprocessor.pop('rgb_to_bgr', None)
            preprocessor.update(mean=list(entry.mean), std=list(entry.std))
            preprocessor['to_rgb' if task_of(cfg) == 'classification' else 'bgr_to_rgb'] = not entry.bgr

    initial = next((c for c in as_list(old.get('init_cfg')) if c.get('type') == 'Pretrained'), None)
    if weights is None and entry.weights and (model.pop('pretrained', None) or initial):
        weights = entry.weights[0]
    model.pop('pretrained', None)
    if weights:
        new.update(weights.to_config())
        if initial and initial.get('adapt_input_conv') and 'init_cfg' in new:
            new.init_cfg.adapt_input_conv = True
    cfg.load_from = None  # weights of the other network
    decays = 'decay_rate' in (cfg.get('optim_wrapper', {}).get('paramwise_cfg') or {})
    source = _use_recipe(cfg, entry, weights, recipe, new, accepted, hasattr(cls, 'get_layer_depth'))
    full = entry.full_name(weights)
    channels = ', '.join(f'{f["num_chs"]} at stride {f["reduction"]}' for f in features)
    pretraining = weights.pretraining if weights else 'none'
    cfg.catalogue = dict(
        backbone=full,
        pretraining=pretraining,
        **source,
        changes=f'backbone: {full} instead of {old.get("type")} ({channels}; pretraining: {pretraining}; recipe: '
        f'{source["recipe"]}, {source["recipe_source"]}'
        + (f'; drop path {new.drop_path_rate}' if 'drop_path_rate' in new else '')
        + ('; without layer-wise learning-rate decay)' if decays and not hasattr(cls, 'get_layer_depth') else ')'),
    )
    model.backbone = new
    if not cfg.get('work_dir') and cfg.filename:
        cfg.work_dir = f'work_dirs/{Path(cfg.filename).stem}-{full.replace("/", "-")}'


def _keep_batch_norm(new: ConfigDict, accepted: Mapping[str, inspect.Parameter], parts: tuple[dict, ...]) -> None:
    """Use the config's kind of BatchNorm, plain or synchronized, in a backbone that has BatchNorm."""
    default = accepted['norm_cfg'].default if 'norm_cfg' in accepted else None
    if isinstance(default, dict) and default['type'] in _BATCH_NORMS and 'norm_cfg' not in new:
        configured = (part.get('norm_cfg') for part in parts)
        norm = next((n for n in configured if isinstance(n, dict) and n.get('type') in _BATCH_NORMS), None)
        if norm:
            new.norm_cfg = dict(default, type=norm['type'])


def _fit_heads(cfg: Config, name: str, features: list[dict[str, int]]) -> None:
    """Set ``in_channels`` of the neck, or else of the heads."""
    model, channels = cfg.model, [f['num_chs'] for f in features]
    neck = as_list(model.get('neck'))
    if neck and isinstance(neck[0].get('in_channels'), (list, tuple)):
        strides, levels = [f['reduction'] for f in features], len(neck[0]['in_channels'])
        if levels <= 4 and strides != [4, 8, 16, 32][4 - levels :] and len(strides) == levels:
            raise UserError(
                f'{cfg.filename}: model.neck: is for features of stride 4, 8, 16, 32; {name} has strides {strides}\n'
                f'Use a backbone with these strides.'
            )
    neck = [part for part in neck if 'in_channels' in part]  # pooling has none
    places = ('neck',) if neck else ('decode_head', 'auxiliary_head', 'panoptic_head', 'bbox_head', 'head')
    for place in places:
        for part in as_list(model.get(place))[: 1 if neck else None]:
            _fit(f'{cfg.filename}: model.{place}', part, channels, name)


def _fit(place: str, part: dict, channels: list[int], name: str) -> None:
    wanted, index = part.get('in_channels'), part.get('in_index')
    if wanted is None:
        return
    several = isinstance(wanted, (list, tuple))
    if index is None:  # the part takes every map, or the last one
        index = list(range(len(wanted))) if several else -1
    indices: list[int] = as_list(index)
    takes_all = several and part.get('in_index') is None
    if not all(-len(channels) <= i < len(channels) for i in indices) or takes_all and len(indices) != len(channels):
        maps = f'{len(channels)} feature map{"s" * (len(channels) > 1)}'
        raise UserError(
            f'{place}: takes {f"{len(wanted)} feature maps" if several else f"feature map {index}"}; {name} returns '
            f'{maps}\nUse another head, or another backbone.'
        )
    part['in_channels'] = [channels[i] for i in indices] if several else channels[indices[0]]
    if part.get('c1_in_channels'):  # DeepLabV3+
        part['c1_in_channels'] = channels[0]


def _closest(rows: list[PublishedResult], cfg: Config) -> PublishedResult | None:
    """The row whose data, method, crop and length of training are most like those of the config."""
    return max(rows, key=lambda row: _likeness(row, cfg), default=None)


def _likeness(row: PublishedResult, cfg: Config) -> tuple[bool, bool, bool, bool]:
    datasets = [str(dataset.get('type')) for dataset in datasets_of(cfg, ('train',))]
    kinds = cfg.model.get('type'), as_list(cfg.model.get('decode_head') or [{}])[-1].get('type')
    method = next((METHODS[kind] for kind in map(str, kinds) if kind in METHODS), 'UperNet')
    loop = cfg.get('train_cfg') or {}
    length = {f'{loop.get("max_epochs")} epochs', f'{loop.get("max_iters", 0) // 1000}k iterations'}
    return (
        any(row.dataset.lower() in dataset.lower() for dataset in datasets),
        row.method == method,
        row.crop is not None and crop_of(cfg) == (row.crop, row.crop),
        row.schedule.partition(',')[0] in length,
    )


def published_result(cfg: Config, config: str) -> PublishedResult | None:
    """The published row of a config's network, data and method, also with an exchanged backbone; None without one."""
    named = cfg.get('catalogue', {}).get('backbone')
    if not named:
        return published.for_config(config.rpartition('::')[2])
    entry, weights = find_backbone(named)
    row = _closest(entry.published(task_of(cfg), weights), cfg) if weights else None
    return row if row and all(_likeness(row, cfg)[: 2 if row.crop is None else 3]) else None


def _use_recipe(
    cfg: Config,
    entry: CatalogueEntry,
    weights: Weights | None,
    kind: str | None,
    backbone: ConfigDict,
    accepted: Mapping[str, Any],
    has_depths: bool,
) -> dict[str, str]:
    """Set the optimizer and drop path; returns the kind of recipe and its source."""
    row = _closest(entry.published(task_of(cfg), weights), cfg) if weights else None
    authors: Recipe | None = recipe_of(row) if row else None
    if kind == 'authors' and authors is None:
        why = 'starts from random weights' if weights is None else 'has no published recipe for this task'
        raise UserError(f'recipe=authors: {entry.full_name(weights)} {why}\nUse recipe=common.')
    if kind not in (None, 'authors', 'common'):
        raise UserError(f'recipe={kind}: is unknown\nUse recipe=authors or recipe=common.')
    wrapper = cfg.get('optim_wrapper')
    if authors and kind in (None, 'authors'):
        if 'drop_path_rate' in accepted:
            backbone.drop_path_rate = authors.drop_path
        if wrapper:
            wrapper.optimizer = ConfigDict(
                type='AdamW', lr=authors.lr, betas=authors.betas, weight_decay=authors.weight_decay
            )
            wrapper.paramwise_cfg = ConfigDict(authors.paramwise_cfg)
            wrapper.pop('constructor', None)
            if 'decay_rate' in authors.paramwise_cfg:
                wrapper.constructor = _LAYER_DECAY
            cfg.auto_scale_lr = ConfigDict(enable=True, base_batch_size=authors.global_batch)
        return dict(recipe='authors', recipe_source=authors.source)
    if wrapper and str(wrapper.get('constructor')).endswith('DecayOptimizerConstructor'):
        if has_depths:
            wrapper.constructor = _LAYER_DECAY
            wrapper.paramwise_cfg.pop('num_layers', None)  # the network has its own number
        else:
            wrapper.pop('constructor')
            wrapper.paramwise_cfg = ConfigDict(norm_decay_mult=0.0)
    return dict(recipe=kind or 'common', recipe_source='optimizer of the config')


def describe_recipe(cfg: Config, config: str, options: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Origin and values of learning rate and schedule of a training.

    Args:
        cfg: Prepared for training.
        config: Name of its file.
        options: Its overrides.
        images: Of one iteration, over all processes.
    """
    wrapper = cfg.optim_wrapper
    optimizer, scaling = wrapper.get('optimizer') or {}, cfg.get('auto_scale_lr') or {}
    lr = optimizer.get('lr')
    if lr is not None and scaling.get('enable'):
        lr = lr * images / scaling['base_batch_size']
    origin = cfg.get('catalogue', {}).get('recipe')
    if origin is None:
        row = published.for_config(config.rpartition('::')[2])
        changed = any(key.startswith('optim_wrapper') for key in options)
        origin = 'authors' if row and row.recipe and not changed else 'common'
    return dict(
        origin=origin,
        optimizer=optimizer.get('type'),
        lr=lr,
        weight_decay=optimizer.get('weight_decay'),
        layer_decay=(wrapper.get('paramwise_cfg') or {}).get('decay_rate'),
        schedule=[dict(scheduler) for scheduler in as_list(cfg.get('param_scheduler'))],
    )


def backbone_notes(cfg: Config) -> list[str]:
    """The line for the log of an exchanged backbone."""
    changes = cfg.get('catalogue', {}).get('changes')
    return [Note(changes)] if changes else []
