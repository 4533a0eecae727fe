"""Images, annotations, results and overrides made to do harm: a message each, little memory and time."""
import json
import subprocess
import sys
import time
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from coco_cases import SCORE, TRAIN, check, file  # noqa: F401
from coco_files import change
from compare_cases import write_record
from PIL import Image
from pycocotools import mask as rle
from tiny import tool_environment

from replk_mm import cli
from replk_mm.analysis.erf_result import KIND, Erf
from replk_mm.bench import records
from replk_mm.bench.compare import compare
from replk_mm.bench.compare.results import _is_known, open_result
from replk_mm.bench.suites.definition import read_suite
from replk_mm.data import coco_masks, files
from replk_mm.data.colour_images import read_image
from replk_mm.data.transforms import CheckedLoad
from replk_mm.errors import UserError

# ruff: noqa: F811 (a fixture that comes from another file)

LOAD_IMAGE = dict(type='LoadImageFromFile')
LOAD_LABELS = dict(type='mmseg.LoadAnnotations')
LOAD_OBJECTS = dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True)


def png(width: int, height: int, *parts: tuple[bytes, bytes]) -> bytes:
    """A PNG, grey, with the size that its header is to say."""
    def part(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, 'big') + name + content + zlib.crc32(name + content).to_bytes(4, 'big')

    header = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x08\0\0\0\0'
    return b'\x89PNG\r\n\x1a\n' + part(b'IHDR', header) + b''.join(part(*p) for p in parts) + part(
        b'IDAT', zlib.compress(bytes(4000))) + part(b'IEND', b'')


# ---- images

def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / 'large.png'
    path.write_bytes(png(20_000, 10_000))
    decoded = []
    monkeypatch.setattr(cv2, 'imread', lambda *args: decoded.append(args))
    monkeypatch.setattr(cv2, 'imdecode', lambda *args: decoded.append(args))
    label = dict(img=None, seg_map_path=str(path), reduce_zero_label=False, seg_fields=[])
    for read in (lambda: read_image(path), lambda: CheckedLoad(LOAD_IMAGE)(dict(img_path=str(path))),
                 lambda: CheckedLoad(LOAD_LABELS)(label)):
        with pytest.raises(UserError) as info:
            read()
        assert str(info.value).startswith(f'{path}: ') and '200,000,000 pixels' in str(info.value)
        assert f'{files.MAX_PIXELS:,}' in str(info.value)
    assert not decoded


