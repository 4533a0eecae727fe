"""Configs: they parse, follow the published recipes to the letter, and build models of the published size."""
import ast
import copy
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from replk_mm.bench import config_table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
LEAVES = sorted(p.name for p in CONFIGS.glob('upernet_*_ade20k*.py'))
NANO = [name for name in LEAVES if '-nano_' in name]

# Read here once more, not through the package's own reader: the published rows that have a config, by its name.
PUBLISHED = yaml.safe_load((ROOT / 'replk_mm' / 'bench' / 'published.yaml').read_text())
ROWS = {row['config']: row for row in PUBLISHED['segmentation'] if row['config']}
RECIPES = PUBLISHED['recipes']

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


@cache
def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def build(cfg: Config, device: str = 'meta') -> torch.nn.Module:
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry, torch.device(device):
        return registry.build(copy.deepcopy(cfg.model))


@cache
def meta_model(name: str) -> torch.nn.Module:
    return build(load(name))


def optimizer_of(name: str) -> torch.optim.Optimizer:
    cfg = copy.deepcopy(load(name).optim_wrapper)
    if cfg.type == 'AmpOptimWrapper':  # needs a GPU; it wraps the same optimizer
        cfg = {**{k: v for k, v in cfg.items() if k not in ('dtype', 'loss_scale')}, 'type': 'OptimWrapper'}
    with MODELS.switch_scope_and_registry('mmseg'):
        return build_optim_wrapper(meta_model(name), cfg).optimizer


def groups_by_name(name: str) -> dict[str, dict]:
    """Parameter name to what the optimizer does with it."""
    of = {id(p): group for group in optimizer_of(name).param_groups for p in group['params']}
    return {n: of[id(p)] for n, p in meta_model(name).named_parameters()}


