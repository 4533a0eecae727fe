"""Configs of ImageNet classifiers: headers, published rows and recipes, weights, complexity; without mmpretrain."""

import copy
import json
import re
from typing import NamedTuple

import cv2
import pytest
import torch
from config_cases import CLASSIFIERS, CONFIGS, PUBLISHED, ROOT, load, params_m
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS

from replk_mm.analysis.complexity import build_on_meta, config_complexity
from replk_mm.backbones.catalogue import weights_by_url
from replk_mm.commands import list_configs
from replk_mm.engine.config import load_config

ROWS = {row['config']: row for row in PUBLISHED['classification'] if row.get('config')}
RECORD = {
    row['config']: row
    for row in json.loads((ROOT / 'docs' / 'complexity.json').read_text())['rows']
    if row['task'] == 'classification' and row['config']
}


class Recipe(NamedTuple):
    """Settings of the commands in the authors' repositories."""

    arch: str
    side: int
    drop_path: float
    gpus: int
    images: int  # on each GPU
    decay: float | None  # layer-wise; None trains from scratch
    start: str | None = None  # a part of the address of the weights
    lr: float | None = None
    warmup: int = 0  # epochs
    min_lr: float = 1e-6
    ema: bool = False


RECIPES = {
    'replk31b_imagenet': Recipe('31B', 224, 0.5, 32, 64, None, None, 4e-3, 10, ema=True),
    'replk31b_imagenet-384': Recipe('31B', 384, 0.8, 32, 32, 0.7, '31B_3rdparty_in1k_', 4e-4, 1, ema=True),
    'replk31b-in22k_imagenet': Recipe('31B', 224, 0.2, 16, 32, 0.7, '31B_in21k-pre', 4e-4, 1, ema=True),
    'replk31b-in22k_imagenet-384': Recipe('31B', 384, 0.3, 32, 16, 0.7, '31B_in21k-pre', 4e-4, 1, 3e-4, True),
    'replk31l-in22k_imagenet-384': Recipe('31L', 384, 0.3, 32, 16, 0.7, '31L_in21k-pre', 4e-4, 1, 3e-4, True),
    'replkxl-meg73m_imagenet-320': Recipe('XL', 320, 0.3, 32, 16, 0.7, 'XL_meg73m-pre', 4e-4, 1, 3e-4, True),
    'convnext-tiny_imagenet': Recipe('tiny', 224, 0.1, 32, 128, None, None, 4e-3, 20, ema=True),
    'convnext-small_imagenet': Recipe('small', 224, 0.4, 32, 128, None, None, 4e-3, 20, ema=True),
    'convnext-base_imagenet': Recipe('base', 224, 0.5, 32, 128, None, None, 4e-3, 20, ema=True),
    'convnext-large_imagenet': Recipe('large', 224, 0.5, 64, 64, None, None, 4e-3, 20, ema=True),
    'convnext-base_imagenet-384': Recipe('base', 384, 0.8, 16, 32, 0.7, 'base_1k_224', 5e-5),
    'convnext-large_imagenet-384': Recipe('large', 384, 0.95, 16, 32, 0.7, None, 5e-5),
    'convnext-base-in22k_imagenet': Recipe('base', 224, 0.2, 16, 32, 0.8, 'base_22k_224', 5e-5),
    'convnext-large-in22k_imagenet': Recipe('large', 224, 0.3, 16, 32, 0.8, 'large_22k_224', 5e-5),
    'convnext-xlarge-in22k_imagenet': Recipe('xlarge', 224, 0.4, 32, 16, 0.8, 'xlarge_22k_224', 5e-5, ema=True),
    'convnext-base-in22k_imagenet-384': Recipe('base', 384, 0.2, 32, 16, 0.8, 'base_22k_224', 5e-5),
    'convnext-large-in22k_imagenet-384': Recipe('large', 384, 0.3, 32, 16, 0.8, 'large_22k_224', 5e-5),
    'convnext-xlarge-in22k_imagenet-384': Recipe('xlarge', 384, 0.4, 64, 8, 0.8, 'xlarge_22k_224', 5e-5, ema=True),
}


