"""The checks of images and label maps find every planted fault and nothing else; training stops at the same errors."""

import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from check_data_cases import codes, data, found, full, image, label, seg_config, write_pairs  # noqa: F401 (a fixture)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from replk_mm.data import files
from replk_mm.data.checks.audit import audit, check_data
from replk_mm.data.checks.dataset import DatasetReport, LabelFormat, Sample, check_reduce_zero_label
from replk_mm.data.checks.images import ORIENTATION, inspect_sample
from replk_mm.data.files import check_image_file, pick_evenly, read_image
from replk_mm.data.findings import InvalidDataError
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
NOISE = np.random.default_rng(0)


def noise(height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 255, (height, width, 3), np.uint8))


def ids(*values: int, size: tuple[int, int] = (64, 64), dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.resize(np.array(values, dtype), size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = content.index(b'IDAT') + 8
    content[middle : middle + 12] = bytes(12)
    path.write_bytes(content)


def rotated(path: Path, orientation: int, height: int = 64, width: int = 64) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise(height, width).save(path, exif=exif)


def rotate_beside(root: Path, i: int) -> None:
    rotated(image(root, i), 6, 48, 64)
    ids(1, size=(48, 64)).save(label(root, i))


def bomb(path: Path) -> None:
    """A small PNG of 400 million pixels."""
    buffer = io.BytesIO()
    Image.new('1', (20_000, 20_000)).save(buffer, 'png')
    path.write_bytes(buffer.getvalue())


def rename(root: Path, i: int) -> None:
    image(root, i).rename(image(root, i).with_suffix('.JPEG'))


#: A fault, and the codes and files of its findings. Each is planted in its own pair.
FAULTS: list[tuple[Callable[[Path, int], object], dict[str, Callable]]] = [
    (lambda r, i: cut(image(r, i)), {'unreadable': image}),
    (lambda r, i: cut(label(r, i)), {'unreadable': label}),
    (lambda r, i: image(r, i).write_bytes(b''), {'unreadable': image}),
    (lambda r, i: label(r, i).write_bytes(b''), {'unreadable': label}),
    (lambda r, i: image(r, i).write_text('<html>404</html>'), {'unreadable': image}),
    (lambda r, i: label(r, i).write_text('<html>404</html>'), {'unreadable': label}),
    (lambda r, i: break_inside(label(r, i)), {'unreadable': label}),
    (lambda r, i: bomb(image(r, i)), {'unreadable': image}),
    (lambda r, i: ids(1, size=(32, 48)).save(label(r, i)), {'size-mismatch': label}),
    (lambda r, i: noise().save(label(r, i)), {'label-channels': label}),
    (lambda r, i: noise().convert('RGBA').save(label(r, i)), {'label-channels': label}),
    (lambda r, i: ids(1.5, dtype=np.float32).save(label(r, i), 'tiff'), {'label-channels': label}),
    (lambda r, i: ids(3).save(label(r, i), 'jpeg'), {'label-lossy': label}),
    (lambda r, i: ids(1, 257, dtype=np.uint16).save(label(r, i)), {'label-out-of-range': label}),
    (lambda r, i: ids(1, 9, 200).save(label(r, i)), {'label-out-of-range': label}),
    (lambda r, i: ids(0, 255).save(label(r, i)), {'label-all-ignored': label}),
    (rotate_beside, {'exif-turned': image}),
    (lambda r, i: rotated(image(r, i), 3), {'exif-orientation': image}),
    (lambda r, i: label(r, i).unlink(), {'label-missing': label}),
    (lambda r, i: image(r, i).unlink(), {'label-without-image': label}),
    (rename, {'suffix-ignored': lambda r, i: image(r, i).with_suffix('.JPEG'), 'label-without-image': label}),
    (lambda r, i: shutil.copy(image(r, i - 1), image(r, i)), {'duplicate-image': image}),
]
#: Changes that are no faults.
HARMLESS: list[Callable[[Path, int], object]] = [
    lambda r, i: ids(1, 2, dtype=np.uint16).save(label(r, i)),
    lambda r, i: ids(1, 2, 8).convert('P').save(label(r, i)),
    lambda r, i: Image.fromarray(np.eye(64, dtype=bool)).save(label(r, i)),
    lambda r, i: noise().save(image(r, i), 'png'),
    lambda r, i: noise().convert('CMYK').save(image(r, i)),
    lambda r, i: noise().save(image(r, i), 'mpo', save_all=True, append_images=[noise()]),
]


@pytest.fixture
def faulty(tmp_path) -> tuple[Path, set[tuple[str, str]]]:
    """A data set with every fault, and what the checks must find."""
    write_pairs(tmp_path, 'train', 2 * len(FAULTS) + len(HARMLESS))
    write_pairs(tmp_path, 'val', 3)
    for i, plant in enumerate(HARMLESS):
        plant(tmp_path, 2 * len(FAULTS) + i)
    expected = set()
    for i, (plant, files_by_code) in enumerate(FAULTS):
        plant(tmp_path, 2 * i + 1)
        expected |= {(code, str(file(tmp_path, 2 * i + 1))) for code, file in files_by_code.items()}
    shutil.copy(image(tmp_path, 0), image(tmp_path, 1, 'val'))
    return tmp_path, expected | {('leak', str(image(tmp_path, 1, 'val')))}


def test_full_audit_finds_every_fault_and_nothing_else(faulty):
    root, expected = faulty
    assert found(full(seg_config(root))) == expected


def test_training_finds_the_same_errors_in_a_sample(faulty):
    """The sample is all files here. Copies under another name take the hashes of all images."""
    root, expected = faulty
    result = audit(seg_config(root), jobs=1)
    assert found(result) == {one for one in expected if one[0] not in ('duplicate-image', 'leak')}
    with pytest.raises(InvalidDataError, match='check_data CONFIG lists all') as info:
        check_data(seg_config(root), ('train', 'val'))
    assert len(info.value.findings) == sum(1 for _ in result.findings())


@pytest.mark.slow
def test_processes_find_the_same_as_one(faulty):
    assert found(full(seg_config(faulty[0]), jobs=2)) == faulty[1]


@pytest.mark.parametrize(
    ('change', 'code', 'path'),
    [
        (lambda r: shutil.rmtree(r), 'data-root-missing', ''),
        (lambda r: shutil.rmtree(r / 'images'), 'folder-missing', 'images/training'),
        (lambda r: shutil.rmtree(r / 'annotations'), 'folder-missing', 'annotations/training'),
        (
            lambda r: [p.rename(p.with_suffix('.webp')) for p in (r / 'images/training').iterdir()],
            'no-images',
            'images/training',
        ),
        (lambda r: (shutil.rmtree(r / 'annotations'), (r / 'index_ade20k.pkl').touch()), 'ade-full-release', ''),
    ],
)
def test_folders(data, change, code, path):
    change(data)
    cfg = seg_config(data, 150, type='ADE20KDataset', metainfo=None)
    assert (code, str(data / path)) in found(full(cfg)) and code in codes(full(cfg), 'error')
    with pytest.raises(UserError, match=str(data / path)):
        check_data(cfg, ('train', 'val'))


def test_nested_data_root_is_suggested(data):
    with pytest.raises(UserError, match=f'Did you mean --data-root {data}') as info:
        check_data(seg_config(data.parent), ('train', 'val'))
    assert 'the data root contains: data' in str(info.value)


def test_list_of_images(data):
    names = [image(data, i).stem for i in range(3)]
    (data / 'list.txt').write_text('\n'.join([*names, 'ghost']))
    cfg = seg_config(data, splits=('train',), ann_file='list.txt')
    assert found(full(cfg)) == {
        ('image-missing', str(data / 'images/training/ghost.jpg')),
        ('label-missing', str(data / 'annotations/training/ghost.png')),
    }
    assert full(cfg).datasets[0].inspected == 3
    cfg = seg_config(data, splits=('train',), ann_file='gone.txt')
    assert found(full(cfg)) == {('annotation-file-missing', str(data / 'gone.txt'))}


@pytest.mark.parametrize(
    ('changes', 'code', 'text'),
    [
        (
            dict(pipeline=[dict(type='LoadAnnotations', reduce_zero_label=False)]),
            'reduce-zero-pipeline',
            'False in the pipeline',
        ),
        (dict(type='ADE20KDataset', metainfo=dict(classes=('wall', 'martian'))), 'dataset-invalid', 'martian'),
        (dict(metainfo=dict(classes=tuple('abc'))), 'classes-mismatch', 'train_dataloader.dataset has 3 classes'),
    ],
)
def test_contradictory_config(data, changes, code, text):
    cfg = seg_config(data, splits=('train',), **changes)
    finding = next(finding for _, finding in full(cfg).findings() if finding.code == code)
    assert text in finding.message and finding.severity == 'error'


@pytest.mark.parametrize('changes', [dict(type='ADE20KDatset'), dict(type=None)])
def test_unknown_data_set_type(data, changes):
    with pytest.raises(UserError, match='ADE20KDatset|not a data set'):
        full(seg_config(data, **changes))


def test_subset_of_the_classes_of_a_type(data):
    """The files still hold the ids of all classes; mmseg maps them."""
    ids(1, 150).save(label(data, 0))
    cfg = seg_config(data, 2, splits=('train',), type='ADE20KDataset', metainfo=dict(classes=('wall', 'sky')))
    assert not codes(full(cfg), 'error')
    cfg.train_dataloader.dataset.metainfo = dict(classes=('sky', 'floor'))
    for path in data.glob('annotations/training/*'):
        ids(1, 2).save(path)
    assert codes(full(cfg), 'error') == {'nothing-labelled'}, 'all pixels are of classes that are not used'
    ids(1, 151).save(label(data, 0))
    assert codes(full(cfg), 'error') == {'label-out-of-range'}


@pytest.mark.parametrize(
    ('layout', 'kind', 'classes'), [('ade20k', 'BaseSegDataset', 8), ('cityscapes', 'CityscapesDataset', 19)]
)
def test_generated_scenes_are_clean(tmp_path, layout, kind, classes):
    write_demo_data(tmp_path, layout, train=4, val=2, size=(64, 64))
    result = full(camvid(tmp_path, layout, kind, classes))
    assert codes(result, 'error', 'warning') <= {'class-absent'} and [one.inspected for one in result.datasets] == [
        4,
        2,
    ]


def camvid(root: Path, layout: str, kind: str, classes: int):
    own = {} if kind == 'BaseSegDataset' else dict(metainfo=None)
    cfg = seg_config(root, classes, type=kind, reduce_zero_label=layout != 'cityscapes', **own)
    for split in ('train', 'val') if layout == 'cityscapes' else ():
        prefix = dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}')
        cfg[f'{split}_dataloader'].dataset.data_prefix = prefix
    return cfg


@pytest.mark.parametrize(
    ('layout', 'kind', 'classes'), [('ade', 'ADE20KDataset', 150), ('cityscapes', 'CityscapesDataset', 19)]
)
def test_photographs_lack_classes_only(reference, layout, kind, classes):
    result = full(camvid(reference / 'data/camvid' / layout, layout, kind, classes))
    assert codes(result) == {'class-absent'} and not codes(result, 'error')
    assert [one.inspected for one in result.datasets] == [32, 16]
    assert sum(result.datasets[0].class_counts().values()) == 5_309_253


@pytest.mark.parametrize('hidden', [False, True])
def test_raw_label_ids_of_cityscapes(tmp_path, hidden):
    """Under their own name, or under that of the trainIds."""
    cfg = camvid(tmp_path, 'cityscapes', 'CityscapesDataset', 19)
    for split in ('train', 'val'):
        for i in range(2):
            folder, labels = tmp_path / f'leftImg8bit/{split}/a', tmp_path / f'gtFine/{split}/a'
            folder.mkdir(parents=True, exist_ok=True)
            labels.mkdir(parents=True, exist_ok=True)
            noise().save(folder / f'{i}_leftImg8bit.png')
            ids(7, 26, 33).save(labels / f'{i}_gtFine_label{"TrainIds" if hidden else "Ids"}.png')
    result = full(cfg)
    assert found(result) >= {('cityscapes-raw-labels', str(path)) for path in (tmp_path / 'gtFine').rglob('*.png')}
    assert codes(result, 'error') == {'cityscapes-raw-labels'}
    with pytest.raises(UserError, match='convert_cityscapes'):
        check_data(cfg, ('train', 'val'))
    cfg.train_dataloader.dataset.seg_map_suffix = '_gtFine_labelIds.png'
    assert any('names raw label ids' in finding.message for _, finding in full(cfg).findings())


@pytest.mark.parametrize(
    ('values', 'reduce', 'classes', 'code'),
    [
        ((0, 1, 7, 255), True, 8, 'reduce-zero-on'),
        ((1, 2, 7), True, 8, 'reduce-zero-on'),
        (tuple(range(8)), True, 8, 'reduce-zero-on'),
        ((0, 1, 8), True, 8, None),
        ((0, 1, 7), True, 8, None),
        ((0, 1, 6, 255), True, 8, None),
        ((0, 1, 8), False, 8, 'reduce-zero-off'),
        ((0, 1, 7, 255), False, 8, None),
        ((0, 1, 9), False, 8, None),
        ((0, 3, 20), False, 150, 'reduce-zero-off'),
        ((1, 3, 20), False, 150, None),
    ],
)
def test_reduce_zero_label_that_contradicts_the_ids(data, values, reduce, classes, code):
    for path in data.glob('annotations/*/*'):
        ids(*values).save(path)
    metainfo = dict(metainfo=dict(classes=tuple(map(str, range(classes)))))
    cfg = seg_config(data, classes, reduce_zero_label=reduce, **metainfo)
    assert codes(full(cfg)) & {'reduce-zero-on', 'reduce-zero-off'} == ({code} if code else set())
    if code == 'reduce-zero-on':
        lines = check_data(cfg, ('train', 'val'))
        assert any(line.startswith('warning: ') and 'reduce_zero_label=True with 8 classes' in line for line in lines)
        ids(8).save(label(data, 0))  # one file of the same root is enough
        assert code not in codes(full(cfg))


@pytest.mark.parametrize(('zeros', 'reported'), [(9, True), (8, False)])
def test_zero_in_nine_of_ten_label_maps_of_ade20k_is_no_class(zeros, reported):
    counts = Counter({0: zeros, 3: 10})
    report = DatasetReport('', 'train', '', '', label_format=LabelFormat(150), map_counts=counts, maps_read=10)
    check_reduce_zero_label([report])
    assert [finding.code for finding in report.findings] == ['reduce-zero-off'] * reported


def test_class_frequencies_and_sizes(data, monkeypatch):
    noise(64, 80).save(image(data, 3))
    ids(1, 8, size=(64, 80)).save(label(data, 3))
    result = full(seg_config(data))
    maps = [np.asarray(Image.open(path)) for path in label(data, 0).parent.iterdir()]
    expected = {name: sum(int((m == i).sum()) for m in maps) for i, name in enumerate('abcdefgh', 1)}
    assert result.datasets[0].class_counts() == expected
    assert result.datasets[0].sizes == {(64, 64): 5, (80, 64): 1}
    noise().save(image(data, 3))
    for path in data.glob('annotations/*/*'):
        ids(1, 2, 8).save(path)
    for severity, folder, maps, (_, finding) in zip(
        ('warning', 'note'), ('training', 'validation'), (6, 3), full(seg_config(data)).findings(), strict=True
    ):
        absent = f'5 of 8 classes do not occur: c, d, e, f, g; ids in {maps} of {maps} label maps: 1, 2, 8'
        assert str(finding) == f'{data}/annotations/{folder}: {absent}' and finding.severity == severity
    monkeypatch.setattr(files, 'INSPECTED_FILES', 2)
    assert 'ids in 2 of 6 label maps' in str(next(audit(seg_config(data), jobs=1).findings())[1])
    for path in data.glob('annotations/*/*'):
        ids(1, 2, 3, 4, 5).save(path)
    assert not codes(audit(seg_config(data), jobs=1)), 'a sample may lack rare classes'


@pytest.mark.parametrize(
    ('values', 'reduce', 'classes', 'code', 'severity', 'advice'),
    [
        ((0, 255), False, 2, 'one-class', 'error', 'If 255 is a class'),
        ((0,), False, 2, 'one-class', 'error', 'another class'),
        ((0, 1), True, 2, 'one-class', 'error', 'reduce_zero_label=False'),
        ((255,), False, 2, 'nothing-labelled', 'error', 'If 255 is a class'),
        ((0, 255), True, 8, 'nothing-labelled', 'error', 'reduce_zero_label=False'),
        ((0, 1, 2), False, 8, 'class-absent', 'warning', 'name 3 classes: --classes'),
        ((0, 1, 3), True, 8, 'class-absent', 'warning', 'name 3 classes: --classes'),
    ],
)
def test_labels_that_leave_nothing_to_learn(data, values, reduce, classes, code, severity, advice):
    for path in data.glob('annotations/training/*'):
        ids(*values).save(path)
    cfg = seg_config(data, classes, reduce_zero_label=reduce, metainfo=dict(classes=tuple('abcdefgh'[:classes])))
    # Ids of the validation data are valid only for eight classes that start at 1.
    result = audit(cfg, jobs=1, splits=('train',))
    [finding] = [finding for _, finding in result.findings() if finding.code == code]
    assert finding.severity == severity and advice in finding.fix
    assert f'label maps: {", ".join(map(str, values))}' in finding.message
    if severity == 'error':
        with pytest.raises(InvalidDataError, match='classes do not occur'):
            check_data(cfg, ('train',))
    else:
        [line] = [line for line in check_data(cfg, ('train',)) if line.startswith('warning: ')]
        assert advice in line


@pytest.mark.parametrize(
    ('values', 'others', 'error'),
    [((0, 1), (0,), None), ((0, 1), (255,), None), ((1,), (0,), None), ((0,), (0, 255), 'one-class')],
)
def test_data_sets_that_are_joined_are_judged_together(data, values, others, error):
    """Photographs without any object, for example, are often a data set of their own."""
    write_pairs(data / 'others', 'train', 3)
    for path in data.rglob('annotations/*/*'):
        ids(*(others if 'others' in path.parts else values)).save(path)
    cfg = seg_config(data, 2, splits=('train',), reduce_zero_label=False)
    parts = [cfg.train_dataloader.dataset, {**cfg.train_dataloader.dataset, 'data_root': str(data / 'others')}]
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    assert codes(full(cfg), 'error') == ({error} if error else set())


def test_one_bit_label_maps_are_read_as_training_does(data):
    for path in data.glob('annotations/*/*'):
        Image.fromarray(np.eye(64, dtype=bool)).save(path)
    cfg = seg_config(data, 2, reduce_zero_label=False)
    assert (
        not codes(full(cfg))
        and LoadAnnotations()(dict(seg_map_path=str(label(data, 0)), reduce_zero_label=False, seg_fields=[]))[
            'gt_seg_map'
        ].max()
        == 1
    )


def test_one_class_to_score_is_a_warning_and_none_is_an_error(data):
    for values, severity in (((1,), 'warning'), ((0, 255), 'error')):
        for path in data.glob('annotations/validation/*'):
            ids(*values).save(path)
        cfg = seg_config(data)
        cfg.val_evaluator = dict(type='IoUMetric')
        assert codes(full(cfg), severity) & {'one-class', 'nothing-labelled'}
    cfg.val_evaluator = dict(type='IoUMetric', format_only=True)
    assert not codes(full(cfg), 'error'), 'nothing is scored'


def test_a_transform_of_the_user_may_map_ids(data):
    from mmengine.registry import TRANSFORMS

    TRANSFORMS.register_module('MapIds', module=type('MapIds', (), {'__module__': 'own'}), force=True)
    for path in data.glob('annotations/*/*'):
        ids(0, 255).save(path)
    pipeline = [dict(type='LoadAnnotations'), dict(type='MapIds')]
    cfg = seg_config(data, 2, reduce_zero_label=False, pipeline=pipeline)
    assert codes(full(cfg)) == {'one-class'} == codes(full(cfg), 'warning')


def test_more_label_maps_are_read_until_two_classes_occur(data, monkeypatch):
    monkeypatch.setattr(files, 'INSPECTED_FILES', 2)
    for path in data.glob('annotations/*/*'):
        ids(1, 255).save(path)
    assert codes(audit(seg_config(data), jobs=1), 'error') == {'one-class'}
    ids(2).save(label(data, 3))
    result = audit(seg_config(data), jobs=1)
    assert not codes(result, 'error') and result.datasets[0].inspected < 6


def test_too_few_names_for_the_ids(data):
    ids(0, 1, 6).save(label(data, 1))
    with pytest.raises(InvalidDataError) as error:
        check_data(seg_config(data, 2), ('train', 'val'))
    assert str(error.value).count('--classes') == 1, 'one advice for label maps with different ids'
    ids(0, 254).save(label(data, 0))
    with pytest.raises(InvalidDataError, match=r'expected: 1\.\.8'):
        check_data(seg_config(data, 8), ('train', 'val'))


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('how', ['same files', 'linked folder', 'list', 'copies'])
def test_training_images_in_validation_data(data, whole, how):
    cfg = seg_config(data)
    val = cfg.val_dataloader.dataset
    trained = [image(data, i) for i in range(6)]
    shared = {str(path) for path in trained}
    if how == 'same files':
        val.data_prefix = dict(cfg.train_dataloader.dataset.data_prefix)
    elif how == 'linked folder':
        for kind in ('images', 'annotations'):
            (data / kind / 'linked').symlink_to('training')
        val.data_prefix = dict(img_path='images/linked', seg_map_path='annotations/linked')
        shared = {path.replace('images/training', 'images/linked') for path in shared}
    elif how == 'list':
        (data / 'val.txt').write_text('\n'.join(path.stem for path in trained[1:4]))
        val.data_prefix, val.ann_file = dict(cfg.train_dataloader.dataset.data_prefix), 'val.txt'
        shared = {str(path) for path in trained[1:4]}
    else:
        shared = {str(shutil.copy(trained[0], image(data, 0, 'val').with_name(trained[0].name)))}
        shutil.copy(label(data, 0), label(data, 0, 'val').with_name(label(data, 0).name))
        shutil.copy(image(data, 2, 'val'), image(data, 2, 'val').with_name(trained[3].name))  # only the same name
        shutil.copy(label(data, 2), label(data, 2, 'val').with_name(label(data, 3).name))
    result = audit(cfg, full=whole, jobs=1)
    assert {path for code, path in found(result) if code == 'leak'} == shared
    assert 'leak' in codes(result, 'error')
    assert any(line.startswith('warning: val data: ') for line in check_data(cfg, ('train', 'val')))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tiff'])
def test_image_size_is_that_of_mmcv(tmp_path, orientation, suffix):
    import mmcv

    path = tmp_path / f'x.{suffix}'
    rotated(path, orientation, 48, 64)
    seen = inspect_sample(Sample(str(path)), LabelFormat())
    assert not seen.findings and seen.size[::-1] == mmcv.imread(path).shape[:2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(['jpeg', 'png', 'gif', 'tiff', 'webp', 'bmp']),
    at=st.floats(0, 1),
    junk=st.binary(max_size=40),
    keep=st.floats(0, 1),
)
def test_any_file_has_findings_or_pixels(tmp_path, kind, at, junk, keep):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (20, 30), np.uint8)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    place = int(at * len(content))
    content[place : place + len(junk)] = junk
    path = tmp_path / 'x.png'
    path.write_bytes(content[: int(keep * len(content)) + 1])
    seen = inspect_sample(Sample(str(path), str(path)), LabelFormat(8), hash_image=True)
    assert seen.findings or seen.size and seen.pixel_counts
    try:
        assert read_image(path).shape[-1] == 3
    except UserError as error:
        assert str(error).startswith(f'{path}: not a readable image')


@pytest.mark.parametrize('options', [{}, {'progressive': True}])
def test_truncated_jpeg_but_not_one_with_data_appended(tmp_path, options):
    """OpenCV reads the first as an image, its end grey; phones write the second."""
    path = tmp_path / 'x.jpg'
    noise(80, 80).save(path, **options)
    content = path.read_bytes()
    path.write_bytes(content + bytes(range(200)) * 100)
    check_image_file(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match='cut off'):
        check_image_file(path)
    with pytest.raises(UserError, match='not a readable image'):
        read_image(path)


@pytest.mark.parametrize('count', [0, 1, 2, 63, 64, 65, 1000])
def test_files_are_picked_evenly(count):
    spread = pick_evenly(range(count))
    assert len(spread) == min(64, count) and spread == sorted(set(spread))
    assert not count or (spread[0], spread[-1]) == (0, count - 1)
    steps = np.diff(spread)
    assert count < 2 or steps.max() - steps.min() <= 1