def bases(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            value = ast.literal_eval(node.value)
            return [value] if isinstance(value, str) else value
    return []


def depth(path: Path) -> int:
    """Levels of inheritance, the file itself included; mmseg's own base files inherit nothing."""
    return 1 + max((1 if '::' in base else depth(path.parent / base) for base in bases(path)), default=0)


# ---- the files

def test_file_names_and_published_rows_map_one_to_one():
    rows = [row['config'] for row in PUBLISHED['segmentation'] if row['dataset'] == 'ADE20K']
    assert sorted(rows) == sorted(set(LEAVES) - set(NANO)) and len(rows) == 10
    assert len(NANO) == 2


@pytest.mark.parametrize('name', LEAVES)
def test_leaf_is_short_and_shallow(name):
    path = CONFIGS / name
    assert len(path.read_text().splitlines()) <= 40
    assert depth(path) <= 3


def test_depth_sees_a_deep_chain(tmp_path):
    (tmp_path / 'a.py').write_text("_base_ = 'mmseg::_base_/default_runtime.py'\n")
    (tmp_path / 'b.py').write_text("_base_ = './a.py'\n")
    (tmp_path / 'c.py').write_text("_base_ = ['./b.py']\n")
    assert depth(tmp_path / 'c.py') == 4


@pytest.mark.parametrize('name', LEAVES)
def test_header_states_command_recipe_and_source(name):
    text = (CONFIGS / name).read_text()
    header = text[:text.index('_base_')]
    assert f'python tools/train.py configs/{name}' in header
    row = ROWS.get(name)
    if row is None:
        assert 'Published: none' in header and 'CPU' in header
        return
    batch = load(name).train_dataloader.batch_size
    assert f'8 GPUs x {batch} images (global batch {8 * batch}), 160k iterations' in header
    assert f'mIoU {row["miou_ss"]} single-scale' in header and f'{row["miou_ms"]} multi-scale' in header
    source = PUBLISHED['sources'][row['source']]
    assert source['paper'] in header and source['repository'] in header
    assert 'quoted' in header and 'not reproduced' in header


# ---- the recipe, row by row

@pytest.mark.parametrize('name', ROWS)
def test_model_follows_the_row(name):
    cfg, row = load(name), ROWS[name]
    recipe = RECIPES[row['recipe']]
    backbone, channels = cfg.model.backbone, CHANNELS[row['backbone']]
    assert backbone.type == 'replk_mm.' + row['backbone'].split('-')[0]
    assert backbone.arch == ARCH[row['backbone']]
    assert backbone.drop_path_rate == recipe['drop_path'][row['variant']]
    assert list(backbone.out_indices) == [0, 1, 2, 3]
    assert cfg.model.decode_head.in_channels == channels
    assert cfg.model.auxiliary_head.in_channels == channels[2] and cfg.model.auxiliary_head.in_index == 2
    assert (cfg.model.decode_head.channels, cfg.model.auxiliary_head.channels) == (512, 256)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        assert head.num_classes == 150 and head.norm_cfg.type == 'SyncBN'
    if backbone.type == 'replk_mm.RepLKNet':
        assert backbone.norm_cfg.type == recipe['norm'] and backbone.with_cp is recipe['checkpointing']
        assert backbone.small_kernel_merged is False
        assert backbone.get('norm_intermediate_features', False) is (row['backbone'] == 'RepLKNet-XL')
    else:
        assert backbone.layer_scale_init_value == recipe['layer_scale_init']
        assert backbone.gap_before_final_norm is False


@pytest.mark.parametrize('name', ROWS)
def test_data_follows_the_row(name):
    cfg, row = load(name), ROWS[name]
    recipe, crop = RECIPES[row['recipe']], row['crop']
    short = recipe['short_side'][crop]
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.size == (crop, crop)
    if recipe.get('mean_std', {}).get(row['variant']) == 127.5:
        assert preprocessor.mean == [127.5] * 3 and preprocessor.std == [127.5] * 3
    else:
        assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.std == [58.395, 57.12, 57.375]
    train = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert train['RandomCrop'].crop_size == (crop, crop)
    assert train['RandomResize'].scale == (4 * short, short) and train['RandomResize'].ratio_range == (0.5, 2.0)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert {t.type: t for t in loader.dataset.pipeline}['Resize'].scale == (4 * short, short)
    resizes = cfg.tta_pipeline[1].transforms[0]
    assert [t.scale[1] for t in resizes] == [short * r for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
    assert cfg.train_dataloader.dataset.data_root == 'data/ade/ADEChallengeData2016'
    test = recipe['test'][crop]
    assert cfg.model.test_cfg.mode == test['mode']
    if test['mode'] == 'slide':
        assert cfg.model.test_cfg.crop_size == (crop, crop)
        assert cfg.model.test_cfg.stride == (test['stride'], test['stride'])


@pytest.mark.parametrize('name', ROWS)
def test_optimization_follows_the_row(name):
    cfg, row = load(name), ROWS[name]
    recipe, wrapper = RECIPES[row['recipe']], cfg.optim_wrapper
    lr = recipe['lr'][row['variant']] if isinstance(recipe['lr'], dict) else recipe['lr']
    assert wrapper.optimizer == {
        'type': recipe['optimizer'], 'lr': lr, 'betas': tuple(recipe['betas']), 'weight_decay': recipe['weight_decay']}
    assert 8 * cfg.train_dataloader.batch_size == recipe['global_batch'] == cfg.auto_scale_lr.base_batch_size
    assert cfg.train_cfg.max_iters == row['iters'] == recipe['schedule']['iters']
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 16000
    assert cfg.default_hooks.checkpoint.save_best == 'mIoU'
    if recipe['amp']:
        assert (wrapper.type, wrapper.dtype) == ('AmpOptimWrapper', recipe['amp'])
    else:
        assert wrapper.type == 'OptimWrapper'
    if 'layer_decay' in recipe:
        assert wrapper.paramwise_cfg == {
            'decay_type': recipe['layer_decay']['type'], 'decay_rate': recipe['layer_decay']['rate'],
            'num_layers': recipe['num_layers'][row['variant']]}
    else:
        assert wrapper.paramwise_cfg == {'norm_decay_mult': recipe['norm_decay_mult']}


@pytest.mark.parametrize('name', ROWS)
def test_weights_are_published_and_of_this_backbone(name):
    init, row = load(name).model.backbone.init_cfg, ROWS[name]
    entry = next(e for e in PUBLISHED['weights'] if e['url'] == init.checkpoint)
    assert init.type == 'Pretrained' and entry['backbone'] == row['backbone']
    assert init.get('prefix') == ('backbone.' if entry['keys'] == 'mmpretrain' else None)
    header = (CONFIGS / name).read_text().partition('_base_')[0]
    assert entry['pretraining'].startswith(row['pretraining'])
    # Where only weights with one more training are public, the header must say so.
    assert (entry['pretraining'] == row['pretraining']) != ('fine-tuned on ImageNet-1K' in header)


def test_learning_rate_warms_up_then_falls_linearly():
    cfg = load('upernet_replk31b_ade20k.py')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in cfg.param_scheduler]
    seen = []
    for _ in range(3001):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for t in (0, 1, 10, 100, 750, 1400, 1500, 2000, 3000):
        warmup = 1 - (1 - min(t, 1500) / 1500) * (1 - 1e-6)
        assert seen[t] == pytest.approx(2e-4 * (1 - t / 160000) * warmup, rel=2e-3)
    assert cfg.param_scheduler[-1].end == 160000 and cfg.param_scheduler[-1].eta_min == 0


# ---- what they build

@pytest.mark.parametrize('name', ROWS)
def test_parameters_are_within_2_percent_of_the_published(name):
    params_m = sum(p.numel() for p in meta_model(name).parameters()) / 1e6
    assert params_m == pytest.approx(ROWS[name]['params_m'], rel=0.02)
    assert config_table.count_params_m(load(name)) == params_m


@pytest.mark.parametrize('name', [n for n in ROWS if 'replk' in n])
def test_the_replknet_authors_count_the_deployed_model_without_the_auxiliary_head(name):
    cfg = copy.deepcopy(load(name))
    cfg.model.auxiliary_head = None
    cfg.model.backbone.small_kernel_merged = True
    params_m = sum(p.numel() for p in build(cfg).parameters()) / 1e6
    assert params_m == pytest.approx(ROWS[name]['params_m'], rel=0.004)
    if 'replk31b' in name:
        study = {row['name']: row['ade20k_params_m'] for row in PUBLISHED['kernel_size_study']}
        assert params_m == pytest.approx(study['RepLKNet-31'], rel=0.002)


# By hand, from the authors' description of the stage-wise decay: the learning rate of the head is lr; that of stage S
# (0 to 3) and of everything between the stages falls by 0.9 a step, counted from num_layers + 1.
DECAY = {
    'upernet_convnext-tiny_ade20k.py': {'between': 7, 'stages': [6, 5, 4, 3]},
    'upernet_convnext-base_ade20k.py': {'between': 13, 'stages': [12, 11, 10, 9]},
    'upernet_convnext-xlarge-in22k_ade20k-640.py': {'between': 13, 'stages': [12, 11, 10, 9]},
}


@pytest.mark.parametrize('name', DECAY)
def test_convnext_learning_rates_decay_by_stage(name):
    lr = 8e-5 if 'xlarge' in name else 1e-4
    for parameter, group in groups_by_name(name).items():
        parts = parameter.split('.')
        steps = 0
        if parts[:2] == ['backbone', 'downsample_layers']:
            steps = DECAY[name]['between']
        elif parts[:2] == ['backbone', 'stages']:
            steps = DECAY[name]['stages'][int(parts[2])]
        assert group['lr'] == pytest.approx(lr * 0.9**steps), parameter
        shape = meta_model(name).get_parameter(parameter).shape
        decayed = len(shape) > 1 and not parameter.endswith('.bias')
        assert group['weight_decay'] == (0.05 if decayed else 0.0), parameter


def test_convnext_output_norms_learn_at_the_full_rate():
    groups = groups_by_name('upernet_convnext-tiny_ade20k.py')
    assert {groups[f'backbone.norm{i}.weight']['lr'] for i in range(4)} == {1e-4}


@pytest.mark.parametrize('name', ['upernet_replk31b_ade20k.py', 'upernet_replkxl-meg73m_ade20k-640.py', *NANO])
def test_norms_have_no_weight_decay(name):
    model, norms = meta_model(name), (_BatchNorm, torch.nn.LayerNorm)
    of_norms = {f'{n}.{p}' for n, m in model.named_modules() if isinstance(m, norms) for p, _ in m.named_parameters()}
    assert of_norms
    for parameter, group in groups_by_name(name).items():
        assert group['weight_decay'] == (0.0 if parameter in of_norms else 0.05), parameter


@pytest.mark.parametrize('name', NANO)
def test_nano_models_learn_on_a_cpu(name):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    torch.manual_seed(0)
    model = build(load(name), 'cpu').train()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 64)))) for _ in range(2)]
    losses = model.loss(torch.randn(2, 3, 64, 64), samples)
    loss = sum(v for k, v in losses.items() if 'loss' in k)
    # An untrained network guesses among 150 classes; the auxiliary head counts 0.4.
    assert loss.item() == pytest.approx(1.4 * math.log(150), rel=0.25)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 20e6


