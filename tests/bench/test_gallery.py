"""The gallery of a report: which images and rows it shows, and what it says is missing. All results are made up."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from report_records import CLASSES, facts, label_map, metric, scenes, write

from replk_mm.bench.report import gallery
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.pictures import Album
from replk_mm.bench.report.render import render_html
from replk_mm.evaluation.per_image import DetectionMatches, SegmentationCounts

IMAGES = 7


def measured(folder, row: str, shifts: dict[int, int], seed: int = 0) -> dict:
    """A metric's record with predictions, which are wrong in some images by a shift, and counts per image."""
    place = folder / f'runs/{row}/{seed}/test'
    (place / 'predictions').mkdir(parents=True)
    shape = IMAGES, len(CLASSES)
    labelled, predicted, right = (np.zeros(shape, int) for _ in range(3))
    for i in range(IMAGES):
        truth, found = label_map(i), label_map(i, shifts.get(i, 0))
        Image.fromarray(found).save(place / f'predictions/{i:03}.png')
        for c in range(len(CLASSES)):
            labelled[i, c], predicted[i, c] = (truth == c + 1).sum(), (found == c + 1).sum()
            right[i, c] = ((truth == c + 1) & (found == c + 1)).sum()
    names = tuple(f'{i:03}' for i in range(IMAGES))
    counts = dict(intersection=right, predicted=predicted, label=labelled)
    SegmentationCounts(images=names, classes=tuple(CLASSES), **counts).save(place / 'statistics.npz')
    total = right.sum(0)
    miou = float(100 * np.mean(total / (predicted.sum(0) + labelled.sum(0) - total)))
    return counted(folder, metric(row, seed, miou, facts=facts(folder / 'data')), place)


def counted(folder, record: dict, place) -> dict:
    """A record with the predictions and counts of a folder."""
    digest = hashlib.sha256((place / 'statistics.npz').read_bytes()).hexdigest()
    stated = {record['values']['primary']: dict(file='statistics.npz', sha256=digest)}
    place = place.relative_to(folder)
    return record | dict(
        files=dict(predictions=f'{place}/predictions', statistics=f'{place}/statistics.npz'),
        facts={**record['facts'], 'statistics': stated},
    )


def opened(folder, records) -> tuple[gallery.Gallery, list[str]]:
    """The gallery of the first group, and the labels of all rows."""
    (suite,) = load_report([write(folder, records)]).suites
    return gallery.open_gallery(suite.groups[0], Album()), [row.label for row in suite.rows]


def test_images_on_which_rows_differ_most_come_first(tmp_path) -> None:
    scenes(tmp_path / 'data', IMAGES)
    # Both rows fail in 6; it is image 4 that only one of them fails in, and image 1 a little.
    records = [measured(tmp_path, 'a', {6: 20}), measured(tmp_path, 'b', {6: 20, 4: 15, 1: 3})]
    found, _ = opened(tmp_path, records)
    assert [example.name for example in found.examples][:2] == ['004', '001'] and len(found.examples) == 5
    assert found.figure == 'mIoU' and not found.missing
    one = found.examples[0]
    assert one.scores[1] == 100 and 20 < one.scores[2] < 90
    assert [name for name, _ in found.key] == CLASSES
    page = render_html(load_report([tmp_path]))
    assert 'furthest apart in mIoU' in page and '<small>mIoU 100.0</small>' in page


def test_a_selection_of_the_classes(tmp_path) -> None:
    """Predictions number the selected classes anew, so that right ones differ from the label files."""
    scenes(tmp_path / 'data', IMAGES)
    record = measured(tmp_path, 'a', {})
    record['facts']['data'].update(classes=['water', 'sky'], label_map={0: 1, 1: 255, 2: 0})
    for i in range(IMAGES):
        path = tmp_path / record['files']['predictions'] / f'{i:03}.png'
        Image.fromarray(np.array([0, 2, 1, 1], np.uint8)[label_map(i)]).save(path)
    found, _ = opened(tmp_path, [record])
    for example in found.examples:
        shown, truth = example.predictions[1], example.truth
        assert shown.words.startswith('100\u00a0% of the scored pixels right; ') and 'label' not in truth.words
    assert [name for name, _ in found.key] == ['water', 'sky', 'not labelled'] and found.key[-1][1] == (0, 0, 0)


def test_without_counts_the_images_are_spread_evenly(tmp_path) -> None:
    scenes(tmp_path / 'data', IMAGES)
    records = [measured(tmp_path, 'a', {4: 1}), measured(tmp_path, 'b', {4: 9})]
    del records[0]['facts']['statistics']
    found, _ = opened(tmp_path, records)
    assert [example.name for example in found.examples] == ['000', '002', '003', '004', '006'] and not found.figure


