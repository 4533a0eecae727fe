"""Predictions for images."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, trained  # noqa: F401
from tool_cases import merged, plain, read  # noqa: F401

from replk_mm.engine.predict import label_map, load_for_prediction, predict
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def segmentor(tiny, trained):
    return load_for_prediction(tiny.cfg(), str(trained), 'cpu')


def test_prediction_of_an_image_equals_the_test_run(tiny, segmentor, plain):
    path = tiny.data / 'images/validation/demo_val_000000.jpg'
    ((found_path, image, prediction),) = predict(segmentor, [str(path)])
    labels = label_map(prediction)
    assert found_path == path
    assert np.array_equal(image, cv2.imread(str(path)))
    assert labels.shape == image.shape[:2] == (64, 64)
    written = np.asarray(Image.open(plain[2] / 'demo_val_000000.png')).astype(int)
    assert np.mean(labels == written - 1) > 0.999, 'the files of the test hold ids from 1'


def test_merged_network_predicts_the_same(tiny, trained, merged, segmentor):
    path = str(tiny.data / 'images/training/demo_train_000001.jpg')
    ((_, _, found),) = predict(segmentor, [path])
    for checkpoint, reparam in ((merged, False), (trained, True)):
        other = load_for_prediction(tiny.cfg(), str(checkpoint), 'cpu', reparam)
        ((_, _, again),) = predict(other, [path])
        assert np.mean(label_map(found) == label_map(again)) > 0.999


@pytest.mark.parametrize('size', [(50, 90), (131, 64)])
def test_prediction_has_the_size_of_the_image(segmentor, tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), noise)
    ((_, image, found),) = predict(segmentor, [str(tmp_path / 'x.png')])
    assert image.shape == (*size, 3)
    assert label_map(found).shape == size


def test_classes_and_colours_come_with_the_segmentor(segmentor):
    assert list(segmentor.dataset_meta['classes'])[:2] == ['sky', 'ground']
    assert len(segmentor.dataset_meta['palette']) == 8


def test_classes_without_names_get_some(tiny, trained, tmp_path):
    bare = read(trained)
    torch.save(dict(state_dict=bare['state_dict']), tmp_path / 'bare.pth')
    cfg = tiny.cfg()
    cfg.test_dataloader.dataset.pop('metainfo')
    meta = load_for_prediction(cfg, str(tmp_path / 'bare.pth'), 'cpu').dataset_meta
    assert len(meta['classes']) == len(meta['palette']) == 8


@pytest.mark.parametrize(
    ('content', 'said'), [(None, 'no such image'), (b'', 'empty'), (b'text', 'cannot identify image file')]
)
def test_bad_images_are_named(segmentor, tmp_path, content, said):
    path = tmp_path / 'x.jpg'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as info:
        list(predict(segmentor, [str(path)]))
    assert str(info.value).startswith(str(path))
    with pytest.raises(UserError, match='folder'):
        list(predict(segmentor, [str(tmp_path)]))
