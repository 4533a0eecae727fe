"""Figures of several processes are those of one, whatever they share out, and no pickle crosses between them."""
import json

import numpy as np
import pytest
import torch
from rank_cases import in_new_python
from tiny_detector import write_coco

from replk_mm.engine.gather import _bytes, _value

PROCESSES = (1, 2, 3, 7)  # of 5 images
SCRIPT = """
import json, pathlib, pickle, sys
import numpy as np
import torch
import mmengine.fileio.handlers.pickle_handler as handler
from mmengine.dataset import DefaultSampler
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from PIL import Image
from pycocotools.coco import COCO
from replk_mm.engine.coco_metric import CocoMetric
from replk_mm.engine.metrics import IoUMetric
from replk_mm.errors import UserError
from rank_cases import together

folder = pathlib.Path(sys.argv[1])
data = folder / 'data'
MMLogger.get_instance('quiet', log_level='CRITICAL')
CLASSES = ('car', 'person', 'dog')


def refuse(*args, **kwargs):
    raise AssertionError('a pickle')


def dealt(processes, seed=None):
    sampler = DefaultSampler(range(5), shuffle=seed is not None, seed=seed or 0)
    return list(sampler)


def scene(i):
    rng = np.random.default_rng(i)
    label = rng.choice([0, 1, 2, 255], size=(13, 17))
    guess = np.where(rng.random(label.shape) < .5, label % 255, rng.integers(0, 3, label.shape))
    return dict(img_path=f'images/{i}.png', gt_sem_seg=dict(data=torch.tensor(label)[None]),
                pred_sem_seg=dict(data=torch.tensor(guess)[None]))


def segment(processes, name, seed=None, skip=()):
    def work(rank):
        forbid()
        out = folder / name / 'out'
        saved, save = [], Image.Image.save
        Image.Image.save = lambda image, path, *a, **k: (saved.append(pathlib.Path(path).name), save(image, path, *a, **k))
        metric = IoUMetric(iou_metrics=['mIoU', 'mFscore'], output_dir=str(out), prefix='seg')
        metric.dataset_meta = dict(classes=CLASSES)
        found = []
        for turn in range(2):  # as two validations of one training
            for i in dealt(processes, seed):
                if i not in skip:
                    metric.process({}, [scene(i)])
            found.append([metric.evaluate(5), metric.per_class])
        return dict(found=found, saved=saved)
    return together(processes, work, folder / name)


truth = COCO(str(data / 'annotations' / 'instances_val2017.json'))


def picture(i, text_ids):
    rng = np.random.default_rng(i)
    image = truth.dataset['images'][i]
    boxes, labels = [], []
    for a in truth.imgToAnns[image['id']]:
        left, top, width, height = a['bbox'] + rng.normal(0, 3, 4)
        boxes += [[left, top, left + width, top + height]] * 2
        labels += [CLASSES.index(truth.cats[a['category_id']]['name']), int(rng.integers(3))]
    if i == 3:
        boxes, labels = [], []
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), 96, 96), bool)
    for mask, (left, top, right, bottom) in zip(masks, np.clip(boxes, 0, 96).astype(int)):
        mask[top:bottom, left:right] = True
    return dict(img_id=f"name {image['id']}" if text_ids else image['id'], ori_shape=(96, 96), pred_instances=dict(
        bboxes=torch.tensor(boxes), scores=torch.tensor(np.round(rng.random(len(boxes)), 1).astype(np.float32)),  # ties
        labels=torch.tensor(labels, dtype=torch.long), masks=torch.tensor(masks)))


def detect(processes, name, text_ids=False):
    def work(rank):
        forbid()
        file = data / 'annotations' / ('text.json' if text_ids else 'instances_val2017.json')
        scored = CocoMetric(ann_file=str(file), metric=['bbox', 'segm'], outfile_prefix=str(folder / name / 'out' / 'x'))
        scored.dataset_meta = dict(classes=CLASSES)
        for i in dealt(processes):
            scored.process({}, [picture(i, text_ids)])
        return [scored.evaluate(5), scored.per_class]
    return together(processes, work, folder / name)


def forbid():
    for module in (pickle, torch.distributed.distributed_c10d, handler):
        for name in ('dump', 'dumps', 'load', 'loads', 'Pickler', 'Unpickler', '_pickler', '_unpickler',
                     '_object_to_tensor', '_tensor_to_object'):
            if hasattr(module, name):
                setattr(module, name, refuse)
    handler.pickle = pickle


def refused(processes, name, run):
    def message(rank):
        try:
            run(rank)
        except UserError as error:
            return str(error)
    return together(processes, message, folder / name)


def partly(rank):
    metric = IoUMetric()
    metric.dataset_meta = dict(classes=CLASSES)
    for i in dealt(2)[:2]:
        metric.process({}, [scene(i)])
    metric.evaluate(5)


def without_masks(rank):
    metric = CocoMetric(ann_file=str(data / 'annotations' / 'instances_val2017.json'), metric=['segm'])
    metric.dataset_meta = dict(classes=CLASSES)
    sample = picture(0, False)
    sample['pred_instances'].pop('masks')
    metric.process({}, [sample])
    metric.evaluate(2)


found = dict(segment={}, shuffled={}, detect={}, text={})
for p in PROCESSES:
    found['segment'][p] = segment(p, f'segment{p}')
    if p < 4:
        found['detect'][p] = detect(p, f'detect{p}')
found['shuffled'][3] = segment(3, 'shuffled', seed=4)
for p in (1, 3):
    found['text'][p] = detect(p, f'text{p}', text_ids=True)
found['partly'] = refused(2, 'partly', partly)
found['without_masks'] = refused(2, 'without_masks', without_masks)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp('gather')
    write_coco(folder / 'data', val=5)
    # Ids that are text, as in data sets other than COCO.
    annotations = json.loads((folder / 'data' / 'annotations' / 'instances_val2017.json').read_text())
    for image in annotations['images']:
        image['id'] = f'name {image["id"]}'
    for annotation in annotations['annotations']:
        annotation['image_id'] = f'name {annotation["image_id"]}'
    (folder / 'data' / 'annotations' / 'text.json').write_text(json.dumps(annotations))
    return in_new_python(f'PROCESSES = {PROCESSES}\n{SCRIPT}', folder)


def same(a, b) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # where NaN is NaN


@pytest.mark.parametrize('processes', PROCESSES)
def test_iou_is_that_of_one_process(found, processes):
    one, ranks = found['segment']['1'][0], found['segment'][str(processes)]
    assert 20 < one['found'][0][0]['seg/mIoU'] < 80 and set(one['found'][0][1]) == {'car', 'person', 'dog'}
    for rank in ranks:
        for turn in range(2):
            assert same(rank['found'][turn], one['found'][0]), 'to the last bit, in every process'
    if processes == 3:
        pass


@pytest.mark.parametrize('processes', PROCESSES)
def test_every_prediction_is_written_once(found, processes):
    saved = [name for rank in found['segment'][str(processes)] for name in rank['saved']]
    assert sorted(saved) == sorted([f'{i}.png' for i in range(5)] * 2), 'in each of two validations'


def test_shuffled_images_count_once(found):
    one, ranks = found['segment']['1'][0], found['shuffled']['3']
    assert all(same(rank['found'], one['found']) for rank in ranks)


@pytest.mark.parametrize(('kind', 'processes'), [('detect', 1), ('detect', 2), ('detect', 3), ('text', 3)])
def test_ap_is_that_of_one_process(found, kind, processes):
    one, ranks = found[kind]['1'][0], found[kind][str(processes)]
    assert .1 < one[0]['coco/bbox_mAP'] < .9 and .1 < one[0]['coco/segm_mAP'] < .9
    assert all(same(rank, one) for rank in ranks), 'to the last bit, in every process'


def test_images_that_no_process_took_are_told_to_all(found):
    messages = found['partly']
    assert messages[0] == messages[1] and '4 of 5 images were evaluated by 2 processes' in messages[0]
    assert "sampler=dict(type='DefaultSampler')" in messages[0]


def test_what_the_first_process_refuses_is_told_to_all(found):
    messages = found['without_masks']
    assert messages[0] == messages[1] and "metric 'segm' scores masks" in messages[0]


@pytest.mark.parametrize('value', [
    np.float32(0.1) * np.arange(7, dtype=np.float32).reshape(7, 1) / 3, np.zeros((0, 4), np.float32),
    np.array([1, 2**53 + 1]), np.array([np.nan, np.inf, -0.0]), np.array([True, False])])
def test_arrays_cross_as_they_are(value):
    back = _value(_bytes(dict(a=[value])))['a'][0]
    assert back.dtype == value.dtype and back.shape == value.shape and back.tobytes() == value.tobytes()
    assert _value(_bytes(torch.tensor(value))).tobytes() == value.tobytes()


@pytest.mark.parametrize(('value', 'back'), [
    (b'\x00\xffPq1', b'\x00\xffPq1'), ((1, 'é', None, 1e-320), [1, 'é', None, 1e-320]), (np.int64(7), 7),
    (np.float32(0.1), float(np.float32(0.1)))])
def test_other_values_cross_as_they_are(value, back):
    assert _value(_bytes(value)) == back


def test_objects_do_not_cross():
    with pytest.raises(TypeError, match='cannot cross between processes'):
        _bytes([object()])
