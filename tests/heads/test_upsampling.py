"""Loss of interpolated logits against torch's own chain, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tensors import LargestTensor

from replk_mm.errors import UserError
from replk_mm.heads import upsampling as upsampled
from replk_mm.heads.upsampling import Interpolation, upsampled_cross_entropy

# (N, K, h, w), (H, W)
SHAPES = {
    'stride 4': ((2, 7, 5, 6), (20, 24)),
    'odd sizes': ((2, 7, 5, 6), (23, 17)),
    'same size': ((2, 4, 6, 5), (6, 5)),
    'smaller': ((2, 5, 13, 9), (4, 6)),
    'one pixel in': ((2, 3, 1, 1), (5, 4)),
    'one pixel out': ((2, 3, 4, 5), (1, 1)),
    'one row': ((1, 3, 1, 9), (1, 80)),
    'two classes': ((1, 2, 3, 4), (12, 16)),
}
# One chunk, chunks of a few rows, and a row at a time with bands of a few columns.
CHUNKS = {'one chunk': (2**22, 64), 'some rows': (3000, 7), 'a row': (1, 2)}


@pytest.fixture(params=CHUNKS)
def chunks(request, monkeypatch) -> None:
    """Chunks of different sizes, which must not show in a result."""
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', CHUNKS[request.param][0])
    monkeypatch.setattr(upsampled, '_BAND', CHUNKS[request.param][1])


def labels_of(shape, size, ignored=0.2, ignore_index=255) -> torch.Tensor:
    labels = torch.randint(0, shape[1], (shape[0], *size))
    return torch.where(torch.rand(labels.shape) < ignored, ignore_index, labels)


def reference(logits, labels, ignore_index=255, align_corners=False):
    """Loss, gradient, correct pixels and counted pixels with the large logits, in float64."""
    logits = logits.detach().double().requires_grad_()
    large = F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=align_corners)
    loss = F.cross_entropy(large, labels, ignore_index=ignore_index, reduction='sum')
    (grad,) = torch.autograd.grad(loss, logits)
    counts = labels != ignore_index
    return loss.detach(), grad, ((large.argmax(1) == labels) & counts).sum(), counts.sum()


def found(logits, labels, *args, **kwargs):
    logits = logits.detach().clone().requires_grad_()
    loss, correct, counted = upsampled_cross_entropy(logits, labels, *args, **kwargs)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad, correct, counted


def assert_same(ours, theirs, relative=1e-12):
    for name, a, b in zip(('loss', 'gradient', 'correct', 'counted'), ours, theirs, strict=True):
        assert a.shape == b.shape, name
        error, scale = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        assert error <= relative * max(scale, 1e-6), f'{name}: off by {error} of {scale}'


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size, out_size', [*itertools.product((1, 2, 5, 16), (1, 2, 7, 16, 64)), (64, 37)])
def test_interpolation_is_torchs(size, out_size, align_corners):
    expected = F.interpolate(
        torch.eye(size, dtype=torch.float64)[None], out_size, mode='linear', align_corners=align_corners
    )[0].t()
    x = torch.randn(size, 3, dtype=torch.float64)
    for step in (1, 5, out_size):
        for part in Interpolation(size, out_size, align_corners, x).parts(step):
            matrix = torch.zeros(part.stop - part.start, size, dtype=torch.float64)
            matrix[:, part.first : part.last] = part.transposed().t()
            torch.testing.assert_close(matrix, expected[part.start : part.stop], rtol=0, atol=1e-14)
            out = part.apply(x[part.first : part.last], x.new_empty(part.stop - part.start, 3))
            torch.testing.assert_close(out, expected[part.start : part.stop] @ x, rtol=0, atol=1e-13)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_cross_entropy_is_torchs(shape, align_corners, chunks):
    shape, size = SHAPES[shape]
    logits, labels = 3 * torch.randn(shape, dtype=torch.float64), labels_of(shape, size)
    assert_same(
        found(logits, labels, align_corners=align_corners), reference(logits, labels, align_corners=align_corners)
    )


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_cross_entropy_in_float32(layout):
    shape, size = (2, 150, 16, 12), (64, 48)
    logits, labels = 3 * torch.randn(shape).contiguous(memory_format=layout), labels_of(shape, size)
    assert_same(found(logits, labels), reference(logits, labels), 2e-6)


def test_random_sizes():
    for seed in range(40):
        torch.manual_seed(seed)
        n, k, h, w, height, width = torch.randint(1, 12, (6,)).tolist()
        logits, labels = torch.randn(n, k, h, w, dtype=torch.float64), labels_of((n, k), (height, width))
        assert_same(found(logits, labels), reference(logits, labels))


@pytest.mark.parametrize('ignore_index', [0, 2, 255, -100])
def test_ignored_labels(ignore_index):
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    labels = labels_of(logits.shape, (12, 20), 0.5, ignore_index)
    assert_same(found(logits, labels, ignore_index), reference(logits, labels, ignore_index))
    nothing = torch.full_like(labels, ignore_index)
    loss, grad, correct, counted = found(logits, nothing, ignore_index)
    assert loss == 0 and not grad.any() and correct == counted == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_labels_of_no_probability(dtype):
    """Probabilities that no float holds: their logarithms are finite all the same."""
    logits = (1000 * torch.randn(2, 5, 4, 4)).to(dtype)
    labels = labels_of(logits.shape, (16, 16))
    ours, theirs = found(logits, labels), reference(logits, labels)
    assert theirs[0] > 1e4
    assert_same(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-12)


def test_reduced_precision_is_computed_in_float32():
    logits, labels = 3 * torch.randn(2, 20, 8, 8).bfloat16(), labels_of((2, 20), (32, 32))
    with torch.autocast('cpu', torch.bfloat16):
        loss, grad, correct, counted = found(logits, labels)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    expected = reference(logits, labels)
    assert_same((loss, correct, correct, counted), (expected[0], expected[2], expected[2], expected[3]), 1e-6)
    assert_same((loss, grad, correct, counted), expected, 2**-8)


def test_gradient_includes_later_operations():
    logits, labels = torch.randn(1, 3, 4, 4, dtype=torch.float64), labels_of((1, 3), (8, 8))
    expected = reference(logits, labels)[1]
    logits.requires_grad_()
    total, _, counted = upsampled_cross_entropy(logits, labels)
    (0.4 * total / counted).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 0.4 * expected / counted)
    (0.6 * total / counted).backward()
    torch.testing.assert_close(logits.grad, expected / counted)


def test_empty_batch_is_torchs():
    loss, grad, correct, counted = found(torch.randn(0, 3, 4, 4), torch.zeros(0, 8, 8, dtype=torch.long))
    assert loss == 0 and grad.shape == (0, 3, 4, 4) and correct == counted == 0


@pytest.mark.parametrize('label', [4, 254, -1])
def test_labels_of_no_class_are_rejected(label):
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 3, 3] = label
    with pytest.raises(UserError, match=rf'class {label}; the head has 4 classes'):
        upsampled_cross_entropy(torch.randn(1, 4, 2, 2), labels)
    with pytest.raises(IndexError):
        F.cross_entropy(torch.randn(1, 4, 8, 8), labels, ignore_index=255)


def test_memory_does_not_grow_with_the_labels(monkeypatch, one_thread):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**16)
    shape = (2, 32, 16, 16)
    largest = {}
    for factor in (4, 8, 16):
        labels = labels_of(shape, (16 * factor, 16 * factor))
        with LargestTensor() as mine:
            found(torch.randn(shape), labels)
        largest[factor] = mine.numel
        with LargestTensor() as torchs:
            reference(torch.randn(shape), labels)
        assert torchs.numel >= 2 * 32 * (16 * factor) ** 2
    # Three buffers of a chunk, or the labels.
    assert largest[4] <= 3 * 2**16 / 4 and largest[16] <= 2 * (16 * 16) ** 2


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**14)
    logits, labels = torch.randn(2, 20, 16, 12), labels_of((2, 20), (64, 48))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(found(logits, labels))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
