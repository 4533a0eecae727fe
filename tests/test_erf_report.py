"""Files, tables, comparisons and the command of effective receptive fields, and what is rejected."""
import contextlib
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from erf_cases import _without_pictures, config, drawn, paint, result, white  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import ROOT, tiny  # noqa: F401

from replk_mm.analysis import erf_report
from replk_mm.analysis.erf import KIND, Erf, areas, measure_erf, paper_scale
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
    assert (again.scores == found.scores).all()
    assert (again.values(), again.protocol()) == (found.values(), found.protocol())
    record = json.loads((tmp_path / 'out' / 'erf.json').read_text())
    assert record['values'] == found.values() and record['image_set'] == found.image_set


def test_comparison_refuses_sizes_and_says_the_rest():
    assert erf_report.remarks([result(), result()]) == []
    with pytest.raises(UserError, match=r'differ in size: A \(a\) 8, B \(b\) 16 pixels'):
        erf_report.remarks([result(), result(backbone='B', config='b', size=16)])
    other = result(backbone='B', trained=False, map_size=(4, 4), image_set='1' * 64)
    said = '\n'.join(erf_report.remarks([result(), other]))
    assert 'untrained weights: B; the others are trained' in said
    assert 'the images are not the same' in said and 'strides of the maps differ: A 4, B 2' in said


def test_table_has_the_areas():
    scores = np.zeros((8, 8))
    scores[4, 4], scores[4, 5] = 3, 1
    text = erf_report.tables([result(scores=scores, trained=False)])
    # 3 of 4 in the pixel in the middle, the rest beside it.
    assert ('| A | **untrained**: w | output 3, stride 4, 4 channels | 1 (1.6 %) | 1 (1.6 %) | 1 (1.6 %) | '
            '3 (14.1 %) |') in text
    assert 'A +0.0, +0.2' in text


READABLE = dict(kind=KIND, version=1, **{key: value for key, value in result().model_dump().items() if key != 'scores'},
                matrix='erf.npz')


def load(folder: Path, record, matrix: bytes | None = None) -> Erf:
    """Read a record; its matrix is the identity if none is given."""
    (folder / 'erf.json').write_text(record if isinstance(record, str) else json.dumps(record))
    if matrix is None:
        np.savez_compressed(folder / 'erf.npz', scores=np.eye(8))
    else:
        (folder / 'erf.npz').write_bytes(matrix)
    return Erf.load(folder / 'erf.json')


def saved(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(('changes', 'matrix', 'said'), [
    (dict(kind='mIoU'), None, "kind 'mIoU'"), (dict(matrix='gone.npz'), None, r'gone\.npz: no such file'),
    (dict(map_size=3), None, 'map_size'), (dict(map_size=[0, 2]), None, 'map_size'),
    (dict(size=10**9), None, 'must be'),
    ({}, b'PK\3\4', 'BadZipFile'), ({}, saved(scores=np.eye(8))[:-30], 'BadZipFile'),
    ({}, saved(x=np.eye(8)), 'KeyError'),
    ({}, saved(scores=-np.eye(8)), 'negative'), ({}, saved(scores=np.full((8, 8), np.nan)), 'finite'),
    ({}, saved(scores=np.array([[None] * 8] * 8, object)), 'allow_pickle')])
def test_records_and_matrices_that_do_not_fit(tmp_path, changes, matrix, said):
    assert load(tmp_path, READABLE).scores.sum() == 8
    with pytest.raises(UserError, match=said):
        load(tmp_path, {**READABLE, **changes}, matrix)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                                       max_size=3))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(READABLE)), json_values, max_size=3) | st.text(max_size=30),
       st.none() | st.binary(max_size=60))
def test_any_file_is_read_or_rejected(tmp_path_factory, changes, matrix):
    folder = tmp_path_factory.getbasetemp()
    record = changes if isinstance(changes, str) else {**READABLE, **changes}
    with contextlib.suppress(UserError):
        found = load(folder, record, matrix)
        assert found.values()['size'] == len(found.scores)


