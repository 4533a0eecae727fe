"""Classes on which data, annotations, heads and checkpoints disagree are an error before a run."""

import pytest
import torch
from class_cases import BOTH, OWN, at, own, rejection  # noqa: F401 (a fixture)
from coco_files import change, coco_dict, write_coco_root
from mmdet.datasets import CocoDataset
from tiny import make_data, tiny  # noqa: F401 (a fixture)
from tiny_detector import detector  # noqa: F401 (a fixture)

from replk_mm.data.checks.classes import check_heads, checkpoint_classes, compare_with_checkpoint
from replk_mm.data.class_heads import classes_per_head
from replk_mm.data.classes import set_classes
from replk_mm.data.scenes.spec import DEMO_CLASSES
from replk_mm.engine.config import build_model
from replk_mm.engine.prepare import head_class_counts, prepare_data
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def test_categories_that_are_no_classes(own):
    """mmdet itself ignores them silently: of 12 objects four remain."""
    file = own / 'annotations/instances_train2017.json'
    data = CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[])
    assert sum(len(data.get_data_info(i)['instances']) for i in range(len(data))) == 4
    message = rejection(at(own))
    first = message.splitlines()[0]
    assert first.startswith(f'{file}: 2 of its 3 categories') and 'helmet (4 objects), vest (4 objects)' in first
    assert '8 of 12 objects' in first and "--classes 'helmet,vest,traffic light'" in message


@pytest.mark.parametrize('classes', ['helmet,vest,traffic light', 'auto'])
def test_named_classes_are_accepted(own, classes):
    cfg = at(own)
    notes = prepare_data(cfg, RunOptions(classes=classes), BOTH)
    assert classes_per_head(cfg.model) == {'model.roi_head.bbox_head': 3, 'model.roi_head.mask_head': 3}
    assert notes[0].startswith('classes: 3, from') and 'helmet, vest, traffic light' in notes[0]


def test_order_of_mmdet_is_a_warning(own):
    for kind, warned in (('CocoDataset', True), ('replk_mm.CocoDataset', False)):
        cfg = at(own)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.type = kind
        notes = prepare_data(cfg, RunOptions(classes='vest,helmet,traffic light'), BOTH)
        assert any('helmet, vest, traffic light' in note and 'replk_mm.CocoDataset' in note for note in notes) is warned


def test_misspelled_categories_get_a_suggestion(tmp_path):
    root = write_coco_root(tmp_path / 'data', ('Person', 'traffic_light', 'car'))
    message = rejection(at(root))
    assert 'Person (4 objects; Did you mean person?)' in message
    assert 'traffic_light (4 objects; Did you mean traffic light?)' in message


@pytest.mark.parametrize('classes', ['auto', 'helmet,vest'])
def test_annotation_files_that_disagree(tmp_path, classes):
    root = write_coco_root(tmp_path / 'data', ('helmet', 'vest'), ('helmet', 'jacket'))
    message = rejection(at(root), classes)
    assert 'instances_val2017.json' in message.splitlines()[0] and 'jacket' in message.splitlines()[0]
    assert '--classes helmet,vest,jacket' in message
    assert prepare_data(at(root), RunOptions(classes='helmet,vest,jacket'), BOTH)


@pytest.mark.parametrize('names', [[f'kind {i}' for i in range(21)], ['helmet, yellow', 'vest']])
def test_many_names_and_names_with_commas_need_a_file(tmp_path, names):
    root = write_coco_root(tmp_path / 'data', names)
    assert f'--classes FILE, with these {len(names)} names, one per line: {names[0]}' in rejection(at(root))


def test_fewer_categories_than_heads(tmp_path):
    """The user chooses: heads for the categories of the training data, or for all classes, which the config names."""
    root = write_coco_root(tmp_path / 'data', ('person', 'bicycle', 'car'))
    for file in (root / 'annotations').iterdir():
        change(file, lambda d: d['categories'].insert(0, dict(id=0, name='objects')))
    message = rejection(at(root))
    assert message.startswith(f'{root}/annotations/instances_train2017.json: has 4 categories') and '80' in message
    assert '--classes auto' in message
    (tmp_path / 'coco.txt').write_text('\n'.join(CocoDataset.METAINFO['classes']))
    notes = prepare_data(at(root), RunOptions(classes=str(tmp_path / 'coco.txt')), BOTH)
    assert any(note.startswith('warning: ') and '77 of 80 classes do not occur' in note for note in notes)
    assert prepare_data(at(root), RunOptions(), ('test',)), 'a test set may lack classes'
    train = root / 'annotations/instances_train2017.json'
    change(train, lambda d: d.update(categories=coco_dict(CocoDataset.METAINFO['classes'])['categories']))
    assert prepare_data(at(root), RunOptions(), BOTH), 'categories without objects'


