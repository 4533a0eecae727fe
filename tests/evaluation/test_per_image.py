"""Metrics of weighted images against pycocotools and a count of pixels, on data sets whose images really repeat."""

import contextlib
import dataclasses

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from replk_mm.errors import UserError
from replk_mm.evaluation.per_image import ClassificationScores, DetectionMatches, PerImageScores, SegmentationCounts

IMAGES, CLASSES = 9, 4


def boxes(rng, count: int) -> np.ndarray:
    return np.concatenate([rng.integers(0, 150, (count, 2)), rng.integers(8, 90, (count, 2))], axis=1)


@pytest.fixture(scope='module')
def scene() -> tuple[list[list[dict]], list[list[dict]]]:
    """Objects and detections of each image: crowds, a class without objects, and scores that images share."""
    rng = np.random.default_rng(0)
    objects: list[list[dict]] = [
        [
            dict(category_id=int(c), bbox=box.tolist(), area=int(box[2] * box[3]), iscrowd=int(rng.random() < 0.1))
            for box, c in zip(boxes(rng, 6), rng.integers(1, CLASSES, 6), strict=True)
        ]
        for _ in range(IMAGES)
    ]
    found = []
    for of_image in objects:
        near = [dict(one, bbox=(np.array(one['bbox']) + rng.integers(-4, 5, 4)).clip(1).tolist()) for one in of_image]
        far = [
            dict(category_id=int(c), bbox=b.tolist()) for b, c in zip(boxes(rng, 7), [1, 1, 2, 3, 3, 4, 4], strict=True)
        ]
        # unlike in one image, where pycocotools orders equal scores by the copies
        scores = rng.permutation(40)[: len(near + far)] / 40
        found.append([dict(one, score=float(s)) for one, s in zip(near + far, scores, strict=True)])
    objects[3], found[5] = [], []
    return objects, found


def coco_evaluation(scene, times, iou_type: str = 'bbox') -> COCOeval:
    """pycocotools' evaluation of a data set with ``times[i]`` copies of image ``i``."""
    categories = [dict(id=c, name=f'class {c}') for c in range(1, CLASSES + 1)]
    data: dict = dict(images=[], annotations=[], categories=categories)
    results = []
    for i, (objects, found) in enumerate(zip(*scene, strict=True)):
        for copy in range(times[i]):
            key = 100 * i + copy
            data['images'].append(dict(id=key, file_name=f'{i}.jpg', width=300, height=300))
            for one in objects:
                x, y, w, h = one['bbox']
                outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                data['annotations'].append(
                    dict(one, image_id=key, id=len(data['annotations']) + 1, segmentation=outline)
                )
            results += [dict(one, image_id=key) for one in found]
    with contextlib.redirect_stdout(None):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
def test_ap_of_repeated_images(scene, iou_type):
    rng = np.random.default_rng(1)
    weights = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 8)
    matches = DetectionMatches.from_coco(coco_evaluation(scene, np.ones(IMAGES, int), iou_type))
    truth = [coco_evaluation(scene, times, iou_type) for times in [np.ones(IMAGES, int), *weights]]
    assert matches.score() == pytest.approx(100 * truth[0].stats[0], abs=1e-9)
    assert 20 < matches.score() < 90 and len(matches.images) == IMAGES
    assert matches.score(weights) == pytest.approx([100 * found.stats[0] for found in truth[1:]], abs=1e-9)
    # weights are frequencies: their scale does not matter
    assert matches.score(weights / 7.3) == pytest.approx(matches.score(weights), abs=1e-9)
    precision = truth[3].eval['precision'][:, :, :, 0, -1]
    by_class = [100 * of.mean() if (of >= 0).any() else np.nan for of in np.moveaxis(precision, 2, 0)]
    assert matches.per_class(weights[2:3])[0] == pytest.approx(by_class, abs=1e-9, nan_ok=True)
    alone = [matches.only(name).score(weights[2:3])[0] for name in matches.classes]
    assert alone == pytest.approx(by_class, abs=1e-9, nan_ok=True)


def test_ap_without_detections_or_images_with_objects(scene):
    matches = DetectionMatches.from_coco(coco_evaluation(scene, np.ones(IMAGES, int)))
    weights = np.eye(IMAGES)[[3, 5]]  # without objects; without detections
    assert matches.score(weights) == pytest.approx([np.nan, 0.0], nan_ok=True)


def test_ap_takes_memory_for_some_draws_at_a_time(scene, monkeypatch):
    matches = DetectionMatches.from_coco(coco_evaluation(scene, np.ones(IMAGES, int)))
    weights = np.random.default_rng(2).random((20, IMAGES))
    together = matches.score(weights)
    monkeypatch.setattr('replk_mm.evaluation.per_image._MOST_WEIGHTS', 100)
    np.testing.assert_array_equal(matches.score(weights), together)


def counts(rng) -> tuple[SegmentationCounts, list[tuple[np.ndarray, np.ndarray]]]:
    """Counts of random label maps; the last class is in one image only, and the first never right."""
    pairs = []
    for i in range(IMAGES):
        label, prediction = rng.integers(0, 3 + (i == 4), 50), rng.integers(1, 3, 50)
        pairs.append((label, np.where(rng.random(50) < 0.5, label.clip(1), prediction)))

    def count(values) -> np.ndarray:
        return np.array([np.bincount(v, minlength=5) for v in values])

    found = SegmentationCounts(
        images=tuple(map(str, range(IMAGES))),
        classes=tuple('abcde'),
        intersection=count([label[label == prediction] for label, prediction in pairs]),
        predicted=count([prediction for _, prediction in pairs]),
        label=count([label for label, _ in pairs]),
    )
    return found, pairs


