"""The quoted numbers against their source, queries of them, and the table of configs."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from replk_mm import published
from replk_mm.backbones import ConvNeXtRoadmap
from replk_mm.backbones.catalogue import recipe_of
from replk_mm.commands import list_configs
from replk_mm.errors import UserError

FACTS = Path(__file__).parent / 'data' / 'facts'


@pytest.fixture(scope='module')
def facts() -> dict:
    return yaml.safe_load((FACTS / 'published.yaml').read_text())


@pytest.fixture(scope='module')
def more_facts() -> dict:
    return yaml.safe_load((FACTS / 'published_more.yaml').read_text())


def schedule(row: dict) -> str:
    # The caption of table 6 of ConvNeXt V2 states the batch of all rows.
    batch = ', batch 32' if 'epochs' in row and row.get('source', '').startswith('convnextv2') else ''
    text = str(row['iters']).replace('k', 'k iterations') if 'iters' in row else f'{row["epochs"]} epochs{batch}'
    return re.sub(r' \((batch 32)\)', r', \1', text)


def identity(row: dict) -> tuple:
    # YAML ends the name of the method at the comma of "(4 convs + 1 fc, SyncBN, GIoU)".
    method = row.get('method', 'UperNet').replace(' (4 convs + 1 fc', '')
    parts = (row.get('dataset', 'COCO'), method, row.get('crop'), schedule(row))
    return row['backbone'], row['pretraining'], *parts


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_rows_equal_the_source(facts, more_facts, task):
    ours = {
        (r.backbone, r.pretraining, r.dataset, r.method, r.crop, r.schedule): r
        for r in published.results()
        if r.task == task
    }
    theirs = {identity(row): row for row in (*more_facts[task], *facts[task])}
    assert len(theirs) == len(more_facts[task]) + len(facts[task]) and set(ours) == set(theirs)
    for key, result in ours.items():
        row = theirs[key]
        assert dict(result.metrics) == {k: row[k] for k in published.METRICS if row.get(k) is not None}
        assert (result.params_m, result.flops_g) == (row['params_m'], row['flops_g'])
        assert (result.input and list(result.input)) == row['input']
        source = row.get('source', '').partition(' (')[0]
        assert result.where in ('readme and paper', 'Papers-with-Code listing') or result.where in source
        assert result.note or 'note' not in row


def test_rows_of_classification_equal_the_source(more_facts):
    ours = {
        (r.backbone, r.pretraining if r.pretraining not in ('none', 'ImageNet-1K') else None, r.crop): r
        for r in published.results()
        if r.task == 'classification'
    }
    theirs = {
        (row['model'], row['pretraining'], row['resolution']): row
        for row in more_facts['classification']
        if re.fullmatch(r'(RepLKNet|ConvNeXt)-\w+', row['model'])
    }
    assert set(ours) == set(theirs) and len(ours) == 22
    for key, result in ours.items():
        row = theirs[key]
        assert result.metrics == {'top1': row['top1']} and result.input == (row['resolution'],) * 2
        assert (result.params_m, result.flops_g) == (row['params_m'], row['flops_g'])
        assert f'{result.where}' in row['source'] and (result.note or 'note' not in row)


@pytest.mark.parametrize('name', ['kernel_size_study', 'guidelines', 'effective_receptive_field'])
def test_tables_equal_the_source(facts, name):
    assert published.table(name) == facts[name]


def test_steps_of_convnext_equal_the_source(more_facts):
    ours = published.table('convnext_modernization')
    assert {
        regime: [{key: value for key, value in row.items() if key != 'arch'} for row in rows]
        for regime, rows in ours.items()
    } == more_facts['convnext_modernization']
    for regime, rows in ours.items():
        archs = [row['arch'] for row in rows if 'arch' in row]
        assert archs[0] == archs[1]  # trained by two recipes
        number = regime.removeprefix('resnet').removesuffix('_regime')
        assert archs[1:] == [arch for arch in ConvNeXtRoadmap.arch_settings if arch.startswith(f'{number}-')]


def test_recipes_equal_the_source(facts):
    assert set(published.table('recipes')) | {'convnext_upernet_test'} >= set(facts['recipes'])
    for name, theirs in facts['recipes'].items():
        ours = published.table('recipes').get(name)
        if ours is None:
            continue
        for key in (
            'optimizer',
            'lr',
            'betas',
            'weight_decay',
            'norm_decay_mult',
            'drop_path',
            'layer_scale_init',
            'norm',
            'checkpointing',
            'align_corners',
            'augmentation',
        ):
            assert key not in theirs or ours[key] == theirs[key], (name, key)
        for key in ('milestones', 'epochs'):
            assert ours['schedule'].get(key) == theirs.get(key), (name, key)
        for variant, layers in ours.get('num_layers', {}).items():
            assert layers == theirs['num_layers'].get(variant.split('-')[0], theirs['num_layers'].get('others'))


def test_further_recipes_equal_the_source(more_facts):
    """Numbers of the facts: one for all variants, one for each, or the first one of a text."""
    dense = {name for name in more_facts['recipes'] if not re.search('imagenet|convnextv2|internimage_coco', name)}
    compared = set()
    for name in dense:
        ours, theirs = published.table('recipes')[name], more_facts['recipes'][name]
        for key in ('lr', 'betas', 'weight_decay', 'drop_path', 'global_batch'):
            variants = ours[key] if isinstance(ours.get(key), dict) else {None: ours.get(key)}
            for variant, value in variants.items() if key in theirs and key in ours else ():
                stated = theirs[key]
                if isinstance(stated, dict):
                    stated = next(
                        (stated[part] for part in (variant, *str(variant).split('-')) if part in stated), stated
                    )
                if isinstance(stated, str) and re.match(r'[\d.]', stated) and '(XT' not in stated:
                    stated = float(stated.split()[0])
                if not isinstance(stated, (str, dict)):
                    assert value == stated, (name, key, variant)
                    compared.add(name)
    assert compared == dense


@pytest.mark.parametrize(
    ('backbone', 'method', 'lr', 'drop_path', 'paramwise'),
    [
        ('MogaNet-S', 'Cascade Mask R-CNN', 2e-4, 0.1, {'custom_keys': ['layer_scale', 'scale', 'norm']}),
        ('MogaNet-B', 'Cascade Mask R-CNN', 1e-4, 0.2, {'decay_rate': 0.8, 'num_layers': 12}),
        ('MogaNet-L', 'Cascade Mask R-CNN', 1e-4, 0.3, {'decay_rate': 0.8, 'num_layers': 12}),
        ('MogaNet-B', 'Mask R-CNN', 1e-4, 0.2, {'custom_keys': ['layer_scale', 'scale', 'norm']}),
        ('InternImage-B', 'Mask R-CNN', 1e-4, 0.4, {'decay_rate': 1.0}),
        ('InternImage-XL', 'Cascade Mask R-CNN', 2e-4, 0.6, {'decay_rate': 0.9, 'custom_keys': ['offset']}),
        ('MSCAN-L', 'SegNeXt', 6e-5, 0.3, {'custom_keys': ['head', 'norm', 'pos_block']}),
        ('VAN-B6', 'UperNet', 6e-5, 0.5, {'custom_keys': ['norm']}),
        ('RDNet-S', 'UperNet', 8e-5, 0.2, {'decay_type': 'stage_wise', 'custom_keys': ['backbone', 'head']}),
    ],
)
def test_recipe_of_a_row(backbone, method, lr, drop_path, paramwise):
    row = next(r for r in published.results() if (r.backbone, r.method) == (backbone, method) and r.recipe)
    recipe = recipe_of(row)
    assert (recipe.lr, recipe.drop_path, recipe.global_batch) == (lr, drop_path, 16)
    found = {**recipe.paramwise_cfg}
    keys = found.pop('custom_keys', None)
    assert keys is None or list(keys) == paramwise.pop('custom_keys')
    for key, factors in (keys or {}).items():
        # seven dense stages are counted, and the heads as two later ones
        rdnet = {'backbone': {'lr_mult': pytest.approx(0.9**-4)}, 'head': {'lr_mult': pytest.approx(0.9**-2)}}
        others = {'offset': {'lr_mult': 0.01}, 'head': {'lr_mult': 10}}
        assert factors == (rdnet if 'RDNet' in backbone else others).get(key, {'decay_mult': 0.0})
    assert paramwise.items() <= found.items() and bool(found) == bool(paramwise)


def test_every_row_cites_a_paper_and_a_repository():
    sources = published.table('sources')
    assert len({source['paper'] for source in sources.values()}) == len(sources) == 12
    for result in published.results():
        assert re.fullmatch(r'arXiv:\d{4}\.\d{5}, [\w-]+/[\w-]+', result.source) and result.where
        if result.family not in ('MSCAN', 'ConvNeXt'):
            assert result.family.lower() in result.source.lower().replace('convnext-v2', 'convnextv2')


@pytest.mark.parametrize('config', ['configs/upernet_replk31b_ade20k.py', 'upernet_replk31b_ade20k'])
def test_result_of_a_config(config):
    result = published.for_config(config)
    assert (result.backbone, result.pretraining, result.crop) == ('RepLKNet-31B', 'ImageNet-1K', 512)
    assert result.metrics == {'miou_ss': 49.9, 'miou_ms': 50.6}


def test_result_of_a_detector():
    result = published.for_config('fcos_replk31b_coco.py')
    assert (result.task, result.method, result.dataset, result.schedule) == ('detection', 'FCOS', 'COCO', '24 epochs')
    assert result.metrics == {'ap_box': 47.0} and result.crop is None


@pytest.mark.parametrize('config', ['upernet_replk-nano_ade20k.py', 'upernet_convnext-base_cityscapes.py'])
def test_config_without_a_published_result(config):
    assert published.for_config(config) is None


def test_every_recipe_and_variant_of_a_row_exists():
    for result in filter(lambda result: result.recipe, published.results()):
        recipe = published.table('recipes')[result.recipe]
        assert result.variant is None or result.variant in recipe['drop_path']


ROW = list_configs.ConfigRow(
    path=Path('configs/upernet_replk31b_ade20k.py'),
    scope='mmseg',
    backbone='RepLKNet-31B',
    pretraining='ImageNet-1K',
    data='ADE20K',
    variant='512',
    schedule='160k iterations, batch 32',
    params_m=113.37,
    result=published.for_config('upernet_replk31b_ade20k'),
)


def test_markdown_row():
    line = list_configs.to_markdown([ROW], '../configs').splitlines()[-1]
    assert [cell.strip() for cell in line.strip('|').split('|')] == [
        '[upernet_replk31b_ade20k](../configs/upernet_replk31b_ade20k.py)',
        'RepLKNet-31B',
        'ImageNet-1K',
        'ADE20K',
        '512',
        '160k iterations, batch 32',
        '49.9 / 50.6',
        '112',
        '113.4',
    ]


def test_missing_metric_is_a_dash():
    row = dataclasses.replace(
        ROW,
        path=Path('configs/fcos_replk31b_coco.py'),
        scope='mmdet',
        data='COCO',
        variant='FCOS',
        schedule='24 epochs, batch 16',
        result=published.for_config('fcos_replk31b_coco'),
    )
    head, line = [list_configs.to_markdown([ROW, row]).splitlines()[i] for i in (-3, -1)]
    assert '| Method |' in head and 'AP box / mask (quoted)' in head
    assert line.endswith('| COCO | FCOS | 24 epochs, batch 16 | 47.0 / – | 87 | 113.4 |')


def test_folder_without_configs_is_rejected(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        list_configs.read_configs(tmp_path)