# ---- the data pipelines, on photographs of 480x360 in ADE20K's layout

@pytest.fixture(scope='module')
def ade(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('ade')
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        image = rng.integers(0, 256, (360, 480, 3), dtype=np.uint8)
        labels = np.zeros((360, 480), np.uint8)  # left third: 0, no label; middle: 1; right: 150
        labels[:, 160:320], labels[:, 320:] = 1, 150
        Image.fromarray(image).save(root / 'images' / split / 'a.jpg')
        Image.fromarray(labels).save(root / 'annotations' / split / 'a.png')
    return root


def first_sample(cfg: Config, loader: str, root: Path, **changes):
    dataset = copy.deepcopy(cfg[loader].dataset)
    dataset.update(data_root=str(root), **changes)
    with DATASETS.switch_scope_and_registry('mmseg') as registry:
        return registry.build(dataset)[0]


PIPELINES = {  # a config of each dataset file: short side, crop
    'upernet_replk-nano_ade20k.py': (384, 256),
    'upernet_replk31b_ade20k.py': (512, 512),
    'upernet_replk31l-in22k_ade20k-640.py': (512, 640),
    'upernet_convnext-large-in22k_ade20k-640.py': (640, 640),
}


@pytest.mark.filterwarnings('ignore:`reduce_zero_label` will be deprecated')
@pytest.mark.parametrize('name', PIPELINES)
def test_pipelines_deliver_the_sizes_and_labels(name, ade):
    cfg, (short, crop) = load(name), PIPELINES[name]
    train = first_sample(cfg, 'train_dataloader', ade)
    assert train['inputs'].shape[0] == 3 and max(train['inputs'].shape[1:]) <= crop
    # The small models learn at the stride of their logits.
    stride = 4 if 'nano' in name else 1
    assert train['inputs'].shape[1:] == tuple(stride * s for s in train['data_samples'].gt_sem_seg.data.shape[1:])
    val = first_sample(cfg, 'val_dataloader', ade)
    assert val['inputs'].shape == (3, short, round(short * 4 / 3))
    tta = first_sample(cfg, 'test_dataloader', ade, pipeline=cfg.tta_pipeline)
    ratios = (0.75, 1.0, 1.25) if 'nano' in name else (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert [x.shape[1] for x in tta['inputs']] == [int(short * r) for r in ratios for _ in (False, True)]
    assert [s.flip for s in tta['data_samples']] == [False, True] * len(ratios)
    for sample in (val['data_samples'], *tta['data_samples']):
        labels = sample.gt_sem_seg.data[0]  # never resized and never flipped: the metric's own size
        assert labels.shape == (360, 480)
        assert [int(labels[0, x]) for x in (0, 200, 479)] == [255, 0, 149]


# ---- the pages that a command writes

@pytest.fixture(scope='module')
def rows() -> list[config_table.Row]:
    return config_table.read_configs(CONFIGS)


def test_the_table_names_every_config_and_its_published_figures(rows):
    lines = {line.split('](')[0].lstrip('| ['): line for line in config_table.to_markdown(rows).splitlines()}
    assert {Path(name).stem for name in LEAVES} <= set(lines)
    for name, row in ROWS.items():
        assert f'| {row["miou_ss"]} / {row["miou_ms"]} | {row["params_m"]} |' in lines[Path(name).stem]
        assert f'batch {RECIPES[row["recipe"]]["global_batch"]} |' in lines[Path(name).stem]


def test_the_page_and_the_readme_are_as_the_command_writes_them(rows):
    assert (ROOT / 'docs' / 'configs.md').read_text() == config_table.page(rows), config_table.COMMAND
    readme = (ROOT / 'README.md').read_text()
    assert readme == config_table.update_readme(readme, rows), config_table.COMMAND
