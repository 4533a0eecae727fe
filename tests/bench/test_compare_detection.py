"""Two detection results compared: against objects matched by hand, and against what a real test wrote."""

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from compare_cases import change_record, known_configs, write_metrics_file  # noqa: F401
from PIL import Image
from tiny_detector import detector, trained_detector  # noqa: F401

pytest.importorskip('pycocotools')


from replk_mm.bench.compare.compare import (
    _most_changed,
    compare_results,  # noqa: E402
    render_comparison,
    write_comparison,  # noqa: E402
)
from replk_mm.bench.compare.detection import match, open_detections, open_objects  # noqa: E402
from replk_mm.bench.compare.pictures import A, B  # noqa: E402
from replk_mm.bench.compare.results import DataSource, read_result  # noqa: E402
from replk_mm.engine.evaluate import evaluate  # noqa: E402
from replk_mm.engine.record import evaluation_record, write_record  # noqa: E402
from replk_mm.errors import UserError  # noqa: E402

# ruff: noqa: F811 (fixtures that come from another file)
NAMES = ('dog', 'car')
CONFIG = """
default_scope = 'mmdet'
model = dict(type='MaskRCNN')
test_dataloader = dict(dataset=dict(type='CocoDataset', data_root={root!r}, ann_file='val.json',
                                    data_prefix=dict(img='val/'), pipeline=[]))
test_evaluator = dict(type='CocoMetric', ann_file={ann!r})
"""


def polygon(box) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def iou(of, other, crowd: bool) -> float:
    """Of boxes as COCO has it: within a crowd, what share of the detection lies in it."""
    (x, y, w, h), (u, v, m, n) = of, other
    both = max(0, min(x + w, u + m) - max(x, u)) * max(0, min(y + h, v + n) - max(y, v))
    return both / (w * h if crowd else w * h + m * n - both)


def by_hand(objects: list[dict], found: list[dict], score: float) -> tuple[int, int, int]:
    """Found, missed and false in one image: the surest detection chooses first."""
    taken, ignored, sure = set(), 0, sorted((d for d in found if d['score'] >= score), key=lambda d: -d['score'])
    for detection in sure:
        same = [o for o in objects if o['category_id'] == detection['category_id']]
        over = {o['id']: iou(detection['bbox'], o['bbox'], o['iscrowd']) for o in same}
        free = [o['id'] for o in same if not o['iscrowd'] and o['id'] not in taken and over[o['id']] >= 0.5]
        if free:
            taken.add(max(free, key=over.get))
        elif any(o['iscrowd'] and over[o['id']] >= 0.5 for o in same):
            ignored += 1
    return len(taken), sum(not o['iscrowd'] for o in objects) - len(taken), len(sure) - len(taken) - ignored


@pytest.fixture
def case(tmp_path):
    """Twelve images of boxes, crowds among them, objects counted from 0, and two sets of detections near and far."""
    rng, root = np.random.default_rng(2), tmp_path / 'data'
    (root / 'val').mkdir(parents=True)
    images, objects, found = [], [], {'a': [], 'b': []}
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(root / 'val' / f'{i}.png')
        images.append(dict(id=7 * i, file_name=f'{i}.png', height=60, width=80))
        boxes = [
            [int(v) for v in (rng.integers(0, 50), rng.integers(0, 30), rng.integers(8, 30), rng.integers(8, 30))]
            for _ in range(0 if i == 11 else 5)
        ]
        for box in boxes:
            objects.append(
                dict(
                    id=len(objects),
                    image_id=7 * i,
                    category_id=int(rng.choice([3, 9])),
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=int(rng.random() < 0.2),
                    segmentation=polygon(box),
                )
            )
        for part, jitter in ((found['a'], 5), (found['b'], 2 if i % 3 else 7)):
            for box in [*boxes, *boxes[:2], [1, 1, 20, 9]]:
                moved = [max(1, v + int(rng.integers(-jitter, jitter + 1))) for v in box]
                part.append(
                    dict(
                        image_id=7 * i,
                        category_id=int(rng.choice([3, 9], p=[0.4, 0.6])),
                        bbox=moved,
                        score=round(float(rng.random()), 6),
                    )
                )
    categories = [dict(id=9, name='car'), dict(id=3, name='dog'), dict(id=5, name='not scored')]
    extra = dict(
        id=999, image_id=0, category_id=5, bbox=[0, 0, 9, 9], area=81, iscrowd=0, segmentation=polygon([0, 0, 9, 9])
    )
    (root / 'val.json').write_text(
        json.dumps(dict(images=images, categories=categories, annotations=[*objects, extra]))
    )
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(root=str(root), ann=str(root / 'val.json')))
    names = {3: 'dog', 9: 'car'}
    amount = Counter(names[o['category_id']] for o in objects if not o['iscrowd'])
    for letter, part in found.items():
        per_class = {name: dict(instances=amount[name], bbox_mAP=rng.random(), segm_mAP=rng.random()) for name in NAMES}
        folder = write_metrics_file(tmp_path / letter, config, root, {'coco/bbox_mAP': rng.random()}, per_class, 12)
        (folder / 'predictions').mkdir()
        (folder / 'predictions' / 'instances.bbox.json').write_text(json.dumps(part))
    return objects, found, tmp_path


