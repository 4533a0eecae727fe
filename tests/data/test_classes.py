"""Class names from a command line, a file or the data, and set everywhere."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from class_cases import BOTH, OWN, at, coco_config, own, rejection  # noqa: F401 (a fixture)
from coco_files import change
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from tiny import tiny  # noqa: F401 (a fixture)

from replk_mm.data.class_heads import classes_per_head
from replk_mm.data.classes import CLASSES_FILE, parse_classes, set_classes, use_classes
from replk_mm.data.scenes.spec import DEMO_CLASSES
from replk_mm.engine.prepare import head_class_counts
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def test_names_from_a_command_line_or_a_file(tmp_path):
    assert parse_classes('a, traffic light ,b') == ['a', 'traffic light', 'b']
    assert parse_classes('person') == ['person']
    (tmp_path / 'names.txt').write_bytes('\ufeffa, b\n\n  c d  \r\n'.encode())  # as Windows' editors write it
    assert parse_classes(str(tmp_path / 'names.txt')) == ['a, b', 'c d']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('a,,b', 'empty'),
        ('a,b,a', "'a' occurs twice"),
        ('', 'empty'),
        ('names.txt', 'no such file'),
        ('no/such', 'no such file'),
    ],
)
def test_invalid_names(text, message):
    with pytest.raises(UserError, match=message) as info:
        parse_classes(text)
    assert str(info.value).startswith(f'--classes {text}: ')


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_bytes('M\u00fctze'.encode('latin-1'))
    with pytest.raises(UserError, match=f'--classes {path}: '):
        parse_classes(str(path))


@pytest.mark.parametrize(
    'name',
    [
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
        'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py',
        'htc/htc_r50_fpn_1x_coco.py',
    ],
)
def test_all_heads_pass_the_check_of_mmdet(name):
    """The hook of mmdet inspects the built network."""
    from mmdet.engine.hooks import NumClassCheckHook

    cfg = coco_config(name)
    set_classes(cfg, OWN)
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    data = SimpleNamespace(metainfo=dict(classes=OWN))
    NumClassCheckHook()._check_head(
        SimpleNamespace(model=model, train_dataloader=SimpleNamespace(dataset=data), logger=None), 'train'
    )
    assert set(head_class_counts(model).values()) == {3}
    if hasattr(model, 'rpn_head'):
        assert model.rpn_head.num_classes == 1, 'proposals have no classes'
    if 'htc_' in name:
        assert model.roi_head.semantic_head.num_classes == 183, 'not classes of the objects'


def test_parts_with_other_classes_keep_them():
    cfg = coco_config()
    set_classes(cfg, ['one'])
    cfg.model.rpn_head.num_classes = cfg.model.backbone.num_classes = 1  # as many as the data have
    set_classes(cfg, OWN)
    assert cfg.model.rpn_head.num_classes == cfg.model.backbone.num_classes == 1
    assert set(classes_per_head(cfg.model).values()) == {3}


def test_every_data_set_has_names_and_colours():
    cfg = coco_config('rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    inner = cfg.val_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[dict(inner), dict(inner)])
    )
    set_classes(cfg, OWN)
    parts = [*cfg.train_dataloader.dataset.dataset.datasets, cfg.val_dataloader.dataset, cfg.test_dataloader.dataset]
    from mmdet.datasets import CocoDataset

    light = dict(zip(CocoDataset.METAINFO['classes'], CocoDataset.METAINFO['palette'], strict=True))['traffic light']
    for part in parts:
        assert tuple(part.metainfo.classes) == OWN
        assert len({tuple(colour) for colour in part.metainfo.palette}) == 3
        assert all(0 <= v <= 255 for colour in part.metainfo.palette for v in colour)
        assert tuple(part.metainfo.palette[2]) == light, 'a known class keeps its colour'


def segmentation(root: Path, kind: str, **options) -> Config:
    leaf = dict(
        type=kind,
        data_root=str(root),
        pipeline=[dict(type='LoadAnnotations')],
        **options,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    )
    head = dict(
        type='FCNHead',
        num_classes=150,
        out_channels=150,
        loss_decode=[dict(type='CrossEntropyLoss', class_weight=[1.0] * 150)],
    )
    return Config(
        dict(
            default_scope='mmseg',
            model=dict(decode_head=head, auxiliary_head=[dict(head), dict(head)]),
            train_dataloader=dict(dataset=leaf),
        )
    )


def labels_read(cfg: Config, pixels: np.ndarray, path: Path) -> list[int]:
    """Label ids as mmseg reads them."""
    Image.fromarray(pixels).save(path)
    init_default_scope('mmseg')
    data = DATASETS.build({**cfg.train_dataloader.dataset, 'lazy_init': True})
    out = data.pipeline(
        dict(seg_map_path=str(path), seg_fields=[], label_map=data.label_map, reduce_zero_label=data.reduce_zero_label)
    )
    return out['gt_seg_map'].ravel().tolist()


def test_segmentation_data_with_other_classes(tmp_path):
    cfg = segmentation(tmp_path, 'ADE20KDataset')
    notes = set_classes(cfg, OWN)
    assert classes_per_head(cfg.model) == {
        'model.decode_head': 3,
        'model.auxiliary_head.0': 3,
        'model.auxiliary_head.1': 3,
    }
    assert 'out_channels' not in cfg.model.decode_head and 'class_weight' not in cfg.model.decode_head.loss_decode[0]
    assert any('class_weight' in note for note in notes)
    assert any('label ids 1..3 are these, 0 is ignored' in note for note in notes)
    assert labels_read(cfg, np.array([[0, 1, 2, 3]], np.uint8), tmp_path / 'x.png') == [255, 0, 1, 2]


def test_segmentation_data_with_a_subset_of_the_classes(tmp_path):
    cfg = segmentation(tmp_path, 'ADE20KDataset')
    notes = set_classes(cfg, ('sky', 'wall'))
    assert any('ids in the files are those of the 150 classes of ADE20KDataset' in note for note in notes)
    assert labels_read(cfg, np.array([[0, 1, 2, 3]], np.uint8), tmp_path / 'x.png') == [255, 1, 255, 0]


def test_suffixes_are_kept(tmp_path):
    cfg = segmentation(tmp_path, 'CityscapesDataset')
    set_classes(cfg, OWN)
    data = cfg.train_dataloader.dataset
    assert (data.type, data.img_suffix, data.seg_map_suffix, data.reduce_zero_label) == (
        'mmseg.BaseSegDataset',
        '_leftImg8bit.png',
        '_gtFine_labelTrainIds.png',
        False,
    )


def test_auto_keeps_the_order_of_the_file(own):
    change(own / 'annotations/instances_train2017.json', lambda d: d['categories'].reverse())
    cfg = at(own)
    notes = use_classes(cfg, 'auto', ('val',))
    assert tuple(cfg.test_dataloader.dataset.metainfo.classes) == OWN[::-1]
    assert str(own / 'annotations/instances_train2017.json') in notes[0]
    cfg = at(own)
    cfg.pop('train_dataloader')
    use_classes(cfg, 'auto', ('test',))
    assert tuple(cfg.test_dataloader.dataset.metainfo.classes) == OWN


def test_auto_for_label_maps(tiny, tmp_path):
    cfg = segmentation(tiny.data, 'BaseSegDataset')
    use_classes(cfg, 'auto', ('train',))
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == DEMO_CLASSES
    cfg = segmentation(tmp_path, 'BaseSegDataset')
    with pytest.raises(UserError, match='no file names the classes') as info:
        use_classes(cfg, 'auto', ('train',))
    assert str(tmp_path / CLASSES_FILE) in str(info.value)
    (tmp_path / CLASSES_FILE).write_text('a\nb\n')
    use_classes(cfg, 'auto', ('train',))
    assert classes_per_head(cfg.model)['model.decode_head'] == 2


def test_auto_without_categories(own):
    for file in (own / 'annotations').iterdir():
        change(file, lambda d: d.update(categories=[], annotations=[]))
    with pytest.raises(UserError, match=r'--classes auto: no file names the classes; tried .*instances_train2017.json'):
        use_classes(at(own), 'auto', BOTH)