def test_every_config_has_a_row_and_a_recipe():
    assert sorted(ROWS) == CLASSIFIERS == sorted(f'{name}.py' for name in RECIPES)


@pytest.mark.parametrize('name', RECIPES)
def test_header(name):
    header, recipe = (CONFIGS / f'{name}.py').read_text().partition('_base_')[0], RECIPES[name]
    row, batch = ROWS[f'{name}.py'], recipe.gpus * recipe.images
    assert f'python tools/train.py configs/{name}.py' in header
    epochs = 30 if recipe.decay else 300
    assert f'{recipe.gpus} GPUs x {recipe.images} images (global batch {batch}), {epochs} epochs' in header
    assert f'top-1 accuracy {row["top1"]}' in header and 'quoted' in header and 'not reproduced' in header
    source = PUBLISHED['sources'][row['source']]
    assert source['paper'] in header and source['repository'] in header
    assert ('is not published' in header) == (row.get('recipe') is None)


@pytest.mark.parametrize('name', RECIPES)
def test_settings_are_those_of_the_authors(name):
    cfg, recipe, row = load(f'{name}.py'), RECIPES[name], ROWS[f'{name}.py']
    batch, scratch = recipe.gpus * recipe.images, recipe.decay is None
    backbone, preprocessor = cfg.model.backbone, cfg.model.data_preprocessor
    assert (backbone.arch, backbone.drop_path_rate, cfg.crop_size) == (
        recipe.arch,
        recipe.drop_path,
        (recipe.side,) * 2,
    )
    assert backbone.get('layer_scale_init_value', 1e-6) == 1e-6
    values = ([127.5] * 3,) * 2 if recipe.arch == 'XL' else ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    assert (preprocessor.mean, preprocessor.std, preprocessor.to_rgb) == (*values, True)
    assert recipe.start in backbone.init_cfg.checkpoint if recipe.start else 'init_cfg' not in backbone
    if recipe.start:
        entry, weights = weights_by_url()[backbone.init_cfg.checkpoint]
        assert entry.paper_name == row['backbone'] and weights.pretraining.startswith(row['pretraining'])
    wrapper = cfg.optim_wrapper
    assert (wrapper.optimizer.type, wrapper.optimizer.lr) == ('AdamW', recipe.lr)
    assert wrapper.optimizer.weight_decay == (0.05 if scratch else 1e-8) and 'clip_grad' not in wrapper
    if not scratch:
        assert wrapper.constructor == 'replk_mm.LayerDecayOptimizerConstructor'
        assert wrapper.paramwise_cfg == dict(decay_type='layer_wise', decay_rate=recipe.decay, num_layers=12)
    assert cfg.train_dataloader.batch_size == recipe.images
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=batch)
    assert cfg.train_cfg.max_epochs == (300 if scratch else 30)
    assert (cfg.get('custom_hooks') is not None) == recipe.ema
    assert ('train_cfg' in cfg.model) == scratch  # Mixup and CutMix
    # The table of published recipes has the same values.
    if row.get('recipe'):
        table = PUBLISHED['recipes'][row['recipe']]

        def of(value):
            return value[row['variant']] if isinstance(value, dict) else value

        assert (table['lr'], of(table['drop_path']), of(table['global_batch'])) == (recipe.lr, recipe.drop_path, batch)
        assert of(table['schedule']['min_lr']) == recipe.min_lr and (of(table['ema']) is not None) == recipe.ema
        assert (table['warmup'] or dict(epochs=0))['epochs'] == recipe.warmup