@pytest.mark.parametrize('score', [0.3, 0.7])
def test_objects_are_matched_as_by_hand(case, score, monkeypatch):
    monkeypatch.setattr('replk_mm.bench.compare.detection._CHUNK', 5)
    objects, found, folder = case
    compared = compare_results(str(folder / 'a'), str(folder / 'b'), score=score)
    seen = np.zeros(3, int)
    for entry in compared['images']['scores']:
        for letter in 'ab':
            expected = by_hand(
                [o for o in objects if o['image_id'] == entry['id']],
                [d for d in found[letter] if d['image_id'] == entry['id']],
                score,
            )
            assert tuple(entry[f'{key}_{letter}'] for key in ('found', 'missed', 'false')) == expected
            right, missed, false = expected
            assert entry[letter] == (2 * right / (2 * right + missed + false) if any(expected) else 1)
            seen += expected
    assert len(compared['images']['scores']) == 12 and seen.min() > 5, seen
    f1 = [[entry[letter] for entry in compared['images']['scores']] for letter in 'ab']
    assert compared['statistics']['difference'] == pytest.approx(np.mean(f1[1]) - np.mean(f1[0]))
    assert [compared['totals'][letter]['found'] for letter in 'ab'] == [
        sum(entry[f'found_{letter}'] for entry in compared['images']['scores']) for letter in 'ab'
    ]
    changes = [abs(entry['difference']) for entry in compared['images']['changed']]
    assert changes == sorted(np.abs(np.subtract(*f1)), reverse=True)[:8]


def test_masks_that_fill_their_boxes_match_as_the_boxes(case):
    from pycocotools import mask

    _, found, folder = case
    for letter in 'ab':
        for detection in found[letter]:
            rle = mask.merge(mask.frPyObjects(polygon(detection['bbox']), 60, 80))
            detection['segmentation'] = dict(size=rle['size'], counts=rle['counts'].decode())
            x, y, w, h = detection['bbox']
            detection['bbox'] = [x, y, min(w, 80 - x), min(h, 60 - y)]
        for kind in ('bbox', 'segm'):
            (folder / letter / 'predictions' / f'instances.{kind}.json').write_text(json.dumps(found[letter]))
    boxes, masks = (
        compare_results(str(folder / 'a'), str(folder / 'b'), kind=kind, out=folder) for kind in ('bbox', 'segm')
    )
    assert masks['images']['scores'] == boxes['images']['scores'] and masks['totals'] == boxes['totals']
    assert masks['per_class']['figure'] == 'segm_mAP' and masks['per_class'] != boxes['per_class']


def test_file_names_with_other_folders(case):
    _, _, folder = case
    results = [str(folder / letter) for letter in 'ab']
    plain = compare_results(*results)['images']
    data = json.loads((folder / 'data/val.json').read_text())
    for image in data['images']:
        image['file_name'] = f'C:\\images\\{image["file_name"]}'
    (folder / 'data/val.json').write_text(json.dumps(data), encoding='utf-16')
    assert compare_results(*results, out=folder)['images'] == plain


