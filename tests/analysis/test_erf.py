"""Effective receptive fields against closed forms, finite differences and areas by brute force; files and command."""

import copy
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS
from norms import randomize_norms
from PIL import Image
from tiny import ROOT, tiny  # noqa: F401 (a fixture)

from replk_mm.analysis import erf_report
from replk_mm.analysis.erf import KIND, Erf, measure_erf, read_image
from replk_mm.analysis.receptive_field import areas, contributions, paper_scale
from replk_mm.backbones.convnext import ConvNeXt
from replk_mm.backbones.replknet import RepLKNet
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.config import build_model
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
TINY = dict(layers=[1, 1, 1, 1], channels=[8, 16, 32, 64], large_kernel_sizes=[7, 7, 7, 7], small_kernel=3, dw_ratio=1)
#: 1 + x + x^2, cubed: how often each pixel is counted along an axis by three convolutions of 3 ones.
THREE_TIMES_THREE = np.array([1, 3, 6, 7, 6, 3, 1])


@MODELS.register_module(name='test_erf_ones')
class Ones(nn.Module):
    """3x3 convolutions whose weights are all one."""

    def __init__(self, strides=(1, 1, 1), model_name=''):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(1 if i else 3, 1, 3, stride, 1, bias=False) for i, stride in enumerate(strides)
        )
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return tuple(outputs)


@MODELS.register_module(name='test_erf_function')
class FromFunction(nn.Module):
    """Runs a function of the image."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch, request):
    """Skip drawing, which takes longer than measuring."""
    if 'drawn' not in request.fixturenames:
        monkeypatch.setattr('replk_mm.commands.erf.draw_heat_maps', lambda found, path: None)


@pytest.fixture
def drawn():
    """For tests that look at pictures."""


def config(**model) -> Config:
    return Config(dict(model=model), cfg_text='given', filename='given.py')


def paint(folder: Path, *colors) -> Path:
    """A folder with an image of each color (one number or three), of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, color in enumerate(colors):
        shape = 20 + 7 * i, 31, 3
        Image.fromarray(np.broadcast_to(np.uint8(color), shape).copy()).save(folder / f'{i}.png')
    return folder


@pytest.fixture
def white(tmp_path) -> Path:
    return paint(tmp_path / 'white', 255)


def result(**changes) -> Erf:
    known = dict(
        scores=np.eye(8),
        backbone='A',
        config='a',
        weights='w',
        trained=True,
        checkpoint=None,
        stage=3,
        channels=4,
        map_size=(2, 2),
        size=8,
        images=1,
        image_set='0' * 64,
        silent=0,
        preprocessing={},
        environment={},
    )
    return Erf(**{**known, **changes})


# -- scores -----------------------------------------------------------------------------------------------------------
def test_closed_form_of_ones(tmp_path, white):
    found = measure_erf(config(type='test_erf_ones'), None, white, 33, 5, tmp_path / 'out')
    expected = np.zeros((33, 33))
    expected[13:20, 13:20] = 3 * np.outer(THREE_TIMES_THREE, THREE_TIMES_THREE)  # three channels of the image
    assert np.abs(found.scores - expected).max() < 1e-6
    # Along an axis the middle 1, 3, 5, 7 pixels hold 7, 19, 25, 27 of 27; squared: 0.067, 0.495, 0.857, 1.
    assert [area['side'] for area in areas(found.scores).values()] == [3, 3, 5, 7]
    assert areas(found.scores)['0.5']['ratio'] == pytest.approx((5 / 33) ** 2)
    assert found.offset == pytest.approx((0, 0))
    assert (found.stage, found.map_size, found.channels, found.stride, found.silent) == (2, (33, 33), 1, 1, 0)


