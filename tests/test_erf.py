"""Effective receptive fields, against closed forms, finite differences and a count by hand."""
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import randomize_norms
from erf_cases import THREE_TIMES_THREE, TINY, _without_pictures, config, drawn, paint, white  # noqa: F401
from mmengine.registry import MODELS
from tiny import tiny  # noqa: F401

from replk_mm.analysis import erf_report
from replk_mm.analysis.erf import areas, contributions, measure_erf, paper_scale
from replk_mm.analysis.plain import default_layout
from replk_mm.engine.config import build_model
from replk_mm.models.convnext import ConvNeXt
from replk_mm.models.replknet import RepLKNet
from replk_mm.reparam import reparameterize

# ruff: noqa: F811 (fixtures that come from another file)


def test_closed_form_of_ones(tmp_path, white):
    found = measure_erf(config(type='test_erf_ones'), None, white, 33, 5, tmp_path / 'out')
    expected = np.zeros((33, 33))
    expected[13:20, 13:20] = 3 * np.outer(THREE_TIMES_THREE, THREE_TIMES_THREE)  # three channels of the image
    assert np.abs(found.scores - expected).max() < 1e-6
    # Along an axis the middle 1, 3, 5, 7 pixels hold 7, 19, 25, 27 of 27; squared: 0.067, 0.495, 0.857, 1.
    assert [area['side'] for area in areas(found.scores).values()] == [3, 3, 5, 7]
    assert areas(found.scores)['0.5']['ratio'] == pytest.approx((5 / 33)**2)
    assert found.offset == pytest.approx((0, 0))
    assert (found.stage, found.map_size, found.channels, found.stride, found.silent) == (2, (33, 33), 1, 1, 0)