def test_networks_of_one_name_are_disambiguated():
    paths = [Path(f'erf/{name}/erf.json') for name in ('k3', 'k31', 'trained')]
    found = erf_report.disambiguate([result(trained=False), result(trained=False), result(weights='x.pth')], paths)
    assert [erf.backbone for erf in found] == ['A (k3)', 'A (k31)', 'A']


def test_image_set_is_told_by_content(tmp_path):
    one, copied = paint(tmp_path / 'a' / 'deep', 9, 8), paint(tmp_path / 'b', 9, 8)
    (copied / '1.png').rename(copied / 'renamed.png')
    (copied / 'notes.txt').write_text('no image')
    found = [measure_erf(config(type='test_erf_ones'), None, folder, 9, count, tmp_path / 'out').image_set
             for folder, count in ((one.parent, 2), (copied, 2), (copied, 1))]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(('model', 'arguments', 'said'), [
    *((dict(type='test_erf_ones'), dict(stage=stage), f'--stage {stage}: Ones has 3 outputs') for stage in (3, -1)),
    (dict(type='test_erf_given', call=lambda x: x.mean((2, 3))), {},
     r'output 0 has shape \(1, 3\); it is no feature map'),
    (dict(type='test_erf_given', call=lambda x: x / 0), {}, r'0\.png: the gradient of .* is not finite'),
    (dict(type='test_erf_given', call=lambda x: x[:, :, :0]), {}, r'fails on an image of 9x9'),
    (dict(type='test_erf_given', call=lambda x: x.detach()), {}, r'fails on an image of 9x9'),
    (dict(type='test_erf_ones'), dict(randomize=True, pretrained='x.pth'), r'--randomize: is for random weights'),
    (dict(type='test_erf_ones'), dict(checkpoint='y.pth', pretrained='x.pth'),
     r'--pretrained x\.pth: the checkpoint y\.pth'),
    (dict(type='test_erf_ones'), dict(pretrained='x.pth'), r'x\.pth: no such checkpoint'),
    (dict(type='NoSuchNet'), {}, r"model\.type='NoSuchNet': there is no such model"),
])
def test_mistakes(tmp_path, white, model, arguments, said):
    arguments = {'checkpoint': None, 'images': white, 'size': 9, 'count': 1, 'out': tmp_path / 'out', **arguments}
    with pytest.raises(UserError, match=said):
        measure_erf(config(**model), **arguments)


def test_images_that_cannot_be_used(tmp_path, white):
    def measure(folder):
        measure_erf(config(type='test_erf_ones'), None, folder, 9, 9, tmp_path / 'out')

    with pytest.raises(UserError, match='nowhere: no such folder'):
        measure(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='it is a file'):
        measure(white / '0.png')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no image in it'):
        measure(tmp_path / 'empty')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(white / '1.jpg')
    whole = (white / '1.jpg').read_bytes()
    for broken in (whole[:len(whole) // 2], b'', b'text'):
        (white / '1.jpg').write_bytes(broken)
        with pytest.raises(UserError, match=r'1\.jpg: not a readable image'):
            measure(white)


def test_command(tiny, tmp_path, white, drawn, monkeypatch, capsys):  # noqa: F811
    main = runpy.run_path(str(ROOT / 'tools' / 'erf.py'))['main']

    def run(*arguments) -> str:
        monkeypatch.setattr('sys.argv', ['erf.py', *map(str, arguments)])
        assert main() == 0
        return capsys.readouterr().out

    said = run(tiny.config, '--images', white, '--size', 64, '--count', 2, '--out', tmp_path / 'a', '--device', 'cpu')
    assert 'WEIGHTS: UNTRAINED' in said and '1 images there, 2 asked for' in said
    assert {path.name for path in (tmp_path / 'a').iterdir()} == {'erf.json', 'erf.npz', 'erf.png'}
    said = run('--compare', *[tmp_path / 'a' / 'erf.json'] * 2, '--out', tmp_path / 'b', '--name', 'pair')
    assert said.count('| RepLKNet (a) |') == 4 and 'untrained weights: all' in said
    assert {path.name for path in (tmp_path / 'b').iterdir()} == {'pair.md', 'pair.png'}
    picture = np.asarray(Image.open(tmp_path / 'b' / 'pair.png').convert('RGB'))
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 100, 'the heat maps are there'
