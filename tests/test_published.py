"""The quoted numbers against their source, queries of them, and the table of configs."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from replk_mm import published
from replk_mm.commands import list_configs
from replk_mm.errors import UserError

FACTS = Path(__file__).parent / 'data' / 'facts'
#: Published in the first two papers; all their rows are here.
FIRST = ('RepLKNet', 'ConvNeXt')


@pytest.fixture(scope='module')
def facts() -> dict:
    return yaml.safe_load((FACTS / 'published.yaml').read_text())


@pytest.fixture(scope='module')
def more_facts() -> dict:
    return yaml.safe_load((FACTS / 'published_more.yaml').read_text())


def identity(row: dict) -> tuple:
    parts = (row.get('dataset', 'COCO'), row.get('method', 'UperNet'), row.get('crop'))
    return row['backbone'], row['pretraining'], *parts


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_rows_equal_the_source(facts, more_facts, task):
    ours = {(r.backbone, r.pretraining, r.dataset, r.method, r.crop): r for r in published.results() if r.task == task}
    theirs = {identity(row): row for row in more_facts[task]} | {identity(row): row for row in facts[task]}
    assert {key for key in ours if key[0].split('-')[0] in FIRST} == {identity(row) for row in facts[task]}
    for key, result in ours.items():
        row = theirs[key]
        assert dict(result.metrics) == {k: row[k] for k in published.METRICS if row.get(k) is not None}
        assert (result.params_m, result.flops_g) == (row['params_m'], row['flops_g'])
        assert (result.input and list(result.input)) == row['input']
        assert result.crop == row.get('crop')
        length = f'{row["iters"]} iterations' if 'iters' in row else f'{row["epochs"]} epochs'
        assert result.schedule == length


@pytest.mark.parametrize('name', ['kernel_size_study', 'guidelines', 'effective_receptive_field'])
def test_tables_equal_the_source(facts, name):
    assert published.table(name) == facts[name]


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


def test_every_row_cites_a_paper_and_a_repository():
    for result in published.results():
        cited = {
            'RepLKNet': ('2203.06717', 'DingXiaoH/RepLKNet-pytorch'),
            'ConvNeXt': ('2201.03545', 'facebookresearch/ConvNeXt'),
            'ConvNeXtV2': ('2301.00808', 'facebookresearch/ConvNeXt-V2'),
        }.get(result.family, ('arXiv:', '/'))
        assert all(part in result.source for part in cited)


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