def test_opencv_is_given_the_limit_too():
    """For formats that Pillow cannot look into; in a process that has imported nothing yet."""
    environment = {key: value for key, value in tool_environment().items() if key != 'OPENCV_IO_MAX_IMAGE_PIXELS'}
    done = subprocess.run([sys.executable, '-c', 'import replk_mm, os; print(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])'],
                          capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == files.MAX_PIXELS


def test_images_up_to_the_limit_are_read(tmp_path, monkeypatch):
    path = tmp_path / 'x.png'
    Image.new('RGB', (30, 20)).save(path)
    monkeypatch.setattr(files, 'MAX_PIXELS', 600)
    assert files.oversize(path) is None and read_image(path).shape == (20, 30, 3)
    monkeypatch.setattr(files, 'MAX_PIXELS', 599)
    assert '600 pixels' in files.oversize(path)


def test_a_part_longer_than_its_file(tmp_path):
    """OpenCV makes room for as much as is announced."""
    path = tmp_path / 'x.png'
    good = png(8, 8, (b'tEXt', b'a\0b'))
    at = good.index(b'tEXt') - 4
    path.write_bytes(good[:at] + (2**31 - 1).to_bytes(4, 'big') + good[at + 4:])
    with pytest.raises(UserError, match='2,147,483,647 bytes') as info:
        read_image(path)
    path.write_bytes(good + b'a film of a phone\xff\xff\xff')  # what follows the image is no part
    assert files.damage(path) is None


# ---- annotations

def objects(mask: object) -> dict:
    return dict(img=None, img_path='x.jpg', img_id=1, ori_shape=(64, 80), img_shape=(64, 80), height=64, width=80,
                instances=[dict(bbox=[4, 6, 20, 18], bbox_label=0, ignore_flag=0, mask=mask)])


GOOD = rle.frPyObjects([[4., 6, 20, 6, 20, 18, 4, 18]], 64, 80)[0]
MASKS = {
    'a polygon as wide as a planet': ([[0, 0, 9e8, 0, 9e8, 9e8]], 'outline'),
    'a polygon back and forth': ([[0, 0, 90_000, 90_000] * 200], 'outline'),
    'a corner at infinity': ([[0, 0, float('inf'), 0, 5, 5]], 'neither polygons nor RLE'),
    'a corner of four hundred digits': ([[0, 0, 10**400, .5, 5, 5]], 'neither polygons nor RLE'),
    'corners that cancel out': ([[0, 0, 10**400, -10**400, 5, 5]], 'neither polygons nor RLE'),
    'runs beyond the image': (dict(size=[64, 80], counts=[5000, 5000]), '10,000 pixels'),
    'runs whose sum overflows to the right one': (
        dict(size=[64, 80], counts=[2**62] * 4 + [64 * 80]), 'more than there are'),
    'a negative run': (dict(size=[64, 80], counts=[-5, 5125]), 'less than no pixels'),
    'compressed runs beyond the image': (dict(size=[64, 80], counts=rle.encode(
        np.ones((100, 100), np.uint8, order='F'))['counts'].decode()), 'more than there are'),
    'compressed runs that are cut off': (dict(size=[64, 80], counts=GOOD['counts'].decode()[:3] + 'o'), 'cut off'),
    'characters of no run': (dict(size=[64, 80], counts='\u20ac\x01'), 'characters'),
    'a mask as large as a country': (dict(size=[10**6, 10**6], counts=[10**12]), 'the image is 64x80'),
}


@pytest.mark.parametrize('name', MASKS)
def test_hostile_masks_do_not_reach_pycocotools(name, monkeypatch):
    mask, named = MASKS[name]
    for function in ('decode', 'frPyObjects', 'merge'):
        monkeypatch.setattr(rle, function, lambda *args: pytest.fail('pycocotools has read it'))
    with pytest.raises(UserError) as info:
        CheckedLoad(LOAD_OBJECTS)(objects(mask))
    assert named in str(info.value) and 'box [4, 6, 20, 18]' in str(info.value)


@pytest.mark.parametrize('mask', [
    [[4., 6, 20, 6, 20, 18, 4, 18]], dict(size=[64, 80], counts=GOOD['counts'].decode()),
    dict(size=[64, 80], counts=[100, 20, 5000])])
def test_good_masks_do(mask):
    found = CheckedLoad(LOAD_OBJECTS)(objects(mask))['gt_masks'].masks[0]
    encoded = rle.frPyObjects(mask, 64, 80) if isinstance(mask, list) or isinstance(mask['counts'], list) else mask
    expected = rle.decode(rle.merge(encoded) if isinstance(encoded, list) else encoded)
    assert (found == expected).all() and found.any()


def test_rle_problem_knows_what_pycocotools_writes():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 40, 2).tolist()
        pixels = np.asfortranarray(generator.random((height, width)) < generator.random(), np.uint8)
        encoded = rle.encode(pixels)
        mask = dict(size=[height, width], counts=encoded['counts'].decode())
        assert coco_masks.mask_problem(mask, (height, width)) is None
        wrong = coco_masks.mask_problem({**mask, 'size': [height + 1, width]})
        assert wrong is not None


def test_files_that_are_scored_have_their_masks_checked(file):
    change(file, lambda d: d['annotations'][0].update(segmentation=[[0, 0, 9e8, 0, 9e8, 9e8]]))
    with pytest.raises(UserError, match='outline is longer') as info:
        check(file, SCORE)
    assert check(file, TRAIN)  # which looks at each when it loads it


@pytest.mark.parametrize('crowd', [10**30, 'dog', [1], -1])
def test_crowds_that_are_neither_yes_nor_no(crowd, file):
    change(file, lambda d: d['annotations'][0].update(iscrowd=crowd))
    with pytest.raises(UserError, match='iscrowd'):
        check(file, SCORE)


# ---- results, suites, overrides

def test_numbers_of_many_digits(tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"version": ' + '9' * 5000 + '}\n')
    found, complaints = records.read([tmp_path / 'x.jsonl'])
    assert not found and 'not JSON' in complaints[0]
    path = tmp_path / 'metrics.json'
    path.write_text(json.dumps(dict(metrics={'mIoU': 10**400}, per_class={'a': {'IoU': 1}}, config='', checkpoint={},
                                    protocol={}, data={}, environment={})))
    with pytest.raises(UserError, match='no numbers') as info:
        open_result(str(path), 'A')


