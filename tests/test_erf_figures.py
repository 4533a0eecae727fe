"""What is made of the scores: areas, files, tables, comparisons."""
import json
from pathlib import Path

import numpy as np
import pytest
from erf_cases import _without_pictures, config, result, white  # noqa: F401

from replk_mm.analysis import erf_page
from replk_mm.analysis.erf import measure_erf
from replk_mm.analysis.erf_result import Erf, areas, paper_scale
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.mark.parametrize('size', [16, 17])
def test_areas_by_adding_up_squares(size):
    matrix = np.random.default_rng(0).random((size, size))**4
    middle = size // 2
    for share, area in areas(matrix).items():
        side = next(2 * i + 1 for i in range(size)
                    if matrix[max(0, middle - i):middle + i + 1, max(0, middle - i):middle + i + 1].sum()
                    >= float(share) * matrix.sum() - 1e-12)
        assert area == dict(side=min(side, size), ratio=pytest.approx((min(side, size) / size)**2))


def test_paper_scale_depends_on_the_size_of_gradients():
    scores = np.outer([1., 9, 99, 9, 1], [1., 9, 99, 9, 1])
    small, large = paper_scale(1e-9 * scores), paper_scale(1e9 * scores)
    assert np.abs(small - scores / scores.max()).max() < 1e-5
    # Scores of deep networks, far below what can be told from 1 when added to it.
    assert paper_scale(1e-20 * scores) == pytest.approx(scores / scores.max())
    assert large.min() > 0.6 and paper_scale(np.zeros((3, 3))).max() == 0
    assert paper_scale(np.array([[9., 99.]])) == pytest.approx(np.array([[0.5, 1]]))


def test_what_is_written_is_read_again(tmp_path, white):
    found = measure_erf(config(type='test_erf_ones'), None, white, 33, 1, tmp_path / 'out')
    again = Erf.load(tmp_path / 'out' / 'erf.json')
    assert (again.scores == found.scores).all() and again.values() == found.values() and again.protocol() == found.protocol()
    record = json.loads((tmp_path / 'out' / 'erf.json').read_text())
    assert record['values'] == found.values() and record['image_set'] == found.image_set


def test_comparison_refuses_sizes_and_says_the_rest():
    assert erf_page.remarks([result(), result()]) == []
    with pytest.raises(UserError, match=r'differ in size: A \(a\) 8, B \(b\) 16 pixels'):
        erf_page.remarks([result(), result(backbone='B', config='b', size=16)])
    said = '\n'.join(erf_page.remarks([result(), result(backbone='B', trained=False, map_size=(4, 4), image_set='1' * 64)]))
    assert 'untrained weights: B; the others are trained' in said
    assert 'the images are not the same' in said and 'strides of the maps differ: A 4, B 2' in said


def test_table_has_the_areas():
    scores = np.zeros((8, 8))
    scores[4, 4], scores[4, 5] = 3, 1
    text = erf_page.tables([result(scores=scores, trained=False)])
    # 3 of 4 in the pixel in the middle, the rest beside it.
    assert '| A | **untrained**: w | output 3, stride 4, 4 channels | 1 (1.6 %) | 1 (1.6 %) | 1 (1.6 %) | 3 (14.1 %) |' in text
    assert 'A +0.0, +0.2' in text


def test_page_block_is_renewed(tmp_path):
    page, picture = tmp_path / 'docs' / 'page.md', tmp_path / 'docs' / 'images' / 'x.png'
    page.parent.mkdir()
    with pytest.raises(UserError, match='No such file'):
        erf_page.renew(page, 'x', 'new\n', picture)
    page.write_text('before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n')
    erf_page.renew(page, 'x', 'new\n', picture)
    text = page.read_text()
    assert text.startswith('before\n<!-- x:begin -->\n![') and text.endswith('(images/x.png)\n\nnew\n<!-- x:end -->\nafter\n')
    with pytest.raises(UserError, match='expected one block'):
        erf_page.renew(page, 'y', 'new\n', picture)


@pytest.mark.parametrize(('record', 'said'), [
    ('no json', 'JSONDecodeError'), ('[]', 'TypeError'), ('{"kind": "mIoU", "version": 1}', "kind 'mIoU'"),
    ('{"kind": "effective receptive field", "version": 1, "size": 8, "matrix": "gone.npz"}', r'gone\.npz: no such file'),
    ('[' * 100_000, 'RecursionError')])
def test_reading_something_else(tmp_path, record, said):
    (tmp_path / 'erf.json').write_text(record)
    with pytest.raises(UserError, match=said):
        Erf.load(tmp_path / 'erf.json')


@pytest.mark.parametrize('content', [b'', b'PK\3\4', None])
def test_a_matrix_that_is_cut_off(tmp_path, content):
    result().save(tmp_path)
    whole_file = (tmp_path / 'erf.npz').read_bytes()
    (tmp_path / 'erf.npz').write_bytes(whole_file[:-30] if content is None else content)
    with pytest.raises(UserError, match=r'erf\.json: no effective receptive field.*\nIt is the erf\.json'):
        Erf.load(tmp_path / 'erf.json')


@pytest.mark.parametrize('changes', [dict(map_size=3), dict(map_size=[0, 2]), dict(scores=-np.eye(8) / 2),
                                     dict(scores=np.full((8, 8), np.nan))],
                         ids=['a number', 'no rows', 'negative', 'not finite'])
def test_a_record_that_cannot_be(tmp_path, changes):
    result(**{key: value for key, value in changes.items() if key == 'scores'}).save(tmp_path)
    record = json.loads((tmp_path / 'erf.json').read_text())
    record.update({key: value for key, value in changes.items() if key != 'scores'})
    (tmp_path / 'erf.json').write_text(json.dumps(record))
    with pytest.raises(UserError, match=r'erf\.json: no effective receptive field'):
        Erf.load(tmp_path / 'erf.json')


def test_networks_of_one_name_are_told_apart():
    paths = [Path(f'erf/{name}/erf.json') for name in ('k3', 'k31', 'trained')]
    found = erf_page.told_apart([result(trained=False), result(trained=False), result(weights='x.pth')], paths)
    assert [erf.backbone for erf in found] == ['A (k3)', 'A (k31)', 'A']