@pytest.mark.parametrize('size', [32, 33])
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_closed_form_of_strided_ones(tmp_path, white, size, stage):
    """Position p is centered at stride * p; the step of a layer is the product of the strides before it."""
    strides = (2, 1, 2)
    found = measure_erf(
        config(type='test_erf_ones', strides=strides), None, white, size, 1, tmp_path / 'out', stage=stage
    )
    axis, step, side = np.ones(1), 1, size
    for stride in strides[: stage + 1]:
        taps = np.zeros(2 * step + 1)
        taps[::step] = 1
        axis = np.convolve(axis, taps)
        step *= stride
        side = (side - 1) // stride + 1
    center = step * (side // 2)
    expected = np.zeros(size)
    expected[center - len(axis) // 2 : center + len(axis) // 2 + 1] = axis
    assert np.abs(found.scores - 3 * np.outer(expected, expected)).max() < 1e-6
    assert found.map_size == (side, side)
    assert found.offset == pytest.approx((center - size // 2,) * 2)


def test_negative_parts_are_dropped_channel_by_channel(tmp_path, white):
    """ReLU on the center of every channel of the map, and on the gradient of every channel of the image."""
    weight = torch.randn(4, 3, 5, 5)
    net = config(type='test_erf_function', call=lambda x: torch.nn.functional.conv2d(x, weight, padding=2))
    found = measure_erf(net, None, white, 15, 1, tmp_path / 'out')
    pixel = (255 - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
    kernels = weight.numpy().astype(float)
    alive = (kernels.sum((2, 3)) * pixel).sum(1) > 0
    assert alive.any() and not alive.all()
    expected = np.maximum(kernels[alive].sum(0), 0).sum(0)
    assert np.abs(found.scores[5:10, 5:10] - expected).max() < 1e-6


@pytest.mark.parametrize('size', [13, 61])
@pytest.mark.parametrize('rgb', [True, False])
def test_images_are_resized_by_bicubic_interpolation(tmp_path, size, rgb):
    """torch's bicubic interpolation with antialiasing has Pillow's weights; Pillow also rounds between the axes."""
    pixels = np.random.default_rng(0).integers(80, 176, (29, 41, 3), dtype=np.uint8)  # overshoots stay in 0..255
    Image.fromarray(pixels).save(tmp_path / 'noise.png')
    mean, std = (10.0, 20.0, 30.0), (2.0, 3.0, 4.0)
    found = read_image(tmp_path / 'noise.png', size, mean, std, rgb)
    assert found.shape == (1, 3, size, size)
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    source = source if rgb else source.flip(1)

    def error(mode: str) -> float:
        expected = torch.nn.functional.interpolate(source, (size, size), mode=mode, antialias=True)
        return (
            (found * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1) - expected).abs().max().item()
        )

    assert error('bicubic') < 1.1 and error('bilinear') > 5


def test_side_and_stride_of_a_map_are_along_its_height(tmp_path, white):
    net = config(type='test_erf_function', call=lambda x: x[:, :2, ::2, ::4])
    found = measure_erf(net, None, white, 32, 1, tmp_path / 'out')
    assert (found.channels, found.map_size, found.stride) == (2, (16, 8), 2)
    assert np.flatnonzero(found.scores).tolist() == [32 * (2 * 8) + 4 * 4]


def test_average_includes_images_without_contribution(tmp_path):
    folder = paint(tmp_path / 'images', 255, 0, 0)  # black is below ImageNet's mean: ReLU lets nothing through
    found = measure_erf(config(type='test_erf_ones', model_name='a'), None, folder, 33, 50, tmp_path / 'out')
    assert found.backbone == 'test_erf_ones a'  # as of networks of timm
    assert (found.images, found.silent) == (3, 2)
    assert found.scores[16, 16] == pytest.approx(3 * 49 / 3)
    assert any('2 of 3 images' in note for note in found.notes())


def test_no_contribution_at_all_has_no_areas(tmp_path):
    found = measure_erf(config(type='test_erf_ones'), None, paint(tmp_path / 'black', 0), 33, 50, tmp_path / 'out')
    nothing = dict.fromkeys(('0.2', '0.3', '0.5', '0.99'), dict(side=None, ratio=None))
    assert found.values()['areas'] == found.values()['areas_of_scores'] == nothing
    assert found.offset is None and found.notes()
    assert 'none' in erf_report.format_tables([found])


def backbones() -> dict[str, nn.Module]:
    return {
        'RepLKNet': randomize_norms(RepLKNet(TINY)),
        'ConvNeXt': ConvNeXt(
            dict(depths=[1, 1, 2, 1], channels=[8, 16, 32, 64]),
            layer_scale_init_value=1.0,
            gap_before_final_norm=False,
            out_indices=(0, 1, 2, 3),
        ),
    }


@pytest.mark.parametrize('name', ['RepLKNet', 'ConvNeXt'])
def test_scores_by_finite_differences(name):
    net = backbones()[name].double().eval()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    (scores,), stage, shape = contributions(net, image)
    assert (stage, shape) == (3, (1, 64, 2, 2))

    @torch.no_grad()
    def center(x):
        return net(x)[-1][0, :, 1, 1].clamp(min=0).sum().item()

    step = 1e-5
    for row, column in [(32, 32), (40, 47), (20, 33), (63, 63), (5, 60)]:
        expected = 0.0
        for channel in range(3):
            moved = [image.clone() for _ in range(2)]
            for sign, x in zip((1, -1), moved, strict=True):
                x[0, channel, row, column] += sign * step
            expected += max(0.0, (center(moved[0]) - center(moved[1])) / (2 * step))
        assert scores[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='mmseg.ResNetV1c', depth=18, base_channels=8, stem_channels=8, with_cp=True),
        dict(type='mmseg.SwinTransformer', embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=2),
        dict(type='mmdet.ResNet', depth=18, base_channels=8, frozen_stages=1),
    ],
)
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
    assert torch.allclose(contributions(again, image, 1)[0][0].float(), expected)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(
            type='mmseg.BiSeNetV1',
            backbone_cfg=dict(type='mmseg.ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint='gone')),
        ),
        dict(
            type='mmdet.PyramidVisionTransformer',
            embed_dims=8,
            num_layers=[1, 1, 1, 1],
            init_cfg=dict(checkpoint='gone'),
        ),
    ],
)
def test_pretrained_files_of_a_config_are_not_read(cfg, tmp_path, white):
    found = measure_erf(config(**cfg), None, white, 64, 1, tmp_path / 'out')
    assert not found.trained and found.checkpoint is None and not found.silent


def test_random_weights_depend_on_the_seed_only(tmp_path, white):
    net = config(type='replk_mm.RepLKNet', arch=TINY, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth'))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other, drawn = (
        measure_erf(net, None, white, 64, 1, tmp_path / 'out', **how)
        for how in (dict(seed=1), dict(seed=1), dict(seed=2), dict(seed=1, randomize=True))
    )
    assert (torch.rand(1) == expected).all(), 'the random state of the caller is unchanged'
    assert (first.scores == second.scores).all()
    assert all(np.abs(first.scores - x.scores).max() > 1e-3 * first.scores.max() for x in (other, drawn))
    assert not first.trained and 'seed 1' in first.weights and 'UNTRAINED' in first.notes()[0]
    assert net.model.init_cfg.checkpoint == 'nowhere.pth', 'the config is unchanged'


def test_weights_of_a_checkpoint(tiny, tmp_path):
    cfg = tiny.cfg()
    model = randomize_norms(build_model(copy.deepcopy(cfg)))  # norms with statistics
    photo = paint(tmp_path / 'images', (200, 30, 90))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(iter=7)), tmp_path / 'model.pth')
    torch.save(model.backbone.state_dict(), tmp_path / 'backbone.pth')
    torch.save(
        dict(
            state_dict=reparameterize(model.eval())[0].state_dict(),
            meta=dict(replk_mm=dict(reparameterized=dict(merge=True, fold=True))),
        ),
        tmp_path / 'merged.pth',
    )
    found = measure_erf(cfg, str(tmp_path / 'model.pth'), photo, 64, 1, tmp_path / 'out')
    # RGB as in the config's preprocessor; the image has one color, so that resizing does not change it.
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    image = (torch.tensor([200, 30, 90.0]) - mean) / std
    expected = contributions(model.eval().backbone, image.view(1, 3, 1, 1).expand(1, 3, 64, 64))[0][0].numpy()
    assert np.abs(found.scores - expected).max() < 1e-6 * expected.max()
    assert found.trained and found.weights.endswith('model.pth, iteration 7') and found.notes() == []
    values = found.values()
    assert values.pop('side_interval') is None, 'one image has none'
    assert 0 < values.pop('gaussian')['widths'][1] < 64
    assert values == dict(
        areas=areas(paper_scale(expected)),
        areas_of_scores=areas(expected),
        size=64,
        images=1,
        trained=True,
        weights=found.weights,
    )
    assert found.protocol() == dict(size=64, images=1, image_set=found.image_set, stage=3, trained=True)
    same = measure_erf(cfg, None, photo, 64, 1, tmp_path / 'out', pretrained=str(tmp_path / 'backbone.pth'))
    assert same.trained and (same.scores == found.scores).all()
    merged = measure_erf(cfg, str(tmp_path / 'merged.pth'), photo, 64, 1, tmp_path / 'out')
    assert np.abs(merged.scores - expected).max() < 1e-4 * expected.max()


