"""Class names: each disagreement between data, annotations, heads and checkpoints is named before a run."""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from class_cases import BOTH, OWN, at, coco_config, own, refusal  # noqa: F401 (a fixture)
from coco_files import change, write_coco_root
from mmengine.config import Config
from tiny import make_data, tiny  # noqa: F401 (a fixture)
from tiny_detector import detector  # noqa: F401 (a fixture)

from replk_mm.data.class_checks import check_heads, compare_with_checkpoint, snippet, trained_on
from replk_mm.data.class_heads import head_counts
from replk_mm.data.classes import set_classes
from replk_mm.data.demo_scenes import DEMO_CLASSES
from replk_mm.engine.config import build_model
from replk_mm.engine.machine import Options
from replk_mm.engine.prepare import counts_of, prepare_data
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


# -- annotation files and data sets -----------------------------------------------------------------------------------
def test_categories_that_are_no_classes_are_refused(own):
    message = refusal(at(own))
    first = message.splitlines()[0]
    assert first.startswith(str(own / 'annotations/instances_train2017.json'))
    assert '2 of its 3 categories are none of the 80 classes of the data set: helmet (4 objects), vest (4 objects)' in first
    assert "CocoDataset's own, for train_dataloader.dataset has no metainfo" in message
    assert 'person, bicycle, car' in message and '(80)' in message
    assert '8 of 12 objects would be left out without a word' in message
    assert 'trained and scored on traffic light only' in message
    assert "--classes 'helmet,vest,traffic light'" in message


def test_what_is_refused_is_what_mmdet_leaves_out(own):
    """mmdet itself: of 12 objects four remain, no word of it."""
    from mmdet.datasets import CocoDataset
    file = own / 'annotations/instances_train2017.json'
    data = CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[])
    assert sum(len(data.get_data_info(i)['instances']) for i in range(len(data))) == 4
    assert '8 of 12 objects would be left out' in refusal(at(own))


@pytest.mark.parametrize('classes', ['helmet,vest,traffic light', 'auto'])
def test_named_classes_are_accepted(own, classes):
    cfg = at(own)
    notes = prepare_data(cfg, Options(classes=classes), BOTH)
    assert head_counts(cfg.model) == {'model.roi_head.bbox_head': 3, 'model.roi_head.mask_head': 3}
    assert notes[0].startswith('classes: 3, from') and 'helmet, vest, traffic light' in notes[0]


def test_snippet_is_the_same_as_the_option(own, tmp_path):
    for name in ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'):
        base = coco_config(name)
        base.dump(tmp_path / 'base.py')
        cfg = Config.fromfile(str(tmp_path / 'base.py'))
        (tmp_path / 'own.py').write_text('\n'.join(snippet(cfg, OWN)))
        found = Config.fromfile(str(tmp_path / 'own.py'))
        set_classes(base, OWN)
        assert head_counts(found.model) == head_counts(base.model)
        for split in ('train', 'val', 'test'):
            assert tuple(found[f'{split}_dataloader'].dataset.metainfo.classes) == OWN
        found.model.pop('_delete_', None)
        assert found.model == base.model
    assert all(f'  {line}' in refusal(at(own)).splitlines() for line in snippet(at(own), OWN))