def test_miou_of_repeated_images():
    rng = np.random.default_rng(3)
    found, pairs = counts(rng)
    weights = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 8)
    for times, score, by_class in zip(weights, found.score(weights), found.per_class(weights), strict=True):
        label, prediction = (
            np.concatenate([np.tile(p[k], n) for p, n in zip(pairs, times, strict=True)]) for k in (0, 1)
        )
        iou = []
        for c in range(5):
            union = ((label == c) | (prediction == c)).sum()
            iou.append(100 * ((label == c) & (prediction == c)).sum() / union if union else np.nan)
        assert by_class == pytest.approx(iou, nan_ok=True) and score == pytest.approx(np.nanmean(iou))
        alone = [found.only(name).score(times[None])[0] for name in found.classes]
        assert alone == pytest.approx(iou, nan_ok=True)
    assert found.score(weights / 3) == pytest.approx(found.score(weights))
    assert np.isnan(found.score(np.zeros((1, IMAGES)))).all()


def test_scores_of_single_images(scene) -> None:
    found, maps = counts(np.random.default_rng(2))
    by_hand = []
    for label, predicted in maps:
        label, predicted = label[label < 255], predicted[label < 255]
        ious = [
            np.mean((label == c)[(label == c) | (predicted == c)] == (predicted == c)[(label == c) | (predicted == c)])
            for c in np.union1d(label, predicted)
        ]
        by_hand.append(100 * np.mean(ious) if ious else np.nan)
    assert found.per_image() == pytest.approx(by_hand, nan_ok=True)
    evaluation = coco_evaluation(scene, np.ones(IMAGES, int))
    right, total = np.zeros((2, IMAGES))
    for entry in filter(None, evaluation.evalImgs):
        if entry['aRng'] == evaluation.params.areaRng[0]:
            objects = int((np.array(entry['gtIgnore']) == 0).sum())
            counted = [m > 0 for m, i in zip(entry['dtMatches'][0], entry['dtIgnore'][0], strict=True) if not i]
            right[entry['image_id'] // 100] += sum(counted[:objects])
            total[entry['image_id'] // 100] += objects
    expected = [100 * r / n if n else np.nan for r, n in zip(right, total, strict=True)]
    scores = DetectionMatches.from_coco(evaluation).per_image()
    assert scores == pytest.approx(expected, nan_ok=True) and np.isnan(scores[3]) and scores[5] == 0
    assert 0 < np.nanmean(scores) < 100


def test_a_file_holds_everything(scene, tmp_path):
    matches = DetectionMatches.from_coco(coco_evaluation(scene, np.ones(IMAGES, int)))
    for found in (matches, counts(np.random.default_rng(4))[0]):
        found.save(tmp_path / 'statistics.npz')
        read = PerImageScores.load(tmp_path / 'statistics.npz')
        assert type(read) is type(found)
        for name, value in dataclasses.asdict(found).items():
            assert np.array_equal(value, getattr(read, name)) and type(value) is type(getattr(read, name))


def test_a_damaged_file_is_a_user_error(tmp_path, monkeypatch):
    path = tmp_path / 'statistics.npz'
    found = counts(np.random.default_rng(5))[0]
    found.save(path)
    whole = path.read_bytes()
    np.savez(path, kind='SegmentationCounts', images=['a'], classes=['b'], intersection=[[1, 2]], predicted=1, label=1)
    for content in (
        b'',
        b'{}',
        whole[: len(whole) // 2],
        path.read_bytes(),
        whole.replace(b'intersection', b'intersectiom'),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match='statistics.npz'):
            PerImageScores.load(path)
    monkeypatch.setattr('replk_mm.evaluation.per_image._MOST_BYTES', 100)
    with pytest.raises(UserError, match='MiB'):
        PerImageScores.load(whole)


@pytest.mark.parametrize('weights', [np.ones(IMAGES), np.ones((2, IMAGES + 1))])
def test_weights_are_of_draws_and_images(weights):
    with pytest.raises(ValueError, match='draws'):
        counts(np.random.default_rng(6))[0].score(weights)


def test_accuracy_of_repeated_images_is_a_count(tmp_path):
    rng = np.random.default_rng(2)
    label, predicted = rng.integers(0, CLASSES, (2, 40))
    label[label == 1] = 0  # a class without images
    times = rng.integers(0, 4, (3, 40))
    scores = ClassificationScores(
        images=tuple(map(str, range(40))), classes=tuple('abcd'), label=label, correct=predicted == label
    )
    scores.save(tmp_path / 'scores.npz')
    scores = PerImageScores.load(tmp_path / 'scores.npz')
    for draw, total, per_class in zip(times, scores.score(times), scores.per_class(times), strict=True):
        pairs = [pair for pair, n in zip(zip(label, predicted, strict=True), draw, strict=True) for _ in range(n)]
        assert total == pytest.approx(100 * sum(a == b for a, b in pairs) / len(pairs))
        assert np.isnan(per_class[1])
        for c in (0, 2, 3):
            of_class = [a == b for a, b in pairs if a == c]
            expected = pytest.approx(100 * sum(of_class) / len(of_class))
            assert per_class[c] == expected and scores.only('abcd'[c]).score(draw[None])[0] == expected
    assert scores.score()[0] == pytest.approx(scores.per_image().mean())