@pytest.mark.parametrize('place', ['beside the result', 'elsewhere', 'out of a package', 'of a package that is none'])
def test_a_result_does_not_say_what_is_run(place, tmp_path, monkeypatch):
    """The config that a result names is a program; a stranger's may come with the result."""
    proof, evil = tmp_path / 'proof', tmp_path / 'theirs' / 'evil.py'
    evil.parent.mkdir()
    evil.write_text(f'open({str(proof)!r}, "w").close()\n')
    monkeypatch.chdir(tmp_path)
    named = {'beside the result': str(evil), 'elsewhere': 'theirs/evil.py', 'out of a package': f'mmseg::{evil}',
             'of a package that is none': 'theirs::evil.py'}[place]
    folders = [write_record(tmp_path / name, named, tmp_path, {'mIoU': 5.}, {'a': dict(IoU=5., pixels=3)}, 1) for name in 'ab']
    with pytest.raises(UserError) as info:
        compare(str(folders[0]), str(folders[1]))
    assert not proof.exists()
    if place == 'beside the result':
        assert f'--config {evil}' in str(info.value)


def test_configs_of_this_project_are_run_for_a_result(tmp_path, monkeypatch):
    assert _is_known('configs/upernet_replk-nano_demo.py') and _is_known('replk_mm::upernet_replk-nano_demo.py')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    assert _is_known('configs/mine.py') and not _is_known('mine.py') and not _is_known('configs/../mine.py')
    (tmp_path / 'configs' / 'link.py').symlink_to(tmp_path / 'mine.py')
    assert not _is_known('configs/link.py')


def test_messages_hold_nothing_that_a_terminal_obeys(tmp_path):
    error = UserError('a class called \x1b]0;owned\x07\x9b2J \u202egnp.exe\nnext line\t\ud800')
    assert str(error) == 'a class called \\x1b]0;owned\\x07\\x9b2J \\u202egnp.exe\nnext line\t\\ud800'


def test_a_suite_that_multiplies_itself(tmp_path):
    lines = ['a0: &a0 [1, 1]', *(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 20))]
    (tmp_path / 'x.yaml').write_text('\n'.join(lines))
    start = time.process_time()
    with pytest.raises(UserError, match='more than 100,000 values') as info:
        read_suite(tmp_path / 'x.yaml')
    assert time.process_time() - start < 10
    proof = tmp_path / 'proof'
    (tmp_path / 'x.yaml').write_text(f'name: !!python/object/apply:os.mkdir ["{proof}"]\n')
    with pytest.raises(UserError, match='no YAML') as info:
        read_suite(tmp_path / 'x.yaml')
    assert not proof.exists()


@pytest.mark.parametrize(('text', 'named'), [
    ('a=' + '[' * 300 + ']' * 300, 'deep'), ('a=[' + '9,' * 3000 + ']', 'belongs into a config'),
    ('a={[1]}', 'cannot be read'),
    ('a={__import__("os").system("true"): 1}', 'cannot be read'), ('a={9**9**9: 1}', 'cannot be read')])
def test_overrides_are_not_computed(text, named, capsys):
    p = cli.parser('', '')
    cli.add_config_options(p)
    with pytest.raises(SystemExit) as info:
        p.parse_args(['--cfg-options', text])
    said = capsys.readouterr().err.splitlines()[-1]
    assert info.value.code == 2 and named in said and len(said) < 300
    if 'import' in text:
        pass


def test_a_receptive_field_that_unpacks_to_much_more(tmp_path):
    record = dict(kind=KIND, version=1, backbone='X', config='c.py', weights='random', trained=False, checkpoint=None, stage=3,
                  channels=8, map_size=[2, 2], size=8, images=2, image_set='0', silent=0, preprocessing={}, environment={},
                  matrix='erf.npz')
    (tmp_path / 'erf.json').write_text(json.dumps(record))
    np.savez_compressed(tmp_path / 'erf.npz', scores=np.ones((8, 8)))
    assert Erf.load(tmp_path / 'erf.json').scores.sum() == 64
    with zipfile.ZipFile(tmp_path / 'erf.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('scores.npy', bytes(50 << 20))
    with pytest.raises(UserError, match='unpacks to 52,428,800 bytes') as info:
        Erf.load(tmp_path / 'erf.json')
    np.savez(tmp_path / 'erf.npz', scores=np.array([[None] * 8] * 8, object))
    with pytest.raises(UserError, match='allow_pickle'):
        Erf.load(tmp_path / 'erf.json')


