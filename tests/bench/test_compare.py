"""Two segmentation results compared: against pixels counted one at a time, and against what a real test wrote."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from compare_cases import (
    IGNORED,
    change_record,
    config_text,
    known_configs,  # noqa: F401
    made_up,
    mean_iou,
    tally,
    write_data,
    write_result,
)
from PIL import Image
from tiny import run_tool, tiny, trained  # noqa: F401

from replk_mm.bench.compare.compare import compare_results, render_comparison
from replk_mm.bench.compare.pictures import NEITHER, A, B, draw_label_difference
from replk_mm.bench.compare.results import DataSource, read_result
from replk_mm.bench.compare.segmentation import SegmentationImages
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.record import evaluation_record, write_record
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.fixture
def case(tmp_path):
    return write_case(tmp_path, True)


def write_case(tmp_path, reduce_zero):
    labels, a, b = made_up(3)
    labels['07'] = np.full((6, 5), IGNORED)  # nothing is labelled
    a['07'] = b['07'] = np.zeros((6, 5), int)
    root = tmp_path / 'data'
    config = write_data(root, labels, reduce_zero)
    return (
        labels,
        a,
        b,
        write_result(tmp_path / 'a', config, root, labels, a, reduce_zero),
        write_result(tmp_path / 'b', config, root, labels, b, reduce_zero),
    )


@pytest.mark.parametrize('reduce_zero', [True, False])
def test_scores_are_those_of_counted_pixels(reduce_zero, tmp_path):
    labels, a, b, folder_a, folder_b = write_case(tmp_path, reduce_zero)
    found = compare_results(str(folder_a), str(folder_b / 'metrics.json'))
    scores = {entry['image']: entry for entry in found['images']['scores']}
    assert found['images']['count'] == 7 and scores.keys() == labels.keys() - {'07'}
    for name in scores:
        for letter, prediction in (('a', a), ('b', b)):
            confusion = tally([labels[name]], [prediction[name]], 4)
            assert scores[name][letter] == pytest.approx(mean_iou(confusion), abs=1e-9)
            assert scores[name][f'accuracy_{letter}'] == pytest.approx(
                100 * np.trace(confusion) / confusion.sum(), abs=1e-9
            )
    changes = {name: entry['b'] - entry['a'] for name, entry in scores.items()}
    assert [entry['image'] for entry in found['images']['changed']] == sorted(changes, key=lambda n: -abs(changes[n]))
    whole = [tally(list(labels.values()), list(x.values()), 4) for x in (a, b)]
    assert found['statistics']['difference'] == pytest.approx(mean_iou(whole[1]) - mean_iou(whole[0]), abs=1e-6)
    interval = found['statistics']
    assert interval['low'] < interval['difference'] < interval['high'] and 0 < interval['p'] < 1
    back = compare_results(str(folder_b), str(folder_a))['statistics']
    assert (back['low'], back['high']) == pytest.approx((-interval['high'], -interval['low']))
    assert found['only_predicted'] == [dict(name='cat', a=int(whole[0][:, 3].sum()), b=0)]
    assert whole[0][:, 3].sum() > 0


def test_counts_of_the_images_are_those_of_counted_pixels(tmp_path):
    labels, a, b, folder_a, folder_b = write_case(tmp_path, True)
    pair = read_result(str(folder_a), 'A'), read_result(str(folder_b), 'B')
    images = SegmentationImages(pair, DataSource(), str(tmp_path / 'data'))
    times = np.array([[2, 0, 1, 0, 0, 3, 0]])
    names = np.repeat(images.names, times[0])
    expected = [mean_iou(tally([labels[n] for n in names], [x[n] for n in names], 4)) for x in (a, b)]
    assert [found.score(times)[0] for found in images.statistics] == pytest.approx(expected)
    assert abs(expected[1] - expected[0]) > 1


def test_colours_tell_who_is_right():
    label = np.array([[0, 1, 2, 0, IGNORED]])
    a, b = np.array([[0, 1, 0, 1, 0]]), np.array([[0, 0, 2, 2, 0]])
    found = draw_label_difference(np.full((1, 5, 3), 100, np.uint8), label, a, b, IGNORED)
    assert [tuple(pixel[::-1]) for pixel in found[0].tolist()] == [(175, 175, 175), A, B, NEITHER, (255, 255, 255)]


def test_conditions_come_before_figures(case):
    folder_a, folder_b = case[3:]
    change_record(
        folder_b,
        checkpoint__iteration=80,
        protocol__tta=True,
        protocol__pipeline__1__scale=[128, 128],
        environment__torch='2.4',
        metrics__mFscore=7.5,
        per_class__sky__IoU=0.5,
    )
    found = compare_results(str(folder_a), str(folder_b), images=None)
    assert [(d['what'], d['key'], d['a'], d['b']) for d in found['differences']] == [
        ('training', 'iterations', '40', '80'),
        ('test', 'tta', 'False', 'True'),
        ('test', 'pipeline.1.scale', '[64, 64]', '[128, 128]'),
        ('environment', 'torch', '2.13', '2.4'),
    ]
    text = render_comparison(found)
    assert text.index('NOT MEASURED ALIKE') < text.index('pipeline.1.scale') < text.index('mIoU')
    assert 'images' not in found and 'time' not in {row['name'] for row in found['metrics']}
    assert [row for row in found['metrics'] if row['name'] == 'mFscore'] == [
        dict(name='mFscore', a=None, b=7.5, difference=None)
    ]
    changes = [abs(row['difference']) for row in found['per_class']['rows']]
    assert changes == sorted(changes, reverse=True) and len(changes) == 3
    worst, other, _ = found['per_class']['rows']
    assert worst['name'] == 'sky' and worst['difference'] < 0 < other['difference']


def test_equal_results_have_no_difference(case, tmp_path):
    found = compare_results(str(case[3]), str(case[3]), out=tmp_path)
    assert found['differences'] == found['images']['changed'] == found['pictures'] == []
    assert [found['statistics'][key] for key in ('low', 'high', 'p')] == [0, 0, 1]
    text = render_comparison(found)
    assert 'same checkpoint' in text and 'Measured alike' in text and 'No image changed' in text and 'NOT' not in text


def _of_other_image(a, b, root):
    (b / 'predictions' / '02.png').rename(b / 'predictions' / '99.png')


REFUSED = {
    'no predictions': (lambda a, b, root: shutil.rmtree(b / 'predictions'), '/b/predictions: .* 7 missing'),
    'of another image': (_of_other_image, '/b/predictions: .* 1 missing, 1 of other images .02.png is missing'),
    'cut off': (
        lambda a, b, root: (b / 'metrics.json').write_text('{"met'),
        '/b/metrics.json: not the result of a test',
    ),
    'huge number': (lambda a, b, root: change_record(b, metrics__mIoU=10**400), '/b/metrics.json: .*metrics.mIoU'),
    'no metrics.json': (lambda a, b, root: (b / 'metrics.json').unlink(), '/b: no metrics.json there'),
    'number of images': (
        lambda a, b, root: change_record(b, data__images=5),
        'different data .*images: 7 in A, 5 in B',
    ),
    'other classes': (
        lambda a, b, root: change_record(b, per_class__dog=dict(IoU=1.0, pixels=4)),
        'of dog: None in A, 4',
    ),
    'no IoU': (
        lambda a, b, root: change_record(b, per_class__sky__IoU=None),
        'not the predictions .* sky .* None there',
    ),
    'data moved': (
        lambda a, b, root: root.rename(root.parent / 'moved'),
        'is not where it was tested: .*--data-root DIR',
    ),
    'config moved': (
        lambda a, b, root: (root / 'config.py').unlink(),
        'its config is not there any more: .*--config FILE',
    ),
    'swapped': (
        lambda a, b, root: ((b / 'predictions').rename(b / 'x'), shutil.copytree(a / 'predictions', b / 'predictions')),
        '/b/predictions: not the predictions of .*/b/metrics.json',
    ),
    'one size': (
        lambda a, b, root: shutil.copy(b / 'predictions' / '01.png', b / 'predictions' / '02.png'),
        r'/b/predictions/02.png: .8, 9. pixels, the labels .9, 9.',
    ),
    'damaged': (
        lambda a, b, root: (b / 'predictions' / '02.png').write_bytes(b'x'),
        '/b/predictions/02.png: cannot be read',
    ),
    'relabelled': (
        lambda a, b, root: cv2.imwrite(str(root / 'labels' / '00.png'), np.full((7, 9), 2, np.uint8)),
        '/a/metrics.json: the labels are not those of the test',
    ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_rejected(what, case, tmp_path):
    spoil, message = REFUSED[what]
    spoil(case[3], case[4], tmp_path / 'data')
    with pytest.raises(UserError) as raised:
        compare_results(str(case[3]), str(case[4]))
    assert re.search(message, str(raised.value), re.DOTALL), raised.value
    assert '\n' in str(raised.value), 'no remedy'


def test_data_that_moved_are_named(case, tmp_path):
    before = compare_results(str(case[3]), str(case[4]))
    (tmp_path / 'data').rename(tmp_path / 'moved')
    source = DataSource(data_root=str(tmp_path / 'moved'), config=str(tmp_path / 'moved' / 'config.py'))
    assert compare_results(str(case[3]), str(case[4]), source) == before


def test_classes_that_the_test_was_given_are_given_again(case, tmp_path):
    before = compare_results(str(case[3]), str(case[4]))
    config = tmp_path / 'data' / 'config.py'
    config.write_text(config.read_text().replace("('sky', 'road', 'car', 'cat')", "('a', 'b', 'c', 'd')"))
    with pytest.raises(UserError, match='(?s)0 pixels of sky now.*--classes'):
        compare_results(str(case[3]), str(case[4]))
    assert compare_results(str(case[3]), str(case[4]), DataSource(classes='sky,road,car,cat')) == before


def test_suites_rows_and_figures_alone(case, tmp_path):
    for letter, seed in (('a', '0'), ('b', '1')):
        (tmp_path / 'runs' / 'replk-31' / seed).mkdir(parents=True)
        (tmp_path / letter).rename(tmp_path / 'runs' / 'replk-31' / seed / 'test')
    shutil.rmtree(tmp_path / 'data')
    found = compare_results(*(str(tmp_path / 'runs' / 'replk-31' / seed) for seed in '01'), images=None)
    assert (found['a']['name'], found['b']['name']) == ('replk-31/0', 'replk-31/1')
    assert found['metrics'][1]['name'] == 'mIoU' and found['metrics'][1]['difference'] > 5


def test_picked_classes_in_folders_of_cities(tmp_path):
    """Cityscapes' files, of which two classes are picked: their ids are mapped, and predictions lie in CITY/."""
    rng, root, names = np.random.default_rng(0), tmp_path / 'data', ('car', 'road')  # ids 13 and 0
    labels, predictions = {}, {'a': {}, 'b': {}}
    for city in ('aachen', 'bonn'):
        ids = rng.choice([0, 13, 5, 255], (8, 12))
        for part, name, pixels in (
            ('leftImg8bit', 'leftImg8bit', np.zeros((8, 12, 3))),
            ('gtFine', 'gtFine_labelTrainIds', ids),
        ):
            (root / part / 'val' / city).mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / part / 'val' / city / f'{city}_0_{name}.png')
        name = f'{city}/{city}_0_leftImg8bit'
        labels[name] = np.select([ids == 13, ids == 0], [0, 1], IGNORED)
        for x in predictions.values():
            x[name] = rng.integers(0, 2, (8, 12))
    config = tmp_path / 'config.py'
    config.write_text(
        config_text(
            'CityscapesDataset', root, names, data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val')
        )
    )
    folders = [write_result(tmp_path / x, config, root, labels, predictions[x], False, names) for x in 'ab']
    found = compare_results(*map(str, folders))
    for entry in found['images']['scores']:
        confusion = tally([labels[entry['image']]], [predictions['a'][entry['image']]], 2)
        assert entry['a'] == pytest.approx(mean_iou(confusion), abs=1e-9)
    assert len(found['images']['scores']) == 2