@pytest.mark.parametrize('name', ['replk31b_imagenet', 'replk31b-in22k_imagenet-384', 'convnext-base_imagenet-384'])
def test_learning_rate_warms_up_and_falls_along_a_cosine(name):
    cfg, recipe, steps = load(f'{name}.py'), RECIPES[name], 7  # iterations of an epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    schedulers = [
        PARAM_SCHEDULERS.get(given.type).build_iter_from_epoch(
            optimizer=optimizer,
            epoch_length=steps,
            **{key: value for key, value in given.items() if key not in ('type', 'convert_to_iter_based')},
        )
        for given in cfg.param_scheduler
    ]
    seen = []
    for _ in range(steps * cfg.train_cfg.max_epochs):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    begin, end = recipe.warmup * steps, steps * cfg.train_cfg.max_epochs
    for t in (*range(0, begin, max(1, begin // 5)), begin, begin + 1, (begin + end) // 2, end - 1):
        phase = torch.tensor((t - begin) / (end - begin), dtype=torch.float64)
        cosine = recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + torch.cos(torch.pi * phase)) / 2
        # the first and the last step of a warm-up differ by one iteration between implementations
        expected = recipe.lr * t / max(begin - 1, 1) if t < begin else cosine.item()
        assert seen[t] == pytest.approx(expected, rel=0.04, abs=2e-6 * recipe.lr), t


def test_weight_decay_of_matrices_only():
    for name in ('convnext-tiny_imagenet.py', 'replk31b_imagenet.py', 'convnext-base_imagenet-384.py'):
        cfg, model = copy.deepcopy(load(name)), build_on_meta(load(name))
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
        for parameter, value in model.named_parameters():
            expected = cfg.optim_wrapper.optimizer.weight_decay if value.ndim > 1 else 0
            assert decay[id(value)] == expected, parameter


def test_data_of_the_sizes():
    for name, (test, crop) in {
        'convnext-tiny_imagenet': (dict(type='ResizeEdge', scale=256), (224, 224)),
        'replkxl-meg73m_imagenet-320': (dict(type='ResizeEdge', scale=365), (320, 320)),
        'convnext-base_imagenet-384': (dict(type='Resize', scale=(384, 384)), None),
    }.items():
        cfg = load(f'{name}.py')
        train, steps = cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline
        assert cfg.test_dataloader.dataset.pipeline == steps
        assert train[1].type == 'RandomResizedCrop' and train[1].scale == cfg.crop_size[0]
        assert {key: steps[1][key] for key in test} == test
        assert (steps[2].crop_size if steps[2].type == 'CenterCrop' else None) == crop
        assert {step.type for step in train} >= {'RandomFlip', 'RandAugment', 'RandomErasing'}
        assert cfg.test_evaluator == dict(type='replk_mm.Accuracy', topk=(1,))


# ---- complexity


@pytest.mark.parametrize('name', ['replk31b_imagenet-384.py', 'convnext-large_imagenet.py'])
def test_complexity_is_that_of_the_docs(name):
    """The record has all configs, which the test of the page compares with the published rows."""
    found, row = config_complexity(str(CONFIGS / name)), RECORD[name]
    assert list(found.shape) == row['input'] == ROWS[name]['input']
    for form, key in ((found.training, 'training'), (found.deployed, 'deployed')):
        assert (form.parameters, form.macs) == (row['counts'][key]['parameters'], row['counts'][key]['macs'])
    assert row['status'] == 'within'


def test_classifier_of_convnext_tiny_has_the_parameters_of_torchvision():
    assert params_m(build_on_meta(load('convnext-tiny_imagenet.py'))) * 1e6 == 28_589_128


def test_exchanged_backbone_of_a_classifier():
    cfg = load_config(str(CONFIGS / 'convnext-tiny_imagenet.py'), dict(backbone='van-b0'), needs=('model',))
    assert (cfg.model.neck.type, cfg.model.head.in_channels) == ('GlobalAveragePooling', 256)
    assert cfg.model.data_preprocessor.to_rgb is True and 'bgr_to_rgb' not in cfg.model.data_preprocessor
    assert params_m(build_on_meta(cfg)) == pytest.approx(4.1, abs=0.05)  # as published for the classifier


@pytest.mark.parametrize(
    ('config', 'backbone'),
    [('convnext-tiny', 'convnext-small'), ('convnext-tiny', 'replknet-31b'), ('replk31b', 'convnext-base')],
)
def test_exchanged_classifier_is_the_published_one(config, backbone):
    name = {'convnext-small': 'convnext-small', 'replknet-31b': 'replk31b', 'convnext-base': 'convnext-base'}[backbone]
    found = load_config(str(CONFIGS / f'{config}_imagenet.py'), dict(backbone=backbone), needs=('model',))
    exchanged, published = build_on_meta(found), build_on_meta(load(f'{name}_imagenet.py'))
    shapes = {key: value.shape for key, value in published.state_dict().items()}
    assert {key: value.shape for key, value in exchanged.state_dict().items()} == shapes
    assert found.model.get('neck') == load(f'{name}_imagenet.py').model.get('neck')
    assert found.model.backbone.get('layer_scale_init_value', 1e-6) == 1e-6


@pytest.mark.extras('mmpretrain')
@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [name for name in CLASSIFIERS if 'large' not in name and 'xl' not in name and '31l' not in name]
)
def test_mmpretrain_builds_the_parts_of_a_published_config(name, tmp_path):
    """Pipelines, hooks, optimizer and schedule of a config run on one image."""
    import numpy as np
    from mmengine.registry import DATASETS, HOOKS, MODELS, TRANSFORMS, init_default_scope

    cfg = copy.deepcopy(load(name))
    init_default_scope('mmpretrain')
    side = cfg.crop_size[0]
    cv2.imwrite(str(tmp_path / 'x.jpg'), np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        steps = [TRANSFORMS.build(step) for step in loader.dataset.pipeline]
        data = dict(img_path=str(tmp_path / 'x.jpg'), gt_label=3)
        for _ in range(4):  # some steps are random
            packed = data
            for step in steps:
                packed = step(packed)
            assert packed['inputs'].shape == (3, side, side) and packed['data_samples'].gt_label.item() == 3
    with DATASETS.switch_scope_and_registry('mmpretrain') as registry:
        assert registry.get(cfg.train_dataloader.dataset.type)
    cfg.model.backbone.pop('init_cfg', None)
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=packed['inputs'][None], data_samples=[packed['data_samples']]))
        (found,) = model(**inputs, mode='predict')
    assert found.pred_score.shape == (1000,) and found.pred_score.sum().item() == pytest.approx(1, abs=1e-4)
    for hook in cfg.get('custom_hooks', []):
        assert hook['update_buffers'] is True and HOOKS.build(hook)  # timm averages BatchNorm statistics too