def test_subset_of_the_categories(own):
    notes = prepare_data(at(own), RunOptions(classes='vest'), BOTH)
    assert any('are none of the 1 classes of train_dataloader.dataset (vest): helmet' in note for note in notes)


def test_photographs_train_with_their_three_classes(reference):
    notes = prepare_data(at(reference / 'data/camvid/coco'), RunOptions(classes='auto'), BOTH)
    assert sum('3 of 3 classes occur' in note for note in notes) == 2


def test_heads_with_another_number_than_the_data(own):
    cfg = at(own)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=OWN)
    message = rejection(cfg)
    assert 'train_dataloader.dataset has 3 classes (helmet, vest, traffic light)' in message
    settings = ['model.roi_head.bbox_head.num_classes', 'model.roi_head.mask_head.num_classes']
    assert all(f'{setting}=80' in message for setting in settings)
    assert f'set the heads: --cfg-options {settings[0]}=3 {settings[1]}=3' in message
    cfg.merge_from_dict(dict.fromkeys(settings, 3))
    assert prepare_data(cfg, RunOptions(), BOTH)


def test_heads_whose_config_states_no_number(own):
    cfg = at(own)
    for head in (cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        head.pop('num_classes')  # mmdet's default is COCO's 80
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=OWN)
    prepare_data(cfg, RunOptions(), BOTH)
    with pytest.raises(UserError, match=r'has 3 classes .*model.roi_head.bbox_head.num_classes=80'):
        check_heads(cfg, head_class_counts(build_model(cfg, 'meta')), BOTH)


def test_segmentation_heads_with_another_number_than_the_data(tiny, tmp_path):
    with pytest.raises(UserError, match=r'dataset has 3 classes .a, b, c.*model.decode_head.num_classes=8'):
        tiny.prepare(tmp_path, 2, {f'{split}_dataloader.dataset.metainfo.classes': ['a', 'b', 'c'] for split in BOTH})


@pytest.mark.slow
def test_checkpoint_with_other_classes(detector, tmp_path):
    data = write_coco_root(tmp_path / 'data', OWN)
    last = detector.train(tmp_path / 'work', 1, data_root=str(data), classes='auto')
    loaded = torch.load(last, weights_only=False)
    assert checkpoint_classes(loaded['meta']) == list(OWN)
    assert loaded['state_dict']['roi_head.bbox_head.2.fc_cls.weight'].shape[0] == 4
    assert loaded['state_dict']['roi_head.mask_head.2.conv_logits.weight'].shape[0] == 3
    cfg = at(data)
    with pytest.raises(UserError, match='was trained on 3 classes') as info:
        compare_with_checkpoint(cfg, loaded['meta'], str(last))
    assert "--classes 'helmet,vest,traffic light'" in str(info.value)
    set_classes(cfg, OWN)
    compare_with_checkpoint(cfg, loaded['meta'], str(last))
    set_classes(cfg, OWN[::-1])
    with pytest.raises(UserError, match='test_dataloader.dataset has 3 in another order'):
        compare_with_checkpoint(cfg, loaded['meta'], str(last))
    with pytest.raises(UserError, match='in another order'):
        detector.train(tmp_path / 'work', 2, data_root=str(data), classes='vest,helmet,traffic light', resume='auto')


@pytest.mark.parametrize('meta', [{}, *({'dataset_meta': found} for found in (None, {'classes': None}, 'x'))])
def test_checkpoints_without_classes_pass(own, meta):
    assert checkpoint_classes(meta) == []
    compare_with_checkpoint(at(own), meta, 'x.pth')


def test_older_checkpoints_have_classes_in_capitals():
    assert checkpoint_classes({'dataset_meta': {'CLASSES': ('a', 'b')}}) == ['a', 'b']


@pytest.mark.slow
def test_segmentor_trains_with_other_classes(tiny, tmp_path):
    data = make_data(tmp_path / 'data', 2, 1)
    names = [f'kind {i}' for i in range(len(DEMO_CLASSES))]
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    last = tiny.train(tmp_path / 'work', 1, data_root=str(data), classes=str(tmp_path / 'names.txt'))
    assert checkpoint_classes(torch.load(last, weights_only=False)['meta']) == names