def test_command_is_ready_to_paste(own, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tools/train.py', 'configs/a b.py', '--classes', 'helm,vest', '--data-root', str(own)])
    message = refusal(at(own), 'helm,vest')
    command = next(line.strip() for line in message.splitlines() if line.strip().startswith('python tools/train.py'))
    assert shlex.split(command) == ['python', 'tools/train.py', 'configs/a b.py', '--data-root', str(own), '--classes',
                                    ','.join(OWN)]


def test_spelling_is_recognised_and_can_be_mended_in_the_file(tmp_path):
    root = write_coco_root(tmp_path / 'data', ('Person', 'traffic_light', 'car'))
    file = root / 'annotations/instances_train2017.json'
    message = refusal(at(root))
    assert 'Person (4 objects; did you mean person?), traffic_light (4 objects; did you mean traffic light?)' in message
    command = next(line.strip() for line in message.splitlines() if 'python -c' in line)
    exec(command.removeprefix('python -c "').removesuffix('"'), {})
    assert [c['name'] for c in json.loads(file.read_text())['categories']] == ['person', 'traffic light', 'car']
    assert 'instances_val2017.json' in refusal(at(root)).splitlines()[0]


def test_files_that_disagree_are_named(tmp_path):
    root = write_coco_root(tmp_path / 'data', ('helmet', 'vest'), ('helmet', 'jacket'))
    for classes in ('auto', 'helmet,vest'):
        message = refusal(at(root), classes)
        assert 'instances_val2017.json' in message.splitlines()[0] and 'jacket' in message.splitlines()[0]
        assert ('val_dataloader.dataset and train_dataloader.dataset disagree: only the first has jacket, only the second vest'
                in message)
        assert '--classes helmet,jacket,vest' in message
    assert prepare_data(at(root), Options(classes='helmet,jacket,vest'), BOTH)


def follow(message: str, folder: Path, monkeypatch) -> str:
    """What a message advises for ``--classes``, its commands run as a shell does."""
    monkeypatch.chdir(folder)
    lines = [line.strip() for line in message.splitlines()]
    for line in lines:
        if line.startswith('printf '):
            subprocess.run(line, shell=True, check=True)
    return next(shlex.split(line)[1] for line in lines if line.startswith('--classes'))


@pytest.mark.parametrize('train', [[f'kind {i}' for i in range(21)], ['helmet, yellow', 'vest']])
def test_advice_holds_for_both_files(tmp_path, monkeypatch, train):
    """Many names, or names with commas, cannot be given as they are, and ``auto`` looks into the first file only."""
    root = write_coco_root(tmp_path / 'data', train, [*train, 'jacket'])
    for file in (root / 'annotations').iterdir():  # every category occurs
        change(file, lambda d: d['annotations'].extend(
            {**d['annotations'][0], 'id': 100 + i, 'category_id': c['id']} for i, c in enumerate(d['categories'])))
    advice = follow(refusal(at(root), 'auto'), tmp_path, monkeypatch)
    assert prepare_data(at(root), Options(classes=advice), BOTH)


def test_advice_is_auto_where_one_word_is_enough(tmp_path):
    root = write_coco_root(tmp_path / 'data', [f'kind {i}' for i in range(21)])
    assert '  --classes auto' in refusal(at(root)).splitlines()


def test_advice_for_one_file_beside_another(tmp_path, monkeypatch):
    """Tests look at theirs only; ``auto`` would take the names of the training data."""
    root = write_coco_root(tmp_path / 'data', ['other'], [f'kind {i}' for i in range(21)])
    advice = follow(refusal(at(root), splits=('val',)), tmp_path, monkeypatch)
    assert prepare_data(at(root), Options(classes=advice), ('val',))


def test_category_more_in_validation_is_not_taken_for_a_choice(tmp_path):
    root = write_coco_root(tmp_path / 'data', ('helmet', 'vest'), ('helmet', 'vest', 'jacket'))
    assert 'jacket' in refusal(at(root), 'auto').splitlines()[0]


def test_some_of_the_80_classes_are_enough(tmp_path):
    root = write_coco_root(tmp_path / 'data', ('person', 'bicycle', 'car'))
    notes = prepare_data(at(root), Options(), BOTH)
    assert [n for n in notes if 'occur' in n] == [
        f'{root}/annotations/instances_{split}2017.json: 3 of 80 classes occur: person, bicycle, car' for split in BOTH]


def test_some_of_the_categories_may_be_chosen(own):
    notes = prepare_data(at(own), Options(classes='vest'), BOTH)
    assert any('categories left out, the classes being vest: helmet, traffic light' in note for note in notes)


def test_categories_without_objects_do_no_harm(tmp_path):
    """As some programs write one above all others."""
    root = write_coco_root(tmp_path / 'data', ('person', 'car'))
    for file in (root / 'annotations').iterdir():
        change(file, lambda d: d['categories'].insert(0, dict(id=0, name='objects')))
    assert prepare_data(at(root), Options(), BOTH)


def test_nothing_left_to_learn_is_said(tmp_path):
    root = write_coco_root(tmp_path / 'data', ('helmet', 'vest'))
    cfg = at(root)
    cfg.train_dataloader.dataset.filter_cfg = None
    assert 'nothing be left to learn: AP would be 0' in refusal(cfg)


def test_photographs_train_with_three_of_80_classes(reference):
    notes = prepare_data(at(reference / 'data/camvid/coco'), Options(), BOTH)
    assert sum('3 of 80 classes occur: person, bicycle, car' in note for note in notes) == 2


# -- heads ------------------------------------------------------------------------------------------------------------
def test_heads_and_data_must_have_one_number(own):
    cfg = at(own)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=OWN)
    message = refusal(cfg)
    assert 'train_dataloader.dataset has 3 classes (helmet, vest, traffic light)' in message
    settings = ['model.roi_head.bbox_head.num_classes', 'model.roi_head.mask_head.num_classes']
    assert all(f'{setting}=80' in message for setting in settings)
    assert f'--cfg-options {settings[0]}=3 {settings[1]}=3' in message
    cfg.merge_from_dict(dict.fromkeys(settings, 3))
    assert prepare_data(cfg, Options(), BOTH)


