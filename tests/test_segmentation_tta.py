"""Views merged in bands against mmseg's SegTTAModel around mmseg's segmentor with the same weights, in float64."""
import copy
import os
import subprocess
import sys

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel as MMSegSegTTAModel
from mmseg.structures import SegDataSample
from test_ops_upsampled import LargestTensor, one_thread  # noqa: F401 (a fixture)
from test_segmentation import CLASSES, SLIDE, build, config, loss, pair
from torch import nn

from replk_mm.models.segmentation import SegTTAModel
from replk_mm.ops import upsampled

VIEWS = [((64, 96), None), ((64, 96), 'horizontal'), ((80, 112), None), ((80, 112), 'vertical'), ((41, 57), 'horizontal')]


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def views(images: int, ori_shape=(50, 77), sizes=VIEWS) -> dict:
    """What the loader gives: lists of views of lists of images."""
    generator, inputs, samples = torch.Generator().manual_seed(0), [], []
    for size, flip in sizes:
        inputs.append([255 * torch.rand(3, *size, generator=generator) for _ in range(images)])
        samples.append([SegDataSample(
            metainfo=dict(img_path=f'{i}.png', img_shape=size, ori_shape=ori_shape, flip=bool(flip), flip_direction=flip),
            gt_sem_seg=PixelData(data=torch.full((1, *ori_shape), i))) for i in range(images)])
    return dict(inputs=inputs, data_samples=samples)


def in_double(model: nn.Module) -> nn.Module:
    """The preprocessor gives float32."""
    model.eval().double().data_preprocessor.float()
    extract_feat = model.extract_feat
    model.extract_feat = lambda x: extract_feat(x.double())
    return model


def merged(kind: type, model: nn.Module, data: dict) -> list[SegDataSample]:
    with torch.no_grad():
        return kind(module=model).test_step(copy.deepcopy(data))


@pytest.mark.filterwarnings('ignore:The shape of value will convert')
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_labels_are_mmsegs(mode, align_corners):
    cfg = dict(head=dict(align_corners=align_corners), **(dict(test_cfg=SLIDE) if mode == 'slide' else {}))
    theirs, ours = (in_double(model) for model in pair(**cfg))
    kept = build(config('replk_mm.', keep_logits=True, **cfg))
    kept.load_state_dict(theirs.state_dict())
    data = views(2)
    expected = merged(MMSegSegTTAModel, theirs, data)
    for model in (ours, theirs, in_double(kept)):  # in bands, and the ways of other segmentors
        for i, (a, b) in enumerate(zip(expected, merged(SegTTAModel, model, data), strict=True)):
            assert torch.equal(b.pred_sem_seg.data, a.pred_sem_seg.data)
            assert b.pred_sem_seg.data.dtype == a.pred_sem_seg.data.dtype and len(b.pred_sem_seg.data.unique()) > 1
            assert b.img_path == a.img_path == f'{i}.png' and b.ori_shape == (50, 77) and (b.gt_sem_seg.data == i).all()
            assert 'seg_logits' not in b
    assert not torch.equal(expected[0].pred_sem_seg.data, expected[1].pred_sem_seg.data)
    first, = merged(SegTTAModel, ours, views(1, sizes=VIEWS[:1]))
    assert not torch.equal(first.pred_sem_seg.data, expected[0].pred_sem_seg.data)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_mmsegs_model_finds_the_logits_of_ours(mode):
    found = [merged(MMSegSegTTAModel, in_double(model), views(1))[0].pred_sem_seg.data
             for model in pair(**(dict(test_cfg=SLIDE) if mode == 'slide' else {}))]
    assert torch.equal(*found)


@pytest.mark.parametrize('threshold', [0.3, 0.6])
def test_one_channel_is_the_mean_probability(threshold):
    head = dict(num_classes=2, out_channels=1, threshold=threshold, loss_decode=loss(use_sigmoid=True))
    theirs, ours = (in_double(model) for model in pair(head=head, auxiliary=head))
    data = views(2)
    found = merged(SegTTAModel, ours, data)
    for i in range(2):
        total = 0
        for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True):
            view = dict(inputs=[inputs[i]], data_samples=[copy.deepcopy(samples[i])])
            with torch.no_grad():
                total = total + theirs.test_step(view)[0].seg_logits.data
        assert torch.equal(found[i].pred_sem_seg.data, (total / len(VIEWS) > threshold).to(total))
        assert len(found[i].pred_sem_seg.data.unique()) == 2


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_no_view_is_held_at_the_size_of_the_photograph(mode, monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2 ** 16)
    theirs, ours = pair(**(dict(test_cfg=SLIDE) if mode == 'slide' else {}))
    data, largest = views(1, (300, 400)), {}
    for kind, model in ((MMSegSegTTAModel, theirs), (SegTTAModel, ours)):
        wrapped, given = kind(module=model.float().eval()), copy.deepcopy(data)
        with LargestTensor() as found, torch.no_grad():
            wrapped.test_step(given)
        largest[kind] = found.numel
    assert largest[MMSegSegTTAModel] >= CLASSES * 300 * 400 and largest[SegTTAModel] <= 300 * 400


def test_the_class_is_found_by_its_name(root):
    program = '''
import sys
from mmengine.registry import MODELS
import replk_mm.registry
assert not [name for name in sys.modules if name.split('.')[0] in ('mmseg', 'mmdet')]
import torch
with torch.device('meta'):  # as where a model is built for its structure only
    assert MODELS.get('replk_mm.SegTTAModel').__module__ == 'replk_mm.models.segmentation'
from replk_mm.ops.class_map import LogitRows, Windows, class_map
assert class_map([LogitRows(lambda _: [torch.rand(3, 4, 4)], Windows.whole(16), Windows.whole(16))]).shape == (16, 16)
'''
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