@pytest.mark.parametrize('size', [32, 33])
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_closed_form_of_strided_ones(tmp_path, white, size, stage):
    """The receptive field of position p is that of stride * p, each layer's step widened by the strides before it."""
    strides = (2, 1, 2)
    found = measure_erf(config(type='test_erf_ones', strides=strides), None, white, size, 1, tmp_path / 'out',
                        stage=stage)
    axis, step, side = np.ones(1), 1, size
    for stride in strides[:stage + 1]:
        taps = np.zeros(2 * step + 1)
        taps[::step] = 1
        axis = np.convolve(axis, taps)
        step *= stride
        side = (side - 1) // stride + 1
    centre = step * (side // 2)
    expected = np.zeros(size)
    expected[centre - len(axis) // 2:centre + len(axis) // 2 + 1] = axis
    assert np.abs(found.scores - 3 * np.outer(expected, expected)).max() < 1e-6
    assert found.map_size == (side, side)
    assert found.offset == pytest.approx((centre - size // 2,) * 2)


def test_negative_parts_are_dropped_channel_by_channel(tmp_path, white):
    """ReLU on the centre of every channel of the map, and on the gradient of every channel of the image."""
    weight = torch.randn(4, 3, 5, 5)
    net = config(type='test_erf_given', call=lambda x: torch.nn.functional.conv2d(x, weight, padding=2))
    found = measure_erf(net, None, white, 15, 1, tmp_path / 'out')
    pixel = (255 - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
    kernels = weight.numpy().astype(float)
    alive = (kernels.sum((2, 3)) * pixel).sum(1) > 0
    assert alive.any() and not alive.all()
    expected = np.maximum(kernels[alive].sum(0), 0).sum(0)
    assert np.abs(found.scores[5:10, 5:10] - expected).max() < 1e-6


def test_average_over_images_some_of_which_contribute_nothing(tmp_path):
    folder = paint(tmp_path / 'images', 255, 0, 0)  # black is below ImageNet's mean: ReLU lets nothing through
    found = measure_erf(config(type='test_erf_ones'), None, folder, 33, 50, tmp_path / 'out')
    assert (found.images, found.silent) == (3, 2)
    assert found.scores[16, 16] == pytest.approx(3 * 49 / 3)
    assert any('2 of 3 images contribute nothing' in note for note in found.notes())


def test_no_contribution_at_all_has_no_areas(tmp_path, drawn):
    found = measure_erf(config(type='test_erf_ones'), None, paint(tmp_path / 'black', 0), 33, 50, tmp_path / 'out')
    nothing = dict.fromkeys(('0.2', '0.3', '0.5', '0.99'), dict(side=None, ratio=None))
    assert found.values()['areas'] == found.values()['areas_of_scores'] == nothing
    assert found.offset is None and any('there are no areas' in note for note in found.notes())
    assert 'none' in erf_report.tables([found])
    assert (tmp_path / 'out' / 'erf.png').is_file()


def backbones() -> dict[str, nn.Module]:
    return {'RepLKNet': randomize_norms(RepLKNet(TINY)),
            'ConvNeXt': ConvNeXt(dict(depths=[1, 1, 2, 1], channels=[8, 16, 32, 64]), layer_scale_init_value=1.,
                                 gap_before_final_norm=False, out_indices=(0, 1, 2, 3))}


@pytest.mark.parametrize('name', ['RepLKNet', 'ConvNeXt'])
def test_scores_by_finite_differences(name):
    net = backbones()[name].double().eval()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    scores, stage, shape = contributions(net, image)
    assert (stage, shape) == (3, (1, 64, 2, 2))

    @torch.no_grad()
    def centre(x):
        return net(x)[-1][0, :, 1, 1].clamp(min=0).sum().item()

    step = 1e-5
    for row, column in [(32, 32), (40, 47), (20, 33), (63, 63), (5, 60)]:
        expected = 0.
        for channel in range(3):
            moved = [image.clone() for _ in range(2)]
            for sign, x in zip((1, -1), moved, strict=True):
                x[0, channel, row, column] += sign * step
            expected += max(0., (centre(moved[0]) - centre(moved[1])) / (2 * step))
        assert scores[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize('name', ['RepLKNet', 'ConvNeXt'])
def test_our_operators_give_the_scores_of_torchs_own(name):
    net = backbones()[name].eval()
    image = torch.randn(1, 3, 64, 64)
    reference = contributions(default_layout(copy.deepcopy(net)).double(), image.double())[0]
    scores = contributions(net.requires_grad_(False), image)[0]
    assert scores.dtype == torch.float64
    assert (scores - reference).abs().max() < 1e-5 * reference.max()


@pytest.mark.parametrize('cfg', [
    dict(type='mmseg.ResNetV1c', depth=18, base_channels=8, stem_channels=8, with_cp=True),
    dict(type='mmseg.SwinTransformer', embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=2),
    dict(type='mmdet.ResNet', depth=18, base_channels=8, frozen_stages=1),
])
def test_backbones_of_other_packages(cfg, tmp_path, white):
    found = measure_erf(config(**cfg), None, white, 64, 1, tmp_path / 'out', randomize=True)
    net = MODELS.build({**cfg, **({'with_cp': False} if 'with_cp' in cfg else {})})
    net.eval()
    assert (found.stage, found.map_size, found.stride) == (3, (2, 2), 32)
    assert 0 < found.scores.sum() < np.inf and found.values()['areas']['0.5']['side'] > 1
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    expected = torch.autograd.grad(net(image)[1][0, :, 4, 4].clamp(min=0).sum(), image)[0].clamp(min=0)[0].sum(0)
    again = MODELS.build(cfg)
    again.eval()
    again.load_state_dict(net.state_dict())
    assert torch.allclose(contributions(again, image, 1)[0].float(), expected)


@pytest.mark.parametrize('cfg', [
    dict(type='mmseg.BiSeNetV1', backbone_cfg=dict(type='mmseg.ResNet', depth=18,
                                                   init_cfg=dict(type='Pretrained', checkpoint='gone'))),
    dict(type='mmdet.PyramidVisionTransformer', embed_dims=8, num_layers=[1, 1, 1, 1],
         init_cfg=dict(checkpoint='gone')),
])
def test_files_that_a_config_starts_from_are_not_read(cfg, tmp_path, white):
    found = measure_erf(config(**cfg), None, white, 64, 1, tmp_path / 'out')
    assert not found.trained and found.checkpoint is None and not found.silent


def test_random_weights_are_those_of_the_seed(tmp_path, white):
    net = config(type='replk_mm.RepLKNet', arch=TINY, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth'))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other, drawn = (measure_erf(net, None, white, 64, 1, tmp_path / 'out', **how) for how in (
        dict(seed=1), dict(seed=1), dict(seed=2), dict(seed=1, randomize=True)))
    assert (torch.rand(1) == expected).all(), 'the random numbers of the caller are not touched'
    assert (first.scores == second.scores).all()
    assert all(np.abs(first.scores - x.scores).max() > 1e-3 * first.scores.max() for x in (other, drawn))
    assert not first.trained and 'seed 1' in first.weights and 'UNTRAINED' in first.notes()[0]
    assert net.model.init_cfg.checkpoint == 'nowhere.pth', 'the config stays as it is'


@pytest.fixture
def whole(tiny):  # noqa: F811
    """A segmentor whose norms have statistics, and its config."""
    cfg = tiny.cfg()
    return randomize_norms(build_model(copy.deepcopy(cfg))), cfg


def test_weights_of_a_checkpoint(whole, tmp_path):
    model, cfg = whole
    photo = paint(tmp_path / 'images', (200, 30, 90))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(iter=7)), tmp_path / 'model.pth')
    torch.save(model.backbone.state_dict(), tmp_path / 'backbone.pth')
    torch.save(dict(state_dict=reparameterize(model.eval())[0].state_dict(),
                    meta=dict(replk_mm=dict(reparameterized=dict(merge=True, fold=True)))), tmp_path / 'merged.pth')
    found = measure_erf(cfg, str(tmp_path / 'model.pth'), photo, 64, 1, tmp_path / 'out')
    # RGB as the config's preprocessor has it; the picture is of one colour, so that resizing leaves it.
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    image = (torch.tensor([200, 30, 90.]) - mean) / std
    expected = contributions(model.eval().backbone, image.view(1, 3, 1, 1).expand(1, 3, 64, 64))[0].numpy()
    assert np.abs(found.scores - expected).max() < 1e-6 * expected.max()
    assert found.trained and found.weights.endswith('model.pth, iteration 7') and found.notes() == []
    assert found.values() == dict(areas=areas(paper_scale(expected)), areas_of_scores=areas(expected), size=64,
                                  images=1, trained=True, weights=found.weights)
    assert found.protocol() == dict(size=64, images=1, image_set=found.image_set, stage=3, trained=True)
    same = measure_erf(cfg, None, photo, 64, 1, tmp_path / 'out', pretrained=str(tmp_path / 'backbone.pth'))
    assert same.trained and (same.scores == found.scores).all()
    merged = measure_erf(cfg, str(tmp_path / 'merged.pth'), photo, 64, 1, tmp_path / 'out')
    assert np.abs(merged.scores - expected).max() < 1e-4 * expected.max()