def test_the_best_group_comes_first_and_six_rows_at_most(tmp_path) -> None:
    scenes(tmp_path / 'data', IMAGES)
    records = [measured(tmp_path, row, dict.fromkeys(range(IMAGES), shift)) for shift, row in enumerate('abcdefgh')]
    (group,) = load_report([write(tmp_path, records)]).suites[0].groups
    assert group.comparison and [row.label for row in group.rows] == list('abcdefgh')
    group.comparison = dataclasses.replace(group.comparison, members=('a', 'h'))
    found = gallery.open_gallery(group, Album())
    assert [row.label for row in found.rows] == list('ahbcde')
    assert found.examples[0].predictions.keys() == {row.number for row in found.rows}


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(files={}), 'Predictions of a: recorded without predictions'),
        (dict(files=dict(predictions='runs/no')), 'Predictions of a: no such folder'),
        (dict(files=dict(predictions='data')), 'Predictions of a: leads outside of'),
        (dict(facts={}), 'Images and ground truth: the record does not state'),
        (dict(facts=facts('/etc')), 'Images and ground truth: data root /etc: missing, or outside of'),
        (dict(facts=facts('data', annotations='<b>.json', labels=None)), 'No such file'),
    ],
)
def test_what_is_missing_is_one_line(change, said, tmp_path) -> None:
    scenes(tmp_path / 'data', IMAGES)
    page = render_html(load_report([write(tmp_path, [measured(tmp_path, 'a', {}) | change])]))
    (line,) = (line for line in page.splitlines() if 'Missing from the gallery' in line)
    assert said in line and '<b>' not in line and 'class="zoom"' not in page


def test_galleries_of_other_protocols_are_folded(tmp_path) -> None:
    scenes(tmp_path / 'data', IMAGES)
    records = [measured(tmp_path, row, dict.fromkeys(range(IMAGES), shift)) for shift, row in enumerate('abc')]
    records[0]['protocol'] = {**records[0]['protocol'], 'iterations': 7}
    page = render_html(load_report([write(tmp_path, records)]))
    part = page[page.index('<h3>Gallery') :].partition('<section>')[0]
    opened, _, folded = part.partition('<details><summary>Protocol ')
    assert '1 b<' in opened and '2 c<' in opened and '3 a<' in folded and '<h4>' not in part
    assert opened.count('class="example"') == folded.count('class="example"') == 5


def test_names_are_text_and_pictures_have_a_limit(tmp_path) -> None:
    hostile = '<img src=x onerror=alert(1)>'
    data = scenes(tmp_path / 'data', IMAGES)
    records = [measured(tmp_path, row, {}) | dict(label=hostile) for row in 'ab']
    for folder in (data / 'images/validation', data / 'annotations/validation', tmp_path / 'runs/a/0/test/predictions'):
        file = next(iter(folder.glob('000.*')))
        file.rename(file.with_name(f'{hostile}{file.suffix}'))
    (tmp_path / 'runs/b/0/test/predictions/000.png').rename(tmp_path / f'runs/b/0/test/predictions/{hostile}.png')
    report = load_report([write(tmp_path, records)])
    page = render_html(report)
    assert '<strong>&lt;img src=x' in page and '<img src=x' not in page
    album = Album(left=3000)
    found = gallery.open_gallery(report.suites[0].groups[0], album)
    pictures = [shown for example in found.examples for shown in (example.image, *example.predictions.values())]
    assert {bool(shown.source) for shown in pictures} == {True, False} and 0 <= album.left < 3000
    assert all(shown.source or 'left out' in shown.words for shown in pictures)


def test_detections_are_chosen_by_their_counts(tmp_path) -> None:
    """Both rows find the object of image 0, only one that of image 2."""
    scenes(tmp_path / 'data', 3)
    thing = dict(category_id=4, bbox=[10, 20, 50, 30], area=1500)
    coco = dict(
        images=[dict(id=i, file_name=f'{i:03}.jpg', height=72, width=96) for i in range(3)],
        categories=[dict(id=4, name='disc')],
        annotations=[dict(thing, id=i + 1, image_id=i, iscrowd=0) for i in range(3)],
    )
    (tmp_path / 'data/ann.json').write_text(json.dumps(coco))
    of_data = facts(tmp_path / 'data', labels=None, annotations='ann.json')
    records = []
    for row, matched in dict(a=[1, 0, 1], b=[1, 0, 0]).items():
        place = tmp_path / f'runs/{row}/0/test'
        (place / 'predictions').mkdir(parents=True)
        detections = [dict(thing, image_id=i, score=0.9) for i in range(3) if matched[i]]
        (place / 'predictions/instances.bbox.json').write_text(json.dumps(detections))
        counts = DetectionMatches(
            images=tuple(f'{i:03}.jpg' for i in range(3)),
            classes=('disc',),
            detection_image=np.arange(3),
            matched=np.array(matched) * 1023,
            ignored=np.zeros(3, int),
            detection_bounds=np.array([0, 3]),
            object_image=np.arange(3),
            object_bounds=np.array([0, 3]),
        )
        counts.save(place / 'statistics.npz')
        one = metric(row, 0, float(counts.score()[0]), facts=of_data)
        records.append(counted(tmp_path, one, place))
    found, labels = opened(tmp_path, records)
    first = found.examples[0]
    assert labels == ['a', 'b'] and first.name == '002.jpg' and first.scores == {1: 100, 2: 0}
    assert [first.predictions[n].words for n in (1, 2)] == ['1 disc', 'nothing'] and found.figure == 'R-precision'
