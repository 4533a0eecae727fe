"""What an evaluation changes in a config."""

from pathlib import Path

import pytest
from mmengine.config import Config

from replk_mm.engine.evaluate import _export_predictions


def sets_of(*roots: str) -> Config:
    parts = [dict(type='ADE20KDataset', data_root=root, data_prefix=dict(img_path='images')) for root in roots]
    return Config(dict(test_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=parts))))


@pytest.mark.parametrize(
    'roots, common', [(['/d/a'], '/d/a/images'), (['/d/a', '/d/b'], '/d'), (['/d/a/b', '/d/a'], '/d/a')]
)
def test_label_maps_keep_the_folders_below_what_all_data_sets_share(roots, common):
    cfg = sets_of(*roots)
    cfg.test_evaluator = [dict(type='replk_mm.IoUMetric'), dict(type='mmseg.IoUMetric')]
    assert _export_predictions(cfg, Path('out')) == []
    assert cfg.test_evaluator == [
        dict(type='replk_mm.IoUMetric', output_dir='out', images_root=common),
        dict(type='mmseg.IoUMetric', output_dir='out'),
    ]


def test_every_coco_metric_has_its_own_files():
    cfg = sets_of('/d')
    cfg.test_evaluator = [dict(type='CocoMetric'), dict(type='VOCMetric'), dict(type='mmdet.CocoMetric')]
    [note] = _export_predictions(cfg, Path('out'))
    assert note.startswith('predictions: not written; test_evaluator.1.type=VOCMetric')
    assert [metric.get('outfile_prefix') for metric in cfg.test_evaluator] == ['out/instances', None, 'out/instances_2']
