"""Names that a data set's type has too: whose label ids they are is found in the data, and a guess is not made in silence."""
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from replk_mm.data.class_checks import compare_with_checkpoint
from replk_mm.data.classes import CLASSES_FILE, use_classes
from replk_mm.engine.machine import Options
from replk_mm.engine.prepare import prepare_data
from replk_mm.errors import UserError

NAMES = ('person', 'car', 'tree')
#: Of ADE20K's 150 classes, as their files count them from 1.
PERSON, CAR, TREE = 13, 21, 5


def write_maps(root: Path, *maps) -> Path:
    for folder in ('images/training', 'annotations/training'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, ids in enumerate(maps):
        Image.new('RGB', (8, 8)).save(root / f'images/training/{i}.jpg')
        Image.fromarray(np.resize(np.array(ids, np.uint8), (8, 8))).save(root / f'annotations/training/{i}.png')
    return root


def ade20k(root: Path, kind: str = 'ADE20KDataset', **options) -> Config:
    leaf = dict(type=kind, data_root=str(root), pipeline=[dict(type='LoadAnnotations')], **options,
                data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'))
    return Config(dict(default_scope='mmseg', model=dict(decode_head=dict(type='FCNHead', num_classes=150)),
                       train_dataloader=dict(dataset=leaf)))


def prepare(cfg: Config, classes: str) -> list[str]:
    return prepare_data(cfg, Options(classes=classes), ('train',))


def labels_read(cfg: Config, i: int = 0) -> set[int]:
    """What mmseg makes of a label map."""
    init_default_scope('mmseg')
    data = DATASETS.build(cfg.train_dataloader.dataset)
    return set(np.unique(data[i]['gt_seg_map']).tolist())


@pytest.mark.parametrize('how', ['auto', 'file'])
def test_names_in_the_data_root_are_what_ids_count(tmp_path, how):
    root = write_maps(tmp_path, [0, 1, 2, 3])
    (root / CLASSES_FILE).write_text('\n'.join(NAMES))
    cfg = ade20k(root)
    notes = prepare(cfg, 'auto' if how == 'auto' else str(root / CLASSES_FILE))
    assert any('label ids 1..3 are these, 0 is ignored' in note for note in notes)
    assert labels_read(cfg) == {255, 0, 1, 2}


def test_ids_that_count_the_named_classes_are_not_taken_for_the_types(tmp_path):
    root = write_maps(tmp_path / 'my data', [0, 1, 2, 255], [1, 3])
    with pytest.raises(UserError) as info:
        prepare(ade20k(root), ','.join(NAMES))
    first, *rest = str(info.value).splitlines()
    assert first.startswith(str(root / 'annotations/training'))
    assert 'label ids 1, 2, 3 are none of the 3 classes' in first and f'person {PERSON}, car {CAR}, tree {TREE}' in first
    command = next(line for line in rest if 'printf' in line)
    subprocess.run(command, shell=True, check=True)
    assert '--classes auto' in '\n'.join(rest)
    cfg = ade20k(root)
    prepare(cfg, 'auto')
    assert labels_read(cfg) == {255, 0, 1}


def test_ids_from_0_are_recognised_too(tmp_path):
    root = write_maps(tmp_path, [0, 1])
    with pytest.raises(UserError, match='label ids 0, 1 are none of the 2 classes .* rider 12'):
        prepare(ade20k(root, 'CityscapesDataset', img_suffix='.jpg', seg_map_suffix='.png'), 'person,rider')


@pytest.mark.parametrize(('maps', 'said'), [
    ([[0, PERSON, 1]], 'person'), ([[1, 2], [CAR, TREE]], 'car, tree'), ([[4, 7]], 'none')])
def test_classes_may_be_picked_where_ids_are_the_types(tmp_path, maps, said):
    root = write_maps(tmp_path, *maps)
    cfg = ade20k(root)
    notes = prepare(cfg, ','.join(NAMES))
    count = 0 if said == 'none' else said.count(',') + 1
    assert any(f'{count} of 3 classes picked from those of ADE20KDataset occur in {len(maps)} label maps looked into: {said};'
               in note for note in notes)
    if maps[0][1] == PERSON:
        assert labels_read(cfg) == {255, 0}


def test_only_listed_label_maps_count(tmp_path):
    root = write_maps(tmp_path, [1, 2], [PERSON])
    (root / 'list.txt').write_text('0\n')
    with pytest.raises(UserError, match='label ids 1, 2 are none'):
        prepare(ade20k(root, ann_file='list.txt'), ','.join(NAMES))


def test_a_name_with_a_space_at_its_end(tmp_path):
    """mmseg's ADE20K has one; no command line can give it."""
    from mmseg.datasets import ADE20KDataset
    known = ADE20KDataset.METAINFO['classes']
    assert 'bed ' in known
    root = write_maps(tmp_path, [known.index('bed ') + 1, PERSON])
    cfg = ade20k(root)
    prepare(cfg, 'person,bed')
    assert cfg.train_dataloader.dataset.type == 'ADE20KDataset' and labels_read(cfg) == {0, 1}
    cfg = ade20k(root)
    assert len(use_classes(cfg, ','.join(known), ('train',))) == 1, 'nothing but the names to say'
    for trained, classes in ((known, 'a,b'), ([name.strip() for name in known], ','.join(known))):
        cfg = ade20k(root)
        use_classes(cfg, classes, ('train',))
        meta = {'dataset_meta': {'classes': trained}}
        if classes == 'a,b':
            with pytest.raises(UserError) as info:
                compare_with_checkpoint(cfg, meta, 'x.pth', ('train',))
            use_classes(cfg, shlex.split(str(info.value).splitlines()[-1])[-1], ('train',))
        compare_with_checkpoint(cfg, meta, 'x.pth', ('train',))


def test_a_checkpoint_of_counted_names_advises_to_count_them(tmp_path):
    root = write_maps(tmp_path, [1, 2, 3])
    (root / CLASSES_FILE).write_text('\n'.join(NAMES))
    with pytest.raises(UserError, match='--classes auto$'):
        compare_with_checkpoint(ade20k(root), {'dataset_meta': {'classes': NAMES}}, 'x.pth', ('train',))
    with pytest.raises(UserError, match='--classes car,tree$'):
        compare_with_checkpoint(ade20k(root), {'dataset_meta': {'classes': NAMES[1:]}}, 'x.pth', ('train',))