# -- areas, files and the command --------------------------------------------------------------------------------------
@pytest.mark.parametrize('size', [16, 17])
def test_areas_by_summing_squares(size):
    matrix = np.random.default_rng(0).random((size, size)) ** 4
    middle = size // 2
    for share, area in areas(matrix).items():
        side = next(
            2 * i + 1
            for i in range(size)
            if matrix[max(0, middle - i) : middle + i + 1, max(0, middle - i) : middle + i + 1].sum()
            >= float(share) * matrix.sum() - 1e-12
        )
        assert area == dict(side=min(side, size), ratio=pytest.approx((min(side, size) / size) ** 2))


def test_a_share_that_a_square_holds_exactly_needs_no_larger_one():
    matrix = np.zeros((9, 9))
    matrix[4, 4] = matrix[4, 6] = 1
    assert [area['side'] for area in areas(matrix).values()] == [1, 1, 1, 5]


def test_squares_of_a_heat_map_are_centered(tmp_path, drawn, monkeypatch):
    """A square of side 2 r + 1 begins half a pixel before pixel ``size // 2 - r``."""
    corners, scores = set(), np.zeros((8, 8))
    scores[4, 4], scores[4, 5] = 3, 1

    class Recorded(erf_report.Rectangle):
        def __init__(self, corner, width, height, **style):
            corners.add((*corner, width, height))
            super().__init__(corner, width, height, **style)

    monkeypatch.setattr(erf_report, 'Rectangle', Recorded)
    erf_report.draw_heat_maps([result(scores=scores)], tmp_path / 'erf.png')
    assert corners == {(3.5, 3.5, 1, 1), (2.5, 2.5, 3, 3), (0, 0, 1, 1)}, 'the last is of the legend'