def test_ap_is_shown_in_percent(case):
    _, _, folder = case
    found = compare_results(*(str(folder / letter) for letter in 'ab'), images=None)
    (metric,), text = found['metrics'], render_comparison(found)
    assert metric['name'] == 'coco/bbox_mAP' and 0 < metric['a'] < 1
    rows = [(metric['name'], metric), *((row['name'], row) for row in found['per_class']['rows'])]
    for name, row in rows:
        cells = [f'{100 * row[key]:.2f}' for key in 'ab'] + [f'{100 * row["difference"]:+.2f}']
        (line,) = [line for line in text.splitlines() if line.startswith(f'| {name} ')]
        assert [cell.strip() for cell in line.split('|')[2:5]] == cells


def test_crowds_and_doubles(case):
    """One object, one crowd: the second detection of the object is false, detections in the crowd are nothing."""
    _, _, folder = case
    data = json.loads((folder / 'data' / 'val.json').read_text())
    data['annotations'] = [
        dict(id=0, image_id=0, category_id=3, bbox=[0, 0, 10, 10], area=100, iscrowd=0),
        dict(id=1, image_id=0, category_id=3, bbox=[30, 0, 40, 40], area=1600, iscrowd=1),
    ]
    (folder / 'data' / 'val.json').write_text(json.dumps(data))
    for letter, boxes in (('a', [[0, 0, 10, 10], [0, 0, 10, 9], [32, 2, 5, 5], [40, 2, 5, 5]]), ('b', [[0, 0, 10, 4]])):
        (folder / letter / 'predictions' / 'instances.bbox.json').write_text(
            json.dumps([dict(image_id=0, category_id=3, bbox=box, score=0.9 - 0.1 * i) for i, box in enumerate(boxes)])
        )
        change_record(folder / letter, per_class={'dog': dict(instances=1, bbox_mAP=0.5)})
    found = compare_results(str(folder / 'a'), str(folder / 'b'))
    entry = found['images']['scores'][0]
    assert [entry[f'{key}_{letter}'] for letter in 'ab' for key in ('found', 'missed', 'false')] == [1, 0, 1, 0, 1, 1]
    assert (entry['a'], entry['b']) == (2 / 3, 0)
    assert [e['a'] for e in found['images']['scores'][1:]] == [1] * 11, 'nothing to find, nothing found'
    result = read_result(str(folder / 'a'), 'A')
    objects = open_objects(result, DataSource(), str(folder / 'data'), 'bbox')
    shown = match(objects, open_detections(result, objects, 'bbox', 0.3), [0], 'bbox')[0]
    assert ([d['score'] for d in shown.right], [d['score'] for d in shown.false]) == ([0.9], [0.8]), (
        'crowds are neither'
    )
    sure = open_detections(result, objects, 'bbox', 0.9)
    assert [d['score'] for d in sure.dataset['annotations']] == [0.9], 'the threshold itself is enough'


def test_changes_that_cancel_in_f1_are_ordered_by_objects_found_minus_false():
    def image(name: str, difference: float, found: int, false: int) -> dict:
        return dict(image=name, difference=difference, found_a=5, false_a=5, found_b=5 + found, false_b=5 + false)

    scores = [image('same', 0, 0, 0), image('false', 0, 0, 3), image('both', 0, 2, 2), image('found', 0, -1, 0)]
    scores += [image('f1', -0.1, 0, 0), image('more', 0.2, 0, 0)]
    assert [score['image'] for score in _most_changed(scores, 9)] == ['more', 'f1', 'false', 'found']


def test_none_found_at_all(case):
    _, _, folder = case
    (folder / 'b' / 'predictions' / 'instances.bbox.json').write_text('[]')
    found = compare_results(str(folder / 'a'), str(folder / 'b'))
    assert found['totals']['b']['found'] == found['totals']['b']['false'] == 0 < found['totals']['b']['missed']


