"""Which release of a published data set it is, and whether it has all of its images."""
from pathlib import Path

import numpy as np
import pytest
from check_data_cases import full, kinds, line, seg_config
from coco_files import leaf, write_coco_root
from many_pairs import data  # noqa: F401
from mmengine.config import Config
from PIL import Image

from replk_mm.data import releases
from replk_mm.data.checks import check_data

# ruff: noqa: F811 (fixtures that come from another file)

NAMES = ('person', 'car', 'dog')


@pytest.mark.parametrize('files', [
    ['images/ADE/training/work_place/studio/ADE_train_00000001.jpg'],
    ['ADE20K_2021_17_01/images/ADE/training/a/b/ADE_train_00000001_seg.png'], ['index_ade20k.mat'],
    ['images/training/a/abbey/ADE_train_00000970.jpg', 'images/training/a/abbey/ADE_train_00000970_seg.png'],
    ['images/training/abbey/ADE_train_1.jpg', 'images/training/abbey/ADE_train_1_parts_1.png'],
    ['images/training/ADE_train_1.jpg', 'images/training/ADE_train_1_atr.txt']])
def test_full_release_of_ade_is_not_the_benchmark(tmp_path, files):
    for file in files:
        (tmp_path / 'ade' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'ade' / file).touch()
    result = full(seg_config(tmp_path / 'ade', 150, type='ADE20KDataset'))
    assert 'ade-full-release' in kinds(result, 'error')
    problem = next(problem for _, problem in result.found() if problem.kind == 'ade-full-release')
    assert 'ADEChallengeData2016.zip' in problem.advice
    if files == ['index_ade20k.mat']:
        pass


def test_benchmark_beside_the_full_release_is_fine(data):
    (data / 'index_ade20k.mat').touch()
    assert not kinds(full(seg_config(data)), 'error')


@pytest.mark.parametrize(('changes', 'said'), [
    (dict(type='ADE20KDataset'), True), (dict(type='BaseSegDataset'), False),
    (dict(type='ADE20KDataset', metainfo=dict(classes=('wall', 'sky'))), False)])
def test_counts_are_compared_for_published_data_only(data, changes, said):
    classes = 150 if 'metainfo' not in changes else 2
    assert ('count-differs' in kinds(full(seg_config(data, classes, **changes)))) == said


@pytest.mark.parametrize('beside', ['x_seg.png', 'x_parts_1.png', 'x_atr.txt'])
@pytest.mark.parametrize('folder', ['images/training', 'images/ADE'])
def test_names_that_others_use_too_are_not_the_full_release(tmp_path, beside, folder):
    (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / folder / 'x.jpg')
    (tmp_path / folder / beside).touch()
    cfg = seg_config(tmp_path, data_prefix=dict(img_path=folder, seg_map_path='labels'))
    cfg.pop('val_dataloader')
    result = full(cfg)
    assert 'folder-missing' in kinds(result) and 'ade-full-release' not in kinds(result)
    assert line(result, 'folder-missing').startswith(f'{tmp_path}/labels: no such folder')


def test_other_counts_are_said_when_training_starts(data, monkeypatch):
    cfg = seg_config(data, 150, type='ADE20KDataset')
    expected = [f'note: {data}: 6 images of the train data set; allowed: 20,210, as ADE20KDataset is published',
                f'note: {data}: 3 images of the val data set; allowed: 2,000, as ADE20KDataset is published']
    assert [text for text in check_data(cfg, ('train', 'val'), 150) if 'published' in text] == expected
    monkeypatch.setitem(releases.COUNTS, ('mmseg', 'ADE20KDataset'), dict(train=6, val=3))
    assert len(check_data(cfg, ('train', 'val'), 150)) == 2


def boxes(root: Path, split: str, **changes) -> Config:
    dataset = leaf(write_coco_root(root, NAMES), 'train', metainfo=dict(classes=None), **changes)
    return Config(dict(default_scope='mmdet', model={}, **{f'{split}_dataloader': dict(dataset=dataset)}), cfg_text=' ',
                  filename='own.py')


@pytest.mark.parametrize(('kind', 'split', 'said'), [
    ('CocoDataset', 'train', True), ('mmdet.CocoDataset', 'train', True), ('replk_mm.CocoDataset', 'val', True),
    ('CocoDataset', 'test', False), ('CityscapesDataset', 'train', False), ('mmdet.CityscapesDataset', 'val', False)])
def test_counts_of_boxes_are_not_those_of_label_maps(tmp_path, kind, split, said):
    """mmdet's type of the same name as mmseg's has annotations of fewer images; test data are not validation data."""
    cfg = boxes(tmp_path / 'data', split, type=kind)
    found = {problem.kind for _, problem in full(cfg).found()}
    assert ('count-differs' in found) == said


@pytest.mark.parametrize(('kind', 'split', 'said'), [
    ('CityscapesDataset', 'train', True), ('mmseg.CityscapesDataset', 'val', True), ('CityscapesDataset', 'test', False)])
def test_label_maps_that_are_tested_on_may_be_of_any_number(data, kind, split, said):
    cfg = seg_config(data, 19, type=kind, img_suffix='.jpg', seg_map_suffix='.png', reduce_zero_label=False)
    loader = cfg.pop('train_dataloader')
    cfg.pop('val_dataloader')
    cfg[f'{split}_dataloader'] = loader
    assert ('count-differs' in kinds(full(cfg))) == said
