"""Measuring from a command: images, memory, progress, and what is refused."""
import runpy

import numpy as np
import pytest
from erf_cases import TINY, _without_pictures, config, drawn, paint, result, white  # noqa: F401
from PIL import Image
from tiny import ROOT, tiny  # noqa: F401

from replk_mm.analysis.erf import measure_erf
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def test_image_set_is_told_by_content(tmp_path):
    one, copied = paint(tmp_path / 'a' / 'deep', 9, 8), paint(tmp_path / 'b', 9, 8)
    (copied / '1.png').rename(copied / 'renamed.png')
    (copied / 'notes.txt').write_text('no image')
    found = [measure_erf(config(type='test_erf_ones'), None, folder, 9, count, tmp_path / 'out').image_set
             for folder, count in ((one.parent, 2), (copied, 2), (copied, 1))]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(('model', 'arguments', 'said'), [
    (dict(type='test_erf_ones'), dict(stage=3), r'--stage 3: Ones has 3 outputs'),
    (dict(type='test_erf_given', call=lambda x: x.mean((2, 3))), {}, r'output 0 is of shape \(1, 3\), no feature map'),
    (dict(type='test_erf_given', call=lambda x: x / 0), {}, r'0\.png: the gradient of .* is not finite'),
    (dict(type='test_erf_given', call=lambda x: x[:, :, :0]), {}, r'fails on an image of 9x9'),
    (dict(type='test_erf_given', call=lambda x: x.detach()), {}, r'fails on an image of 9x9'),
    (dict(type='test_erf_ones'), dict(randomize=True, pretrained='x.pth'), r'--randomize: is for random weights'),
    (dict(type='test_erf_ones'), dict(checkpoint='y.pth', pretrained='x.pth'), r'--pretrained x\.pth: the checkpoint y\.pth'),
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


def test_progress_says_how_long(tmp_path):
    said: list[str] = []
    images = paint(tmp_path / 'images', 9, 9, 9)
    measure_erf(config(type='test_erf_ones'), None, images, 9, 9, tmp_path / 'out', progress=said.append)
    assert said[0].startswith('image 1 of 3, ') and said[-1] == 'image 3 of 3, 0 s left'


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


def test_command_says_what_it_refuses(tmp_path, drawn, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / 'tools' / 'erf.py'))['main']
    result().save(tmp_path)
    (tmp_path / 'pair.md').mkdir()
    given = ['erf.py', '--out', str(tmp_path), '--name', 'pair']
    monkeypatch.setattr('sys.argv', [*given, '--compare', str(tmp_path / 'erf.json')])
    assert main() == 2
    assert f'error: {tmp_path}/pair.md: cannot be written (Is a directory)' in capsys.readouterr().err
    monkeypatch.setattr('sys.argv', [*given, 'config.py', '--stage', '-1'])
    with pytest.raises(SystemExit):
        main()
    assert 'argument --stage: -1 is not at least 0' in capsys.readouterr().err