def test_settings_reach_heads_in_lists(own):
    cfg = at(own, name='cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=OWN)
    settings = next(line for line in refusal(cfg).splitlines() if '--cfg-options' in line).split()[1:]
    cfg.merge_from_dict({key: int(value) for key, _, value in (setting.partition('=') for setting in settings)})
    assert prepare_data(cfg, Options(), BOTH)


def test_heads_whose_config_states_no_number_are_looked_at_too(own):
    cfg = at(own)
    for head in (cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        head.pop('num_classes')  # mmdet's default is COCO's 80
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=OWN)
    prepare_data(cfg, Options(), BOTH)
    with pytest.raises(UserError, match=r'has 3 classes .*model.roi_head.bbox_head.num_classes=80'):
        check_heads(cfg, counts_of(build_model(cfg, 'meta')), BOTH)


def test_heads_that_disagree_are_refused(own):
    cfg = at(own)
    cfg.model.roi_head.mask_head.num_classes = 3
    assert 'model.roi_head.bbox_head.num_classes=80, model.roi_head.mask_head.num_classes=3' in refusal(cfg)


def test_segmentation_heads_and_data_must_have_one_number(tiny, tmp_path):
    with pytest.raises(UserError, match=r'train_dataloader.dataset has 3 classes .a, b, c.*model.decode_head.num_classes=8'):
        tiny.prepare(tmp_path, 2, {f'{split}_dataloader.dataset.metainfo.classes': ['a', 'b', 'c'] for split in BOTH})


# -- checkpoints ------------------------------------------------------------------------------------------------------
def test_a_checkpoint_carries_its_classes(detector, tmp_path):
    data = write_coco_root(tmp_path / 'data', OWN)
    last = detector.train(tmp_path / 'work', 1, data_root=str(data), classes='auto')
    loaded = torch.load(last, weights_only=False)
    assert trained_on(loaded['meta']) == list(OWN)
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


@pytest.mark.parametrize('meta', [{}, {'dataset_meta': None}, {'dataset_meta': {'classes': None}}, {'dataset_meta': 'x'}])
def test_checkpoints_without_names_pass(own, meta):
    assert trained_on(meta) == []
    compare_with_checkpoint(at(own), meta, 'x.pth')


def test_older_checkpoints_name_their_classes_in_capitals():
    assert trained_on({'dataset_meta': {'CLASSES': ('a', 'b')}}) == ['a', 'b']


def test_segmentor_trains_with_classes_of_its_own(tiny, tmp_path):
    data = make_data(tmp_path / 'data', 2, 1)
    names = [f'kind {i}' for i in range(len(DEMO_CLASSES))]
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    last = tiny.train(tmp_path / 'work', 1, data_root=str(data), classes=str(tmp_path / 'names.txt'))
    assert trained_on(torch.load(last, weights_only=False)['meta']) == names
