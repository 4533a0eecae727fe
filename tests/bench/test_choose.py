"""The plan of ``choose``: data sets, weights, budgets, and the answer without weights."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset, CityscapesDataset
from PIL import Image
from report_records import counted, record, write

from replk_mm.bench import choose
from replk_mm.bench.report.field import FieldRow
from replk_mm.bench.report.load import load_report
from replk_mm.checkpoints.io import DownloadError
from replk_mm.data.scenes.spec import DEMO_CLASSES, THING_CLASSES
from replk_mm.data.scenes.writer import META, write_demo_data
from replk_mm.errors import UserError


def occurring(folder: Path, pattern: str, classes: tuple[str, ...], first: int) -> list[str]:
    """Names of the label ids in the files, read by hand."""
    ids = set().union(*(np.unique(Image.open(path)).tolist() for path in folder.glob(pattern)))
    return [classes[i - first].strip() for i in sorted(ids - {255, first - 1})]


@pytest.mark.parametrize('layout', ['ade20k', 'cityscapes', 'coco'])
def test_layout_classes_and_size_are_found(layout, tmp_path) -> None:
    write_demo_data(tmp_path / 'd', layout, train=4, val=2, size=(300, 400))
    if layout == 'ade20k':
        (tmp_path / 'd' / META).unlink()  # photographs have none
    data = choose.read_data(tmp_path / 'd')
    names = dict(
        ade20k=occurring(tmp_path, 'd/annotations/*/*.png', ADE20KDataset.METAINFO['classes'], 1),
        cityscapes=occurring(tmp_path, 'd/gtFine/*/demo/*TrainIds.png', CityscapesDataset.METAINFO['classes'], 0),
        coco=list(THING_CLASSES),
    )[layout]
    assert [name.strip() for name in data.names] == names
    assert data.classes == ('auto' if layout == 'coco' else data.names)
    assert (data.shape, data.train, data.test) == ((300, 400), 4, 2)
    assert data.layout.task == ('detection' if layout == 'coco' else 'segmentation')


@pytest.mark.parametrize(('size', 'shape'), [((96, 128), (256, 341)), ((1024, 2048), (512, 1024))])
def test_small_and_large_images_are_resized(size, shape, tmp_path) -> None:
    write_demo_data(tmp_path / 'd', train=2, val=2, size=size)
    data = choose.read_data(tmp_path / 'd')
    assert data.shape == shape
    assert (data.classes, data.names) == ('auto', list(DEMO_CLASSES))


def test_an_unclear_layout_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match='no such folder'):
        choose.read_data(tmp_path / 'missing')
    with pytest.raises(UserError, match='annotations/training') as info:
        choose.read_data(tmp_path)
    assert str(tmp_path) in str(info.value).splitlines()[0]
    for folder in ('annotations/training', 'gtFine/train'):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match='several'):
        choose.read_data(tmp_path)
    with pytest.raises(UserError, match='instances_train2017'):
        choose.read_data(tmp_path, 'detection')


def test_weights_that_are_not_here_are_named_and_hosts_asked_once(monkeypatch, tmp_path) -> None:
    asked = []

    def fetch(address: str) -> Path:
        asked.append(address)
        if 'github.com' in address:
            raise DownloadError('no network')
        return tmp_path / 'file.pth'

    monkeypatch.setattr(choose, 'fetch_checkpoint', fetch)
    names = ['moganet-xtiny.in1k', 'moganet-tiny', 'convnext-tiny', 'convnextv2-atto', 'resnet-50', 'van-b4']
    rows, missing = choose.find_weights(names, licence='permissive')
    assert [row['backbone'] for row in rows] == ['convnext-tiny.in1k', 'mmseg.ResNet(depth=50)']
    assert rows[1]['pretrained'] == str(tmp_path / 'file.pth') and rows[1]['pretraining'] == 'ImageNet-1K'
    assert sum('github.com' in address for address in asked) == 1
    assert all('https://github.com/' in missing[name] and ' as /' in missing[name] for name in names[:2])
    assert 'CC-BY-NC' in missing['convnextv2-atto'] and 'van-b4' in missing
    with pytest.raises(UserError, match='no such backbone'):
        choose.find_weights(['convnxt-tiny'])


def test_training_from_scratch_needs_no_weights(monkeypatch) -> None:
    monkeypatch.setattr(choose, 'fetch_checkpoint', lambda address: pytest.fail('asked for weights'))
    rows, missing = choose.find_weights(['convnext-tiny.in1k', 'van-b4', 'swin-tiny'], scratch=True)
    assert [row['backbone'] for row in rows] == ['convnext-tiny', 'van-b4', 'mmseg.SwinTransformer']
    assert not missing and not any('pretrained' in row for row in rows)


def costs(*seconds: float, iteration: float = 0.0) -> list[choose.RowCost]:
    return [choose.RowCost(str(i), s, s, iteration * s) for i, s in enumerate(seconds)]


@pytest.mark.parametrize(
    ('found', 'budget', 'expected'),
    [
        (costs(1, 2, 3), 24.0, (['0', '1', '2'], 3, 0, 24)),
        (costs(1, 2, 3), 23.9, (['0', '1', '2'], 2, 0, 18)),
        (costs(3, 1, 2), 17.9, (['1', '2'], 3, 0, 12)),
        (costs(9, 1, 2), 17.9, (['1', '2'], 3, 0, 12)),
        (costs(5, 6), 1.0, (['0', '1'], 2, 0, 33)),
    ],
)
def test_rows_and_seeds_fit_the_budget(found, budget, expected) -> None:
    assert choose.fit_budget(found, budget) == expected


def test_controls_are_left_out_once_two_other_rows_remain() -> None:
    assert choose.fit_budget(costs(5, 1, 1), 12.0).rows == ['1', '2']
    assert choose.fit_budget(costs(4, 1, 1), 15.0, keep=['0']).rows == ['1', '2']
    assert choose.fit_budget(costs(4, 1, 2, 3), 24.0, keep=['0']).rows == ['0', '1', '2']
    assert choose.fit_budget(costs(30, 60, 70, 80), 1.0, keep=['2', '3']).rows == ['0', '1']
    assert choose.fit_budget(costs(9, 7, 8), 1.0, keep=['1', '2']).rows == ['0', '1']


def test_iterations_use_the_rest_of_the_budget() -> None:
    generator = random.Random(0)
    for _ in range(50):
        found = costs(*(generator.uniform(1, 9) for _ in range(4)), iteration=0.01)
        budget = generator.uniform(20, 400)
        planned = choose.fit_budget(found, budget, most=500)
        kept = [cost for cost in found if cost.name in planned.rows]
        assert planned.seconds == pytest.approx(sum(c.seconds(planned.seeds, planned.iterations) for c in kept))
        assert 100 <= planned.iterations <= 500
        fits = [  # by brute force: the slowest rows go first
            (count, seeds)
            for count, seeds in itertools.product((4, 3, 2), (3, 2))
            if sum(c.seconds(seeds, 100) for c in sorted(found, key=lambda c: c.once)[:count]) <= budget
        ]
        if fits:
            assert (len(kept), planned.seeds) == fits[0] and planned.seconds <= budget
            one_more = sum(c.seconds(planned.seeds, planned.iterations + 1) for c in kept)
            assert planned.iterations == 500 or one_more > budget


def row(name: str, score: float, milliseconds: float) -> FieldRow:
    result = SimpleNamespace(backbone=name, metrics=dict(miou_ss=score))
    return FieldRow(1, result, (1, 1), None, 1.0, milliseconds, 'MIT', True)


def test_prior_evidence_is_labelled_and_names_the_front() -> None:
    rows = [row('Big', 50.0, 90.0), row('Slow', 45.0, 99.0), row('Small', 40.0, 9.0), row('Tie', 50.0, 95.0)]
    text = ' '.join(choose.prior_answer('segmentation', rows, 'on a machine'))
    assert 'Not decided on your images' in text and 'Prior evidence on other data' in text and 'ADE20K' in text
    assert 'Big (50.0, 90 ms) is the best of 4 timed here' in text and 'Small (40.0, 9 ms)' in text
    assert 'Slow' not in text and 'Tie' not in text and 'on a machine' in text
    assert 'within your limits' in ' '.join(choose.prior_answer('detection', [], 'on a machine'))


def test_a_class_ranks_rows_with_its_interval(tmp_path) -> None:
    expected = {}
    for name, quality in (('x', 0.6), ('y', 0.9)):
        found = [counted(tmp_path, name, seed, quality) for seed in range(2)]
        ious = []
        for one in found:
            with np.load(tmp_path / one['files']['statistics']) as counts:
                right, predicted, label = (counts[key].sum(0) for key in ('intersection', 'predicted', 'label'))
            ious.append(100 * right / (predicted + label - right))
            one['values']['per_class'] = {c: dict(IoU=ious[-1][i]) for i, c in enumerate('ab')}
        expected[name] = float(np.mean(ious, 0)[1])
        write(tmp_path, found)
    [group] = load_report([tmp_path], metric='b').suites[0].groups
    figures = {row.name: row.figures['metric'] for row in group.rows}
    assert group.metric == 'b' and list(figures) == ['y', 'x']
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value)
        assert figures[name].low < value < figures[name].high


def test_ap_of_a_size_ranks_rows_without_an_interval(tmp_path) -> None:
    names = {'coco/bbox_mAP': 40.0, 'coco/bbox_mAP_s': 12.0}
    values = dict(primary='coco/bbox_mAP', unit='AP', metrics=names, per_class={})
    write(tmp_path, [record('x', 0, 'metric', values)])
    [group] = load_report([tmp_path], metric='AP_small').suites[0].groups
    figure = group.rows[0].figures['metric']
    assert (figure.value, figure.low) == (12.0, None)
    with pytest.raises(UserError, match=r"'AP_tiny'\nKnown: .*AP_small"):
        load_report([tmp_path], metric='AP_tiny')