@pytest.mark.extras('mmpretrain')
@pytest.mark.parametrize('name', ['replk-nano_shapes.py', 'convnext-atto_shapes.py'])
def test_count_equals_mmpretrains_classifier(name):
    from mmengine.registry import MODELS, init_default_scope

    cfg = copy.deepcopy(load(name))
    init_default_scope('mmpretrain')
    theirs, ours = MODELS.build(cfg.model), build_on_meta(load(name))
    assert params_m(theirs) == params_m(ours)
    weights = {re.sub('head.fc', 'head', key): value for key, value in theirs.state_dict().items()}
    ours = ours.to_empty(device='cpu')
    ours.load_state_dict({key: value for key, value in weights.items() if not key.startswith('data_preprocessor')})
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(image), theirs.eval()(image))


# ---- the page of the command list_configs


def test_page_has_every_classifier():
    lines = {
        line.split('](')[0].lstrip('| ['): line for line in (ROOT / 'docs' / 'configs.md').read_text().splitlines()
    }
    for name, row in ROWS.items():
        line = lines[name.removesuffix('.py')]
        assert f'| {row["backbone"]} | {row["pretraining"]} | ImageNet-1K | {row["crop"]} |' in line
        assert f'| {row["top1"]} | {row["params_m"]} |' in line
    assert 'generated shapes' in lines['convnext-atto_shapes'] and list_configs.TASKS['mmpretrain'].title
