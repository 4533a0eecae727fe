"""Robustness against tests of data sets that were corrupted, resized and thinned out on disk, and means by hand."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadAnnotations, LoadImageFromFile, Resize
from mmengine.config import Config
from pydantic import ValidationError
from tiny import make_data, tiny, trained  # noqa: F401 (fixtures)
from tiny_detector import detector  # noqa: F401 (fixture)

from replk_mm.analysis import robustness
from replk_mm.analysis.corruptions import RobustnessSettings, corrupt
from replk_mm.analysis.robustness import Condition, Corrupt, measure_robustness
from replk_mm.commands import robustness as command
from replk_mm.data.transforms import CheckedLoad
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError
from replk_mm.evaluation.per_image import SegmentationCounts

# ruff: noqa: F811 (fixtures that come from another file)


def counts(seed: int) -> SegmentationCounts:
    rng = np.random.default_rng(seed)
    correct = rng.integers(1, 50, (6, 3))
    return SegmentationCounts(
        images=tuple('abcdef'),
        classes=('x', 'y', 'z'),
        intersection=correct,
        predicted=correct + rng.integers(0, 50, (6, 3)),
        label=correct + rng.integers(0, 50, (6, 3)),
    )


def test_means_and_ratios_of_metrics_for_any_weights():
    parts, weights = [counts(i) for i in range(4)], np.random.default_rng(9).random((5, 6))
    mean = robustness._Mean(parts[1:])
    by_hand = sum(part.score(weights) for part in parts[1:]) / 3
    for _ in range(2):  # the second time from memory
        assert mean.score(weights) == pytest.approx(by_hand, rel=1e-12)
        relative = robustness._Mean(parts[1:], parts[0]).score(weights)
        assert relative == pytest.approx(100 * by_hand / parts[0].score(weights), rel=1e-12)
    assert mean.score() == pytest.approx(sum(part.score() for part in parts[1:]) / 3)


@pytest.mark.parametrize(
    ('own', 'size'),
    [
        ([Resize(scale=(90, 60), keep_ratio=True)], (45, 30)),
        ([Resize(scale_factor=0.8, keep_ratio=True)], (36, 24)),
        ([], (45, 30)),
    ],
)
def test_a_corruption_comes_first_and_a_size_multiplies_that_of_the_config(own, size):
    steps = [CheckedLoad(LoadImageFromFile()), *own, LoadAnnotations()]
    before = [copy.copy(vars(step)) for step in steps]
    assert list(robustness._change(steps, Condition(), 0)) == steps
    first, second, *others = robustness._change(steps, Condition('fog', 3), 7)
    assert [first, *others] == steps
    assert isinstance(second, Corrupt) and second.arguments == ('fog', 3, 7)
    *resized, last = list(robustness._change(steps, Condition(scale=0.5), 0))[1:]
    assert last is steps[-1] and len(resized) == 1
    image = dict(img=np.zeros((60, 90, 3), np.uint8), img_shape=(60, 90))
    assert resized[0](image)['img'].shape[1::-1] == size
    assert [vars(step) for step in steps] == before


@pytest.mark.parametrize('kind', [np.uint8, np.float32])
def test_the_loaded_image_is_bgr_and_keeps_its_type(kind):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    found = Corrupt('gaussian_noise', 5, 1)(dict(img=np.ascontiguousarray(rgb[..., ::-1]).astype(kind)))['img']
    assert found.dtype == kind and found.flags.c_contiguous
    assert np.array_equal(found, corrupt(rgb, 'gaussian_noise', 5, 1)[..., ::-1])


def test_images_that_cannot_be_corrupted_are_named():
    with pytest.raises(UserError, match=r'small\.png.*RGB'):
        Corrupt('fog', 1, 0)(dict(img=np.zeros((20, 40, 3), np.uint8), img_path='small.png'))


@pytest.mark.parametrize(
    ('wrong', 'fragment'),
    [(dict(corruptions=['frost']), 'generated_frost'), (dict(severities=[6]), '5'), (dict(scales=[0]), '0')],
)
def test_unknown_settings(wrong, fragment):
    with pytest.raises(ValidationError, match=fragment):
        RobustnessSettings(**wrong)


def test_images_are_a_seeded_choice_over_all_data_sets(monkeypatch):
    built = SimpleNamespace(build=lambda cfg: cfg.get('indices') or range(cfg['count']))
    monkeypatch.setattr(robustness, 'DATASETS', built)
    found = []
    for seed in (0, 0, 1):
        parts = [dict(type='A', count=30), dict(type='B', count=90, indices=list(range(80, 90)))]
        loader = dict(dataset=dict(type='ConcatDataset', datasets=parts))
        robustness._choose_images(loader, RobustnessSettings(images=20, seed=seed))
        found.append([part['indices'] for part in loader['dataset']['datasets']])
        assert sum(len(set(indices)) for indices in found[-1]) == 20
        assert set(found[-1][0]) <= set(range(30)) and set(found[-1][1]) <= set(range(80, 90))
    assert found[0] == found[1] != found[2]


def test_a_wrong_path_of_the_other_data_set_costs_no_test(monkeypatch, tmp_path):
    tested = []

    def fail(cfg, checkpoint, options, *rest):
        tested.append(options.data_root)
        raise UserError('no such folder')

    monkeypatch.setattr(robustness, '_test', fail)
    with pytest.raises(UserError):
        measure_robustness(Config(), 'x.pth', RunOptions('here'), RobustnessSettings(shifted_root='there'), tmp_path)
    assert tested == ['there']


def test_the_record_averages_the_corrupted_tests_only(monkeypatch, tmp_path):
    def found(cfg, checkpoint, options, conditions, settings):
        first = 100 if options.data_root == 'there' else 0
        return 'mIoU', [counts(first + i) for i in range(len(conditions))], []

    for name, function in dict(_test=found, fetch_checkpoint=Path, hash_checkpoint=str).items():
        monkeypatch.setattr(robustness, name, function)
    settings = RobustnessSettings(
        corruptions=['fog', 'snow'], severities=[2, 4], scales=[0.5, 1.0], shifted_root='there'
    )
    values = measure_robustness(Config(), 'x.pth', RunOptions(), settings, tmp_path)['values']
    score = [counts(i).score()[0] for i in range(6)]  # clean, fog 2 and 4, snow 2 and 4, half the size
    cells = [[values['corruptions'][name][s]['value'] for s in ('2', '4')] for name in ('fog', 'snow')]
    assert np.ravel(cells) == pytest.approx(score[1:5])
    assert values['mean_under_corruption']['value'] == pytest.approx(np.mean(score[1:5]))
    assert values['relative']['value'] == pytest.approx(100 * np.mean(score[1:5]) / score[0])
    assert [values['sizes'][size]['value'] for size in ('1', '0.5')] == pytest.approx([score[0], score[5]])
    assert values['shifted']['value'] == pytest.approx(counts(100).score()[0])


def test_a_profile_draws_zeros():
    zero, clean = dict(value=0.0, low=0.0, high=4.0), dict(value=30.0, low=20.0, high=None)
    values = dict(
        metric='mIoU',
        images=9,
        clean=clean,
        corruptions=dict(elastic_transform={'1': zero, '5': dict(zero, value=None)}),
    )
    values |= dict(sizes={'1': clean, '2': zero}, mean_under_corruption=zero, relative=zero, shifted=zero)
    figure = robustness.draw_profile(values)
    assert figure.get_suptitle().endswith('clean 30.0, corrupted 0.0, 0 % of clean, other data 0.0')
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ['0.0', 'nan']
    segments = [line.get_segments()[0].tolist() for line in right.collections]
    assert segments == [[], [[2.0, 0.0], [2.0, 4.0]]]
    figure.draw_without_rendering()
    for label in (left.xaxis.label, right.xaxis.label):  # within the picture
        box = label.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    robustness.draw_profile(values | dict(clean=zero))


# -- trained networks -------------------------------------------------------------------------------------------------
def changed_copy(root: Path, folder: Path, change) -> Path:
    """A copy of a data set whose test images are replaced by ``change(rgb)``, without loss."""
    shutil.copytree(root, folder)
    for path in (folder / 'images/validation').iterdir():
        rgb = cv2.imread(str(path))[..., ::-1]
        path.write_bytes(cv2.imencode('.png', change(np.ascontiguousarray(rgb))[..., ::-1])[1].tobytes())
    return folder


@pytest.mark.slow
def test_every_condition_is_the_ordinary_test_of_such_data(tiny, trained, tmp_path):
    other = make_data(tmp_path / 'other', train=1, val=3)
    settings = RobustnessSettings(
        corruptions=['contrast', 'gaussian_noise'],
        severities=[1, 5],
        scales=[0.5, 1.0],
        shifted_root=str(other),
        seed=3,
    )

    def measured(name: str, **changes) -> dict:
        options = tiny.options(tmp_path / name)
        out = tmp_path / name / 'out'
        found = measure_robustness(tiny.cfg(), str(trained), options, settings.model_copy(update=changes), out)
        assert json.loads((out / 'robustness.json').read_text())['values'] == found['values']
        assert cv2.imread(str(out / 'robustness.png')) is not None
        return found

    def tested(root: Path, options: dict | None = None) -> float:
        work_dir = tmp_path / f'test{len(list(tmp_path.iterdir()))}'
        found = evaluate(tiny.cfg(options), str(trained), tiny.options(work_dir, data_root=str(root)))
        return pytest.approx(found.metrics['mIoU'], abs=1e-9)

    first = measured('first')
    values = first['values']
    assert measured('again')['values'] == values
    assert values['clean']['value'] == values['sizes']['1']['value'] == tested(tiny.data)
    cells = {name: [of[s]['value'] for s in ('1', '5')] for name, of in values['corruptions'].items()}
    for name, severity in (('contrast', 5), ('gaussian_noise', 1)):
        folder = changed_copy(tiny.data, tmp_path / name, lambda rgb: corrupt(rgb, name, severity, 3))  # noqa: B023
        assert cells[name][severity // 5] == tested(folder)
    mean = np.mean(list(cells.values()))
    assert values['mean_under_corruption']['value'] == pytest.approx(mean)
    assert values['relative']['value'] == pytest.approx(100 * mean / values['clean']['value'])
    half = [dict(type='LoadImageFromFile'), dict(type='Resize', scale_factor=0.5, keep_ratio=True)]
    pipeline = [*half, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    assert values['sizes']['0.5']['value'] == tested(tiny.data, {'test_dataloader.dataset.pipeline': pipeline})
    assert values['shifted']['value'] == tested(other) and values['shifted']['images'] == 3
    fewer = measured('fewer', images=1, corruptions=[], scales=[1.0], shifted_root=None)
    assert len(fewer['tested']) == 1 and fewer['values']['clean']['low'] is None
    thinned = changed_copy(tiny.data, tmp_path / 'thinned', lambda rgb: rgb)
    for path in (thinned / 'images/validation').iterdir():
        if path.stem != Path(fewer['tested'][0]).stem:
            path.unlink()
    assert fewer['values']['clean']['value'] == tested(thinned)


@pytest.mark.slow
def test_detectors_and_the_command(detector, tmp_path, monkeypatch, capsys):
    checkpoint = detector.train(tmp_path / 'train', 150, seed=2)  # finds objects whatever the CPU rounds
    start = [detector.config, checkpoint, '--data-root', detector.data, '--device', 'cpu']
    monkeypatch.setattr('sys.argv', ['robustness', *map(str, start), '--images', '2', '--out', str(tmp_path / 'out'),
                                     '--corruptions', 'contrast', '--severities', '5', '--scales', '1'])  # fmt: skip
    command.main()
    printed = capsys.readouterr().out
    values = json.loads((tmp_path / 'out' / 'robustness.json').read_text())['values']
    assert values['metric'] == 'coco/bbox_mAP' and values['images'] == 2
    assert (
        values['clean']['value'] > 0
        and f'{values["clean"]["value"]:.2f}' in printed
        and 'mean under corruption' in printed
    )
    listing = json.loads(next((detector.data / 'annotations').glob('*val*')).read_text())
    tested = json.loads((tmp_path / 'out' / 'robustness.json').read_text())['tested']
    listing['images'] = [image for image in listing['images'] if image['file_name'] in tested]
    ids = {image['id'] for image in listing['images']}
    listing['annotations'] = [one for one in listing['annotations'] if one['image_id'] in ids]
    folder = shutil.copytree(detector.data, tmp_path / 'thinned')
    next((folder / 'annotations').glob('*val*')).write_text(json.dumps(listing))
    cfg: Config = detector.cfg()
    found = evaluate(cfg, str(checkpoint), detector.options(tmp_path / 'test', data_root=str(folder)))
    assert values['clean']['value'] == pytest.approx(100 * found.metrics['coco/bbox_mAP'], abs=1e-9)


def test_the_command_names_the_option(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['robustness', 'a.py', 'b.pth', '--out', 'o', '--corruptions', 'fogg'])
    with pytest.raises(SystemExit):
        command.main()
    assert '--corruptions: unknown: fogg\nDid you mean fog?' in capsys.readouterr().err