def _boxes_only(folder):
    per_class = json.loads((folder / 'b' / 'metrics.json').read_text())['per_class']
    change_record(
        folder / 'b',
        per_class={name: {k: v for k, v in figures.items() if k != 'segm_mAP'} for name, figures in per_class.items()},
    )


def _write(folder, detections):
    (folder / 'b' / 'predictions' / 'instances.bbox.json').write_text(
        detections if isinstance(detections, str) else json.dumps(detections)
    )


REFUSED = {
    'no predictions': (
        lambda d: shutil.rmtree(d / 'b' / 'predictions'),
        'bbox',
        '/b/predictions/instances.bbox.json: no',
    ),
    'no masks': (
        lambda d: None,
        'segm',
        r'instances.segm.json: no such file, .* by masks \(--kind bbox compares '
        r'boxes\)',
    ),
    'no figures of masks': (_boxes_only, 'segm', '/b/metrics.json: the classes have no segm_mAP; there are inst'),
    'strange image': (
        lambda d: _write(d, [dict(image_id=5, category_id=3, bbox=[0, 0, 1, 1], score=1)]),
        'bbox',
        '/b/.*do not have: ids 5',
    ),
    'cut off': (lambda d: _write(d, '[{"a": 1'), 'bbox', 'not a list of detections'),
    'annotations gone': (
        lambda d: (d / 'data' / 'val.json').unlink(),
        'bbox',
        '/data/val.json: no such annotation file',
    ),
    'other objects': (
        lambda d: [change_record(d / x, per_class__dog__instances=1) for x in 'ab'],
        'bbox',
        'the annotations are not those of the test: dog: .* now, 1 in',
    ),
    'other images': (lambda d: [change_record(d / x, data__images=4) for x in 'ab'], 'bbox', 'images: 12 now, 4 in'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_rejected(what, case):
    spoil, kind, message = REFUSED[what]
    spoil(case[2])
    with pytest.raises(UserError, match=f'(?s){message}') as raised:
        compare_results(str(case[2] / 'a'), str(case[2] / 'b'), kind=kind)
    assert '\n' in str(raised.value), 'no remedy'


@pytest.mark.slow
def test_comparison_of_two_test_outputs(detector, trained_detector, tmp_path):
    """Real results: predictions of a test are read, and shown."""
    folders = []
    for name, checkpoint in (('early', detector.train(tmp_path / 'train', 1, seed=0)), ('late', trained_detector)):
        cfg, out = detector.cfg(), tmp_path / name
        found = evaluate(cfg, str(checkpoint), detector.options(tmp_path / 'work'), predictions=out / 'predictions')
        write_record(evaluation_record(cfg, str(checkpoint), found, False), out / 'metrics.json')
        folders.append(out)
    out = tmp_path / 'out'
    out.mkdir()
    found = compare_results(*map(str, folders), kind='segm', score=0.05, out=out)
    read = [json.loads((folder / 'metrics.json').read_text()) for folder in folders]
    by_name = {row['name']: row for row in found['per_class']['rows']}
    for name, figures in read[1]['per_class'].items():
        assert by_name[name]['b'] == figures['segm_mAP'] and by_name[name]['size'] == figures['instances']
    instances = sum(figures['instances'] for figures in read[0]['per_class'].values())
    for letter in 'ab':
        assert found['totals'][letter]['found'] + found['totals'][letter]['missed'] == instances == 6
    written = write_comparison(found, out)
    assert [path.name for path in written[:2]] == ['compare.json', 'compare.md']
    assert all(Path(path).is_file() for path in written)


def test_pictures_show_whose_objects_were_found(case):
    _, _, folder = case
    found = compare_results(str(folder / 'a'), str(folder / 'b'), images=10, out=folder)
    assert found['pictures'] == ['changed_1.png', 'changed_2.png']
    first = cv2.imread(str(folder / 'changed_1.png'))
    for colour in (A, B):
        assert (first[:, :-210] == colour[::-1]).all(-1).sum() > 100
