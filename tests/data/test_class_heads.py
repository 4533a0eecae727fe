"""Heads of mmseg and mmdet configs get the number of classes where they predict them; the built network agrees."""

import contextlib
import copy
from pathlib import Path

import mmdet
import mmseg
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope

from replk_mm.data.checks.classes import check_heads
from replk_mm.data.class_heads import classes_per_head, reject_stuff
from replk_mm.data.classes import set_classes, use_classes
from replk_mm.engine.prepare import head_class_counts
from replk_mm.errors import UserError

OWN = ('helmet', 'vest', 'traffic light')
M2F = 'mask2former/mask2former_r50_8xb2'


def config(package, name: str) -> Config:
    cfg = Config.fromfile(str(Path(package.__file__).parent / '.mim' / 'configs' / name))
    cfg.model.backbone.init_cfg = None
    return cfg


def built(cfg: Config):
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def test_proposals_of_an_rpn_alone_are_no_classes():
    cfg = config(mmdet, 'rpn/rpn_r50_fpn_1x_coco.py')
    check_heads(cfg, head_class_counts(built(cfg)), ('train', 'val'))


def test_boundary_head_keeps_its_two_classes():
    """The last auxiliary head of STDC predicts boundaries."""
    cfg = config(mmseg, 'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py')
    cfg.model.backbone.backbone_cfg.pop('init_cfg', None)
    check_heads(cfg, classes_per_head(cfg.model), ('train',))
    set_classes(cfg, OWN)
    assert [head.num_classes for head in cfg.model.auxiliary_head] == [3, 3, 2]
    assert cfg.model.decode_head.num_classes == 3
    model = built(cfg)
    assert [head.num_classes for head in model.auxiliary_head] == [3, 3, 2]
    check_heads(cfg, head_class_counts(model), ('train',))
    cfg.model.auxiliary_head[0].num_classes = 5
    with pytest.raises(UserError, match=r'auxiliary_head.0.num_classes=5'):
        check_heads(cfg, classes_per_head(cfg.model))


@pytest.mark.parametrize(('ignore_index', 'rejected'), [(0, True), (1, True), (255, False)])
def test_a_head_that_ignores_one_of_two_classes(ignore_index, rejected):
    cfg = config(mmseg, 'fcn/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py')
    set_classes(cfg, ('background', 'person'))
    cfg.model.auxiliary_head.ignore_index = ignore_index
    if rejected:
        with pytest.raises(UserError, match='ignores one of two classes'):
            check_heads(cfg, classes_per_head(cfg.model), ('train',))
    else:
        check_heads(cfg, classes_per_head(cfg.model), ('train',))


def test_panoptic_data_have_more_classes_than_the_box_heads():
    cfg = config(mmdet, 'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py')
    check_heads(cfg, classes_per_head(cfg.model), ('train', 'val'))
    with pytest.raises(UserError, match=r'model\.\w+ predicts things and stuff'):
        use_classes(cfg, 'a,b', ('train',))
    plain = config(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    reject_stuff(plain.model)
    plain.model.roi_head.bbox_head.num_classes = plain.model.roi_head.mask_head.num_classes = 5
    with pytest.raises(UserError, match='has 80 classes'):
        check_heads(plain, classes_per_head(plain.model), ('train',))


def test_head_without_classes_gets_none():
    cfg = config(mmdet, 'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py')
    set_classes(cfg, OWN)
    assert 'num_classes' not in cfg.model.mask_head
    assert built(cfg).bbox_head.num_classes == 3


def test_mask2former_of_mmdet_for_instances():
    cfg = config(mmdet, f'{M2F}-lsj-50e_coco.py')
    set_classes(cfg, OWN)
    head = built(copy.deepcopy(cfg)).panoptic_head
    assert head.num_classes == cfg.model.panoptic_fusion_head.num_things_classes == 3
    assert head.class_weight == [1.0] * 3 + [0.1]


def test_mask2former_of_mmseg_keeps_the_weight_of_no_object():
    cfg = config(mmseg, f'{M2F}-160k_ade20k-512x512.py')
    for names in (OWN, OWN[:2], OWN[:2]):  # the last time the number does not change
        set_classes(cfg, names)
        head = built(copy.deepcopy(cfg)).decode_head
        assert head.cls_embed.out_features == len(names) + 1
        assert head.class_weight == [1.0] * len(names) + [0.1]


@pytest.mark.parametrize(
    ('changes', 'setting'),
    [
        (dict(num_classes=1), 'model.decode_head.num_classes=1'),
        (dict(num_classes=1, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)), 'num_classes=1'),
        (dict(num_classes=2, out_channels=1, loss_decode=[dict(type='CrossEntropyLoss', use_sigmoid=True)]), None),
        (dict(num_classes=2), None),
        (dict(num_classes=1, loss_cls=dict(type='mmdet.CrossEntropyLoss')), None),  # MaskFormer has "no object"
    ],
)
def test_heads_with_nothing_to_distinguish(changes, setting):
    names = dict(classes=tuple('ab')[: changes['num_classes']])
    data = dict(dataset=dict(type='BaseSegDataset', metainfo=names))
    model = dict(decode_head=dict(type='FCNHead', **changes))
    cfg = Config(dict(default_scope='mmseg', model=model, train_dataloader=data), cfg_text=' ', filename='own.py')
    with pytest.raises(UserError, match=setting) if setting else contextlib.nullcontext():
        check_heads(cfg, classes_per_head(cfg.model), ('train',))


def test_one_of_the_classes_of_a_type():
    cfg = config(mmseg, 'pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py')
    use_classes(cfg, 'wall', ('train',))
    with pytest.raises(UserError, match=r'model\.decode_head\.num_classes=1') as info:
        check_heads(cfg, classes_per_head(cfg.model), ('train',))
    assert '--classes background,NAME' in str(info.value)
    cfg = config(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    use_classes(cfg, 'person', ('train',))
    check_heads(cfg, classes_per_head(cfg.model), ('train',))  # boxes have a background


@pytest.mark.parametrize(
    ('weights', 'expected', 'noted'),
    [
        ([2.0] * 80 + [0.5], [2.0] * 3 + [0.5], ''),
        ([1.0] + [2.0] * 79 + [0.5], [1.0] * 3 + [0.5], 'set to 1'),
        ([2.0] * 80, None, 'removed'),
        ([2.0] * 7, None, 'removed'),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ''),
        ([1.0, 2.0, 3.0, 0.5], [1.0, 2.0, 3.0, 0.5], ''),
    ],
)
def test_class_weights(weights, expected, noted):
    cfg = config(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    loss = cfg.model.roi_head.bbox_head.loss_cls = ConfigDict(type='CrossEntropyLoss', class_weight=weights)
    notes = set_classes(cfg, OWN)
    assert loss.get('class_weight') == expected
    assert any('class_weight' in note and noted in note for note in notes) if noted else not notes
    assert built(cfg).roi_head.bbox_head.loss_cls.class_weight == expected