@pytest.mark.parametrize(('key', 'channels'), [('bgr_to_rgb', 'RGB'), ('rgb_to_bgr', 'RGB'), ('other', 'BGR')])
def test_order_of_the_channels_is_that_of_the_preprocessor(tmp_path, white, key, channels):
    """Both settings swap the channels, which are BGR as OpenCV reads them."""
    preprocessor = dict(mean=[1.0, 2, 3], std=[4.0, 5, 6], **{key: True})
    net = config(backbone=dict(type='test_erf_ones'), data_preprocessor=preprocessor)
    found = measure_erf(net, None, white, 9, 1, tmp_path / 'out')
    assert found.preprocessing == dict(mean=[1, 2, 3], std=[4, 5, 6], channels=channels)


def test_paper_scale_depends_on_the_size_of_gradients():
    scores = np.outer([1.0, 9, 99, 9, 1], [1.0, 9, 99, 9, 1])
    small, large = paper_scale(1e-9 * scores), paper_scale(1e9 * scores)
    assert np.abs(small - scores / scores.max()).max() < 1e-5
    # Scores of deep networks, far below what can be told from 1 when added to it.
    assert paper_scale(1e-20 * scores) == pytest.approx(scores / scores.max())
    assert large.min() > 0.6 and paper_scale(np.zeros((3, 3))).max() == 0
    assert paper_scale(np.array([[9.0, 99.0]])) == pytest.approx(np.array([[0.5, 1]]))


def test_comparison_warnings():
    assert erf_report.comparison_warnings([result(), result()]) == []
    with pytest.raises(UserError, match='--size'):
        erf_report.comparison_warnings([result(), result(backbone='B', config='b', size=16)])
    other = result(backbone='B', trained=False, map_size=(4, 4), image_set='1' * 64)
    untrained, images, strides = erf_report.comparison_warnings([result(), other])
    assert 'untrained weights: B' in untrained and 'images' in images and 'A 4, B 2' in strides


def test_table_has_the_areas():
    scores = np.zeros((8, 8))
    scores[4, 4], scores[4, 5] = 3, 1
    text = erf_report.format_tables([result(scores=scores, trained=False)])
    # 3 of 4 in the pixel in the middle, the rest beside it.
    assert (
        '| A | **untrained**: w | output 3, stride 4, 4 channels | 1 (1.6 %) | 1 (1.6 %) | 1 (1.6 %) | 3 (14.1 %) |'
    ) in text
    assert 'A +0.0, +0.2' in text


READABLE = dict(
    kind=KIND,
    version=1,
    **{key: value for key, value in result().model_dump().items() if key != 'scores'},
    matrix='erf.npz',
)


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


@pytest.mark.parametrize(
    ('changes', 'matrix', 'fragment'),
    [
        (dict(kind='mIoU'), None, 'mIoU'),
        (dict(matrix='gone.npz'), None, r'gone\.npz'),
        (dict(map_size=3), None, 'map_size'),
        (dict(map_size=[0, 2]), None, 'map_size'),
        (dict(size=9), None, r'\(9, 9\)'),
        ({}, saved(scores=np.eye(8))[:-30], 'BadZipFile'),
        ({}, saved(x=np.eye(8)), 'KeyError'),
        ({}, saved(scores=-np.eye(8)), 'negative'),
        ({}, saved(scores=np.full((8, 8), np.nan)), 'finite'),
        ({}, saved(scores=np.array([[None] * 8] * 8, object)), 'allow_pickle'),
    ],
)
def test_records_and_matrices_that_do_not_fit(tmp_path, changes, matrix, fragment):
    assert load(tmp_path, READABLE).scores.sum() == 8
    with pytest.raises(UserError, match=fragment):
        load(tmp_path, {**READABLE, **changes}, matrix)


