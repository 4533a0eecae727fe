"""Depthwise kernels of another size: closed forms of padding and interpolation, and errors that offer them."""

import pytest
import torch
from checkpoint_cases import CONV, DENSE, TINY, write
from norms import randomize_norms
from torch.nn.functional import conv2d

from replk_mm.backbones import ConvNeXt, RepLKNet, SLaK, build_backbone
from replk_mm.checkpoints.loading import load_pretrained, resize_kernel
from replk_mm.errors import UserError

LARGER = dict(TINY, large_kernel_sizes=[15, 15, 13, 9])
SLAK = dict(arch=CONV, kernel_size=[13, 11, 9, 7], layer_scale_init_value=1.0)


def convnext(kernel_size: int, seed: int = 1) -> ConvNeXt:
    torch.manual_seed(seed)
    model = ConvNeXt(CONV, kernel_size=kernel_size, layer_scale_init_value=1.0, **DENSE)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ('small', 'large', 'count'),
    [
        (lambda: convnext(3), lambda: convnext(7, 2), 5),
        (lambda: RepLKNet(TINY), lambda: RepLKNet(LARGER), 5),
        (lambda: SLaK(**SLAK), lambda: SLaK(**dict(SLAK, kernel_size=[15, 13, 13, 9])), 10),
    ],
    ids=['ConvNeXt', 'RepLKNet', 'SLaK'],
)
def test_a_padded_kernel_computes_the_same_features(small, large, count, tmp_path):
    source, target = randomize_norms(small()).eval(), randomize_norms(large(), 3).eval()
    path = write(tmp_path / 'small.pth', source.state_dict())
    with pytest.raises(UserError, match='(?s)size of depthwise kernels: .*--resize-kernels pad or interpolate'):
        load_pretrained(target, path)
    report = load_pretrained(target, path, resize_kernels='pad')
    assert report.missing == report.unexpected == report.mismatched == []
    assert sum(report.resized.values()) == count and '(pad)' in report.summary()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(target(image), source(image), strict=True):
            assert expected.std() > 1e-3
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_padding_is_centred():
    kernel = torch.arange(1.0, 16).view(1, 1, 3, 5)
    padded = resize_kernel(kernel, (7, 5), 'pad')
    assert padded.shape == (1, 1, 7, 5) and torch.equal(padded[:, :, 2:5], kernel) and padded.sum() == kernel.sum()


@pytest.mark.parametrize('size', [(5, 5), (13, 13), (31, 3)])
def test_interpolated_kernels_keep_constant_images_and_linear_slopes(size):
    """Bicubic interpolation reproduces constants, and linear functions away from the borders."""
    flat = resize_kernel(torch.full((2, 1, 9, 9), 2.0), size, 'interpolate')
    response = conv2d(torch.ones(1, 2, *size), flat, groups=2).flatten()
    torch.testing.assert_close(response, torch.full((2,), 2.0 * 81), rtol=1e-5, atol=0)
    slope = torch.arange(9.0).expand(1, 1, 9, 9)
    rows, columns = size
    found = resize_kernel(slope, size, 'interpolate')[0, 0, rows // 2] * (rows * columns / 81)
    places = (torch.arange(columns) + 0.5) * 9 / columns - 0.5  # centres of the new pixels among the old ones
    inner = slice(columns // 2 - columns // 6, columns // 2 + columns // 6 + 1)
    torch.testing.assert_close(found[inner], places[inner], rtol=1e-4, atol=1e-4)


def test_smaller_kernels_are_interpolated_and_not_cut_off(tmp_path):
    path = write(tmp_path / 'large.pth', RepLKNet(LARGER).state_dict())
    with pytest.raises(UserError, match='--resize-kernels interpolate .in code'):
        load_pretrained(RepLKNet(TINY), path)
    with pytest.raises(UserError, match='cannot pad a kernel of 15x15 to 13x13'):
        load_pretrained(RepLKNet(TINY), path, resize_kernels='pad')
    report = load_pretrained(RepLKNet(TINY), path, resize_kernels='interpolate')
    assert report.mismatched == [] and report.resized['15x15 to 13x13 (interpolate)'] == 1
    with pytest.raises(UserError, match="resize_kernels='crop'"):
        load_pretrained(RepLKNet(TINY), path, resize_kernels='crop')


def test_merged_weights_are_padded_in_both_forms(tmp_path):
    source = randomize_norms(RepLKNet(TINY, small_kernel_merged=True)).eval()
    path = write(tmp_path / 'merged.pth', source.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for merged in (True, False):
        model = randomize_norms(RepLKNet(LARGER, small_kernel_merged=merged), 4).eval()
        load_pretrained(model, path, resize_kernels='pad')
        for found, expected in zip(model(image), source(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_backbones_of_the_catalogue(tmp_path):
    path = write(tmp_path / 'a.pth', build_backbone('convnext-atto', kernel_size=3).state_dict())
    model = build_backbone('convnext-atto', pretrained=path, resize_kernels='pad')
    kernel = model.stages[0][0].depthwise_conv.weight
    assert kernel.shape[2:] == (7, 7) and kernel[:, :, 2:5, 2:5].count_nonzero() == kernel.count_nonzero() > 0
    with pytest.raises(UserError, match='needs weights'):
        build_backbone('convnext-atto', resize_kernels='pad')


def test_other_shapes_stay_errors(tmp_path):
    """Resizing changes height and width of depthwise kernels only."""
    wide = dict(CONV, channels=[8, 12, 16, 32])
    path = write(tmp_path / 'a.pth', ConvNeXt(wide, kernel_size=3, **DENSE).state_dict())
    with pytest.raises(UserError, match='does not fit'):
        load_pretrained(convnext(7), path, resize_kernels='pad')