@pytest.mark.slow
def test_scores_of_a_test_are_reproduced(tiny, trained, tmp_path):
    """Real results: the figures of metrics.json come from the sums of the images, and the command shows all."""
    folders = []
    for name, options in (
        ('whole', {}),
        (
            'small',
            {
                'test_dataloader.dataset.pipeline': [
                    dict(type='LoadImageFromFile'),
                    dict(type='Resize', scale=(48, 40), keep_ratio=False),
                    dict(type='LoadAnnotations'),
                    dict(type='PackSegInputs'),
                ]
            },
        ),
    ):
        cfg, out = tiny.cfg(options), tmp_path / name
        found = evaluate(cfg, str(trained), tiny.options(tmp_path / 'work'), predictions=out / 'predictions')
        write_record(evaluation_record(cfg, str(trained), found, False), out / 'metrics.json')
        folders.append(out)
    run = run_tool('compare', *folders, '--out', tmp_path / 'out', '--config', tiny.config)
    assert run.returncode == 0, run.stderr
    assert 'NOT MEASURED ALIKE' in run.stdout and 'Resize' in run.stdout and 'same checkpoint' in run.stdout
    found = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    stated = [json.loads((folder / 'metrics.json').read_text())['metrics']['mIoU'] for folder in folders]
    assert found['statistics']['difference'] == pytest.approx(stated[1] - stated[0], abs=1e-6)
    assert abs(stated[1] - stated[0]) > 1e-3
    picture = cv2.imread(str(tmp_path / 'out' / found['pictures'][0]))
    for colour in (A, B):
        assert (picture[:, :-210] == colour[::-1]).all(-1).sum() > 50
    report = (tmp_path / 'out' / 'compare.md').read_text()
    assert f'![Images that changed most]({found["pictures"][0]})' in report
    assert all(entry['image'] in report for entry in found['images']['changed'])