def test_names_stay_text_in_the_table():
    text = erf_report.format_tables([result(backbone='<img src=x>', weights='![](http://x)|')])
    assert not re.search(r'(?<!\\)[<|]img|(?<!\\)!?\[\]', text) and r'\<img' in text and r'\|' in text


def test_networks_of_one_name_are_disambiguated():
    paths = [Path(f'erf/{name}/erf.json') for name in ('k3', 'k31', 'trained')]
    found = erf_report.disambiguate([result(trained=False), result(trained=False), result(weights='x.pth')], paths)
    assert [erf.backbone for erf in found] == ['A (k3)', 'A (k31)', 'A']


def test_image_set_depends_on_content_and_order(tmp_path):
    one, copied = paint(tmp_path / 'a' / 'deep', 9, 8), paint(tmp_path / 'b', 9, 8)
    (copied / '1.png').rename(copied / 'renamed.png')
    (copied / 'notes.txt').write_text('no image')
    found = [
        measure_erf(config(type='test_erf_ones'), None, folder, 9, count, tmp_path / 'out').image_set
        for folder, count in ((one.parent, 2), (copied, 2), (copied, 1))
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ('model', 'arguments', 'fragment'),
    [
        *((dict(type='test_erf_ones'), dict(stage=stage), f'stage {stage}') for stage in (3, -1)),
        (dict(type='test_erf_function', call=lambda x: x.mean((2, 3))), {}, r'\(1, 3\)'),
        (dict(type='test_erf_function', call=lambda x: x / 0), {}, r'0\.png'),
        (dict(type='test_erf_function', call=lambda x: x[:, :, :0]), {}, '9x9'),
        (dict(type='test_erf_function', call=lambda x: x.detach()), {}, '9x9'),
        (dict(type='test_erf_ones'), dict(randomize=True, pretrained='x.pth'), '--randomize'),
        (dict(type='test_erf_ones'), dict(checkpoint='y.pth', pretrained='x.pth'), r'--pretrained x\.pth'),
        (dict(type='test_erf_ones'), dict(pretrained='x.pth'), r'x\.pth'),
        (dict(type='NoSuchNet'), {}, 'NoSuchNet'),
    ],
)
def test_user_errors(tmp_path, white, model, arguments, fragment):
    arguments = {'checkpoint': None, 'images': white, 'size': 9, 'count': 1, 'out': tmp_path / 'out', **arguments}
    with pytest.raises(UserError, match=fragment):
        measure_erf(config(**model), **arguments)


def test_unusable_images(tmp_path, white):
    def measure(folder):
        measure_erf(config(type='test_erf_ones'), None, folder, 9, 9, tmp_path / 'out')

    with pytest.raises(UserError, match='nowhere'):
        measure(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'0\.png'):
        measure(white / '0.png')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty'):
        measure(tmp_path / 'empty')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(white / '1.jpg')
    whole = (white / '1.jpg').read_bytes()
    for broken in (whole[: len(whole) // 2], b'', b'text'):
        (white / '1.jpg').write_bytes(broken)
        with pytest.raises(UserError, match=r'1\.jpg'):
            measure(white)


def test_command(tiny, tmp_path, white, drawn, monkeypatch, capsys):
    main = importlib.import_module('replk_mm.commands.erf').main

    def run(*arguments) -> str:
        monkeypatch.setattr('sys.argv', ['erf.py', *map(str, arguments)])
        assert main() == 0
        return capsys.readouterr().out

    printed = run(
        tiny.config, '--images', white, '--size', 64, '--count', 2, '--out', tmp_path / 'a', '--device', 'cpu'
    )
    assert 'UNTRAINED' in printed and '1 of the 2' in printed
    assert {path.name for path in (tmp_path / 'a').iterdir()} == {'erf.json', 'erf.npz', 'erf.png'}
    printed = run('--compare', *[tmp_path / 'a' / 'erf.json'] * 2, '--out', tmp_path / 'b', '--name', 'pair')
    assert printed.count('| RepLKNet (a) |') == 6 and 'untrained weights: all' in printed
    assert {path.name for path in (tmp_path / 'b').iterdir()} == {'pair.md', 'pair.png'}
    picture = np.asarray(Image.open(tmp_path / 'b' / 'pair.png').convert('RGB'))
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 100, 'heat maps are drawn'
