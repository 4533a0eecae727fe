"""A result does not choose the code that a comparison runs; its names stay text."""

import re
from pathlib import Path

import pytest
from compare_cases import write_metrics_file
from PIL import Image

from replk_mm.bench.compare import results
from replk_mm.bench.compare.compare import compare_results, write_comparison
from replk_mm.bench.compare.results import _is_trusted, read_result
from replk_mm.bench.compare.segmentation import SegmentationImages
from replk_mm.errors import UserError


@pytest.mark.parametrize('place', ['beside the result', 'elsewhere', 'out of a package', 'of a package that is none'])
def test_a_result_does_not_choose_code_to_run(place, tmp_path, monkeypatch):
    """The config that a result names is a program; a stranger's may come with the result."""
    proof, evil = tmp_path / 'proof', tmp_path / 'theirs' / 'evil.py'
    evil.parent.mkdir()
    evil.write_text(f'open({str(proof)!r}, "w").close()\n')
    monkeypatch.chdir(tmp_path)
    named = {
        'beside the result': str(evil),
        'elsewhere': 'theirs/evil.py',
        'out of a package': f'mmseg::{evil}',
        'of a package that is none': 'theirs::evil.py',
    }[place]
    folders = [
        write_metrics_file(tmp_path / name, named, tmp_path, {'mIoU': 5.0}, {'a': dict(IoU=5.0, pixels=3)}, 1)
        for name in 'ab'
    ]
    with pytest.raises(UserError) as info:
        compare_results(str(folders[0]), str(folders[1]))
    assert not proof.exists()
    if place == 'beside the result':
        assert f'--config {evil}' in str(info.value)


@pytest.mark.parametrize('link', ['predictions', 'predictions/x.png'])
def test_predictions_are_in_the_folder_of_their_result(link, tmp_path):
    (tmp_path / 'home/predictions').mkdir(parents=True)
    Image.new('L', (4, 4), 1).save(tmp_path / 'home/predictions/x.png')
    classes = {'a': dict(IoU=5.0, pixels=3)}
    folder = write_metrics_file(tmp_path / 'theirs', 'x.py', tmp_path, {'mIoU': 5.0}, classes, 1)
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(tmp_path / 'home' / link)
    images = SegmentationImages.__new__(SegmentationImages)
    images.names, images._first = ['x'], 0
    with pytest.raises(UserError, match='outside of'):
        images.prediction(0, read_result(str(folder), 'A'))


def test_names_of_classes_and_metrics_stay_text(tmp_path):
    hostile = '<img src=x onerror=alert(1)>|![](http://x)'
    figures = {'mIoU': 5.0, hostile: 1.0}, {hostile: dict(IoU=5.0, pixels=3), 'b_c': dict(IoU=4.0, pixels=3)}
    folders = [str(write_metrics_file(tmp_path / name, hostile, tmp_path, *figures, 1)) for name in 'ab']
    write_comparison(compare_results(*folders, images=None), tmp_path)
    text = (tmp_path / 'compare.md').read_text().removesuffix('<!-- generator: replk_mm -->\n')
    assert text.count(r'\<img src=x onerror=alert(1)\>\|!\[\](http://x)') == 4
    assert not re.search(r'(?<!\\)<', text) and '| b_c ' in text


def test_configs_of_this_project_are_run_for_a_result(tmp_path, monkeypatch):
    assert _is_trusted('configs/upernet_replk-nano_demo.py') and _is_trusted('replk_mm::upernet_replk-nano_demo.py')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    # A folder of downloaded results can contain configs/ too.
    assert not _is_trusted('configs/mine.py') and not _is_trusted('mine.py')
    (tmp_path / 'configs' / 'link.py').symlink_to(tmp_path / 'mine.py')
    assert not _is_trusted('configs/link.py')
    shipped = Path(results.__file__).parents[3] / 'configs'
    assert _is_trusted(str(shipped / 'mine.py')) and not _is_trusted(str(shipped / '..' / 'mine.py'))
