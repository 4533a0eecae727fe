"""A metric that compares detections with the annotations of other images is refused, and what to do instead works."""
import json
import subprocess
from pathlib import Path

import pytest
from coco_files import change, leaf, write_coco_root
from mmengine.config import Config

from replk_mm import cli
from replk_mm.data.checks import check_data
from replk_mm.errors import UserError

NAMES = ('person', 'car', 'dog')


def test_metric_must_have_the_data_sets_own_file(tmp_path):
    root = write_coco_root(tmp_path / 'data', NAMES)

    def cfg(scored: str) -> Config:
        return Config(dict(default_scope='mmdet', val_dataloader=dict(dataset=leaf(root, 'val')), val_evaluator=dict(
            type='CocoMetric', ann_file=f'{root}/{scored}', metric='bbox')))

    assert check_data(cfg('annotations/../annotations/instances_val2017.json'), ('val',), None)
    with pytest.raises(UserError, match='val_evaluator.ann_file=.*another annotation file') as info:
        check_data(cfg('annotations/instances_train2017.json'), ('val',), None)
    assert f'--cfg-options val_evaluator.ann_file={root}/annotations/instances_val2017.json' in str(info.value)


@pytest.mark.parametrize('listed', [False, True])
@pytest.mark.parametrize('folder', ['data', 'da$HOME', 'my data', 'a,b'])
def test_advice_on_the_metrics_file_works(tmp_path, listed, folder):
    root = write_coco_root(tmp_path / folder, NAMES)
    metric = dict(type='CocoMetric', ann_file=f'{root}/annotations/instances_train2017.json', metric='bbox')
    cfg = Config(dict(default_scope='mmdet', val_dataloader=dict(dataset=leaf(root, 'val')),
                      val_evaluator=[dict(type='DumpResults'), metric] if listed else metric))
    with pytest.raises(UserError) as info:
        check_data(cfg, ('val',), None)
    place = 'val_evaluator.1' if listed else 'val_evaluator'
    assert str(info.value).startswith(f'{place}.ann_file=')
    command, right = str(info.value).rpartition('--cfg-options')[1:], f'{root}/annotations/instances_val2017.json'
    if folder in ('my data', 'a,b'):  # no such value can be given
        assert not command[0] and f'set it to {right!r} in the config' in str(info.value)
        return
    words = subprocess.run(['bash', '-c', f'printf "%s\\n" {"".join(command)}'], capture_output=True, text=True, check=True)
    p = cli.parser('', '')
    cli.add_config_options(p)
    cfg.merge_from_dict(p.parse_args(words.stdout.splitlines()).cfg_options)
    assert check_data(cfg, ('val',), None)


def both(root: Path, metric: dict, key: str = 'val_evaluator') -> Config:
    return Config({'default_scope': 'mmdet', key: metric, 'val_dataloader': dict(dataset=dict(
        type='ConcatDataset', datasets=[leaf(root, 'val'), leaf(root)]))})


def test_data_sets_whose_image_ids_collide_are_not_scored_together(tmp_path):
    """pycocotools' own index has one image for two."""
    root = write_coco_root(tmp_path / 'data', NAMES)
    file = f'{root}/annotations/instances_val2017.json'
    own = dict(type='mmdet.CocoMetric', ann_file=file)
    for metric in (dict(type='CocoMetric'), own, [own]):
        with pytest.raises(UserError, match='2 data sets are scored together, and 4 image ids occur in more than one') as info:
            check_data(both(root, metric), ('val',), None)
        assert str(info.value).startswith('val_evaluator.0: ' if isinstance(metric, list) else 'val_evaluator: ')
    others = dict(type='MultiDatasetsEvaluator', metrics=[dict(type='CocoMetric')] * 2, dataset_prefixes=['a', 'b'])
    for fine in (both(root, others), both(root, dict(type='CocoMetric'), 'test_evaluator')):
        assert sum(line.startswith('data') for line in check_data(fine, ('val',), None)) == 2


def test_data_sets_with_ids_of_their_own_may_be_scored_with_a_file_that_has_all(tmp_path):
    root = write_coco_root(tmp_path / 'data', NAMES)

    def shift(d):
        for image in d['images']:
            image['id'] += 100
        for a in d['annotations']:
            a.update(id=a['id'] + 100, image_id=a['image_id'] + 100)

    files = {split: root / f'annotations/instances_{split}2017.json' for split in ('train', 'val', 'both')}
    change(files['train'], shift)
    parts = [json.loads(files[split].read_text()) for split in ('train', 'val')]
    joined = {key: parts[0][key] + parts[1][key] for key in ('images', 'annotations')}
    files['both'].write_text(json.dumps({**parts[0], **joined}))
    assert check_data(both(root, dict(type='CocoMetric')), ('val',), None)
    assert check_data(both(root, dict(type='CocoMetric', ann_file=str(files['both']))), ('val',), None)
    with pytest.raises(UserError, match='does not have 4 of the 8 images of the 2 data sets .*: ids 101, 102'):
        check_data(both(root, dict(type='CocoMetric', ann_file=str(files['val']))), ('val',), None)
    change(files['both'], lambda d: d['images'][0].update(file_name='other.jpg'))
    with pytest.raises(UserError, match='does not have 1 of the 8 images .*: ids 101'):
        check_data(both(root, dict(type='CocoMetric', ann_file=str(files['both']))), ('val',), None)
    with pytest.raises(UserError, match='no such file'):
        check_data(both(root, dict(type='CocoMetric', ann_file=str(root / 'gone.json'))), ('val',), None)
