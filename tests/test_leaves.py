"""Data sets that read the same files, as a whole or in part, and those that only seem to."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from check_data_cases import PREFIX, found, full, kinds, seg_config
from coco_files import coco_dict, leaf, write_images
from many_pairs import data  # noqa: F401
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from replk_mm.data import duplicates
from replk_mm.data.audit import audit
from replk_mm.data.checks import check_data
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)

SPLITS = ('train', 'val')
NAMES = ('person', 'car', 'dog')


def images(root: Path) -> list[Path]:
    return sorted((root / 'images/training').iterdir())


def said_at_the_start(cfg: Config, what: str, classes: int | None = 8) -> list[str]:
    return [text for text in check_data(cfg, SPLITS, classes) if what in text]


def both(cfg: Config) -> list[set[tuple[str, str]]]:
    """What the whole check finds, and what the quick one does."""
    return [found(full(cfg)), found(audit(cfg, jobs=1))]


# -- trained with, and scored -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('split', ['val', 'test'])
def test_a_list_of_images_that_are_trained_with(data, split):
    names = [path.stem for path in images(data)]
    (data / 'val.txt').write_text('\n'.join(names[1:4]))
    cfg = seg_config(data)
    cfg.pop('val_dataloader')
    cfg[f'{split}_dataloader'] = dict(dataset={**cfg.train_dataloader.dataset, 'ann_file': 'val.txt'})
    assert both(cfg) == [{('leak', str(path)) for path in images(data)[1:4]}] * 2
    (text,) = [text for text in check_data(cfg, ('train', split), 8) if 'warning' in text]
    assert text.startswith(f'warning: {images(data)[1]}: ') and text.endswith('(and 2 more such files)')


@pytest.mark.parametrize('folder', ['images', './images', 'other/../images'])
def test_an_annotation_file_of_images_that_are_trained_with(tmp_path, folder):
    whole = coco_dict(NAMES, 8)
    some = {**whole, 'images': whole['images'][:5], 'annotations': [a for a in whole['annotations'] if a['image_id'] <= 5]}
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'other').mkdir()
    for split, content in (('train', whole), ('val', some)):
        (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))
    write_images(tmp_path / 'images', 8)
    loaders = {f'{split}_dataloader': dict(dataset=leaf(tmp_path, split, data_prefix=dict(img=name), metainfo=dict(
        classes=NAMES))) for split, name in (('train', 'images'), ('val', folder))}
    cfg = Config(dict(default_scope='mmdet', model=dict(bbox_head=dict(num_classes=3)), **loaders), cfg_text=' ')
    for found_here in both(cfg):
        assert {kind for kind, _ in found_here} == {'leak'} and len(found_here) == 5
    assert len(said_at_the_start(cfg, 'trained with', None)) == 1
    assert '(and 4 more such files)' in said_at_the_start(cfg, 'trained with', None)[0]


@pytest.mark.parametrize('spelling', ['images/training', 'images/training/', './images//training', 'link'])
@pytest.mark.parametrize('changes', [{}, dict(reduce_zero_label=False), dict(metainfo=dict(classes=tuple('abcdefgh')))])
def test_the_same_folder_under_another_spelling(data, spelling, changes):
    """One message of it, and none of each of its images."""
    (data / 'link').symlink_to('images/training')
    cfg = seg_config(data, 9)
    cfg.val_dataloader = dict(dataset={**cfg.train_dataloader.dataset, **changes, 'data_prefix': dict(
        img_path=spelling, seg_map_path='annotations/training')})
    for found_here in both(cfg):
        about = {(kind, where) for kind, where in found_here if kind in ('same-data', 'leak', 'duplicate-image')}
        assert about == {('same-data', 'val_dataloader.dataset')}
    assert said_at_the_start(cfg, 'the same', 9) + said_at_the_start(cfg, 'trained with', 9) == [
        'warning: val_dataloader.dataset: reads the same files as train_dataloader.dataset']


@pytest.mark.parametrize(('first', 'second', 'same'), [
    ('{cwd}/a.jpg', 'a.jpg', True), ('x/a.jpg', 'x/./a.jpg', True), ('x/a.jpg', 'x/../x//a.jpg', True),
    ('x/a.jpg', 'a.jpg', False), ('/a.jpg', 'a.jpg', False), ('link/a.jpg', 'x/a.jpg', True), ('x/a.jpg', 'x/b.jpg', False)])
def test_one_file_by_two_paths(tmp_path, monkeypatch, first, second, same):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'link').symlink_to('x')
    monkeypatch.chdir(tmp_path)
    images = dict(train=[first.format(cwd=tmp_path)], val=[second])
    assert [problem.path for problem in duplicates.same_names(images)] == [second] * same
    assert [problem.path for problem in duplicates.find(images, {}).get('val', [])] == [second] * same


def test_what_is_validated_and_tested_on_may_be_the_same(data):
    cfg = seg_config(data)
    cfg.test_dataloader = cfg.val_dataloader
    assert both(cfg) == [set(), set()]
    assert not [text for text in check_data(cfg, (*SPLITS, 'test'), 8) if 'warning' in text]


def test_an_image_that_training_reads_twice_is_no_leak(data):
    names = [path.stem for path in images(data)]
    (data / 'some.txt').write_text('\n'.join(names[:2]))
    cfg = seg_config(data)
    one = cfg.train_dataloader.dataset
    cfg.train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[one, {**one, 'ann_file': 'some.txt'}]))
    assert both(cfg) == [set(), set()] and not said_at_the_start(cfg, 'warning')


# -- the same folders -------------------------------------------------------------------------------------------------
@pytest.fixture
def mixed(data) -> Config:
    """Training with a data set for each of two suffixes in one folder."""
    for path in images(data)[3:]:
        Image.open(path).save(path.with_suffix('.png'))
        path.unlink()
    cfg = seg_config(data)
    one = cfg.train_dataloader.dataset
    cfg.train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[one, {**one, 'img_suffix': '.png'}]))
    return cfg


def test_two_suffixes_in_one_folder_are_two_data_sets(mixed):
    init_default_scope('mmseg')
    parts = [DATASETS.build({**part, 'lazy_init': True, 'pipeline': []}).load_data_list()
             for part in mixed.train_dataloader.dataset.datasets]
    result = full(mixed)
    assert not kinds(result)
    assert [[task.image for task in one.survey.tasks] for one in result.sets[:2]] == [
        [info['img_path'] for info in part] for part in parts]
    assert not said_at_the_start(mixed, 'warning')


def test_labels_of_the_second_suffix_are_looked_at(data, mixed):
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(data / 'annotations/training' / f'{images(data)[4].stem}.png')
    assert kinds(full(mixed)) == {'label-out-of-range'}
    with pytest.raises(UserError, match='label ids 99 are beyond') as info:
        check_data(mixed, SPLITS, 8)


def test_a_suffix_that_no_data_set_reads_is_still_said(data, mixed):
    shutil.copy(images(data)[0], images(data)[0].with_suffix('.JPEG'))
    assert {(kind, path) for kind, path in found(full(mixed)) if kind == 'suffix-ignored'} == {
        ('suffix-ignored', str(images(data)[0].with_suffix('.JPEG')))}
    assert 'do not end with .jpg or .png' in said_at_the_start(mixed, 'warning')[0]


@pytest.mark.parametrize(('changes', 'refused'), [
    (dict(reduce_zero_label=False), True), (dict(reduce_zero_label=True), False),
    (dict(seg_map_suffix='_fine.png'), True), (dict(type='ADE20KDataset', metainfo=dict(classes=('wall', 'martian'))), True)])
def test_the_same_images_by_other_rules_are_looked_at_again(data, changes, refused):
    """With 0 as a class, 8 is beyond 8 classes; no label map has the other suffix; ADE20K has no class 'martian'."""
    cfg = seg_config(data)
    one = dict(cfg.train_dataloader.dataset, data_prefix=dict(PREFIX['train']))
    cfg.train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[one, {**one, **changes}]))
    assert bool(kinds(full(cfg), 'error')) == refused
    if refused:
        with pytest.raises(UserError):
            check_data(cfg, SPLITS, 8)
    else:
        check_data(cfg, SPLITS, 8)
