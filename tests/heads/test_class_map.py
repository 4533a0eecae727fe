"""Class maps in bands of rows against torch's own chain over the large logits, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tensors import LargestTensor

from replk_mm.errors import UserError
from replk_mm.heads import class_map as bands
from replk_mm.heads import upsampling as upsampled
from replk_mm.heads.class_map import LogitRows, Windows, class_map

CLASSES = 13


@pytest.fixture(params=[100, 7, 1], ids=['one chunk', 'some rows', 'a row'])
def chunks(request, monkeypatch) -> None:
    """Chunks of different sizes, which must not show in a result."""
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 1)
    monkeypatch.setattr(bands, 'MIN_ROWS', request.param)


def labels_of(logits, size, *args) -> torch.Tensor:
    """Class map of a whole image's logits ``(K, h, w)``."""
    return class_map([LogitRows(lambda _: [logits], *map(Windows.whole, size), *args)])


def at_own_size(x, padding=(0, 0, 0, 0), flip=None, out_size=None, align_corners=False) -> torch.Tensor:
    """``(1, K, H, W)`` at the size of the network's input to ``(K, H, W)`` at the image's own."""
    left, right, top, bottom = padding
    x = x[..., top : x.shape[2] - bottom, left : x.shape[3] - right]
    x = x.flip({'horizontal': 3, 'vertical': 2}[flip]) if flip else x
    return F.interpolate(x, tuple(out_size or x.shape[2:]), mode='bilinear', align_corners=align_corners)[0]


def chain(logits, size, padding=(0, 0, 0, 0), flip=None, out_size=None, align_corners=False) -> torch.Tensor:
    """Every step by torch, in float64."""
    x = F.interpolate(logits[None].double(), tuple(size), mode='bilinear', align_corners=align_corners)
    return at_own_size(x, padding, flip, out_size, align_corners).argmax(0)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('flip', [None, 'horizontal', 'vertical'])
@pytest.mark.parametrize(
    'size, padding, out_size',
    [
        ((36, 44), (0, 0, 0, 0), None),
        ((36, 44), (1, 5, 2, 7), None),
        ((36, 44), (0, 6, 0, 3), (50, 31)),
        ((40, 44), (3, 0, 5, 0), (13, 90)),
        ((9, 11), (0, 0, 0, 0), None),
        ((9, 11), (1, 2, 3, 1), (30, 20)),
        ((9, 30), (0, 0, 0, 0), (9, 12)),
        ((5, 4), (0, 0, 0, 0), (1, 1)),
    ],
)
def test_argmax_is_that_of_the_chain(size, padding, out_size, flip, align_corners, chunks):
    logits = torch.randn(CLASSES, 9, 11, dtype=torch.float64)
    expected = chain(logits, size, padding, flip, out_size, align_corners)
    for layout in (logits, logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        found = labels_of(layout, size, padding, flip, out_size, align_corners)
        assert found.dtype == torch.long and torch.equal(found, expected)


def test_random_sizes():
    for seed in range(40):
        torch.manual_seed(seed)
        classes, h, w, height, width, out_height, out_width = torch.randint(1, 12, (7,)).tolist()
        logits, out_size = torch.randn(classes, h, w, dtype=torch.float64), (out_height, out_width)
        found = labels_of(logits, (height, width), (0, 0, 0, 0), None, out_size)
        assert torch.equal(found, chain(logits, (height, width), out_size=out_size)), seed


# -- sliding windows --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'size, length, stride',
    [
        (64, 48, 32),
        (64, 48, 16),
        (64, 48, 48),
        (65, 48, 32),
        (48, 48, 32),
        (40, 48, 32),
        (100, 30, 1),
        (100, 30, 29),
        (1, 5, 3),
        (97, 32, 32),
    ],
)
def test_windows_lie_where_mmseg_puts_them(size, length, stride):
    grids = max(size - length + stride - 1, 0) // stride + 1
    expected = [(max(min(i * stride + length, size) - length, 0), min(i * stride + length, size)) for i in range(grids)]
    windows = Windows.sliding(size, length, stride)
    assert [(start, start + windows.length) for start in windows.starts] == expected
    counts = [sum(a <= i < b for a, b in expected) for i in range(size)]
    assert windows.counts().tolist() == counts and min(counts) > 0
    assert windows.overlapping(size // 2, size // 2 + 1) == [
        i for i, (a, b) in enumerate(expected) if a <= size // 2 < b
    ]


def test_windows_with_gaps_are_rejected():
    with pytest.raises(UserError, match='test_cfg.stride'):
        Windows.sliding(100, 20, 30)
    assert Windows.sliding(20, 20, 30).starts == (0,)


def sliding(size, crop, stride, factor) -> tuple[Windows, Windows, list[list[torch.Tensor]]]:
    """Windows, and their logits at ``1 / factor`` of their size."""
    rows, columns = map(Windows.sliding, size, crop, stride)
    shape = CLASSES, max(1, rows.length // factor), max(1, columns.length // factor)
    logits = [[torch.randn(shape, dtype=torch.float64) for _ in columns.starts] for _ in rows.starts]
    return rows, columns, logits


def mean_of_windows(rows, columns, logits, align_corners=False) -> torch.Tensor:
    """The mean of the large logits, ``(1, K, H, W)``."""
    total = torch.zeros(1, CLASSES, rows.size, columns.size, dtype=torch.float64)
    count = torch.zeros(rows.size, columns.size, dtype=torch.float64)
    for top, of_row in zip(rows.starts, logits, strict=True):
        for left, x in zip(columns.starts, of_row, strict=True):
            place = ..., slice(top, top + rows.length), slice(left, left + columns.length)
            total[place] += F.interpolate(
                x[None], (rows.length, columns.length), mode='bilinear', align_corners=align_corners
            )
            count[place[1:]] += 1
    return total / count


SLIDES = {  # size, crop, stride, factor
    'overlapping': ((64, 96), (48, 48), (32, 32), 4),
    'side by side': ((64, 96), (32, 48), (32, 48), 4),
    'much overlapping': ((40, 45), (16, 24), (6, 7), 4),
    'one row': ((30, 90), (48, 48), (47, 32), 8),
    'one column': ((90, 30), (48, 48), (32, 32), 3),
    'large already': ((64, 70), (32, 40), (20, 30), 1),
    'one': ((20, 30), (48, 48), (32, 32), 4),
}


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('target', [(), ((0, 3, 4, 0), 'horizontal', (80, 101)), ((1, 6, 2, 3), 'vertical', (17, 77))])
@pytest.mark.parametrize('case', SLIDES)
def test_sliding_windows_are_averaged(case, target, align_corners, chunks):
    rows, columns, logits = sliding(*SLIDES[case])
    target = (*target, *((0, 0, 0, 0), None, None)[len(target) :], align_corners)
    expected = at_own_size(mean_of_windows(rows, columns, logits, align_corners), *target).argmax(0)
    assert torch.equal(class_map([LogitRows(logits.__getitem__, rows, columns, *target)]), expected)


@pytest.mark.parametrize('flip', [None, 'vertical'])
@pytest.mark.parametrize('out_size', [(400, 50), (200, 48), (90, 40)])
def test_windows_are_computed_once_and_kept_while_needed(flip, out_size, monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 1)
    monkeypatch.setattr(bands, 'MIN_ROWS', 4)
    rows, columns, logits = sliding((200, 48), (32, 32), (16, 16), 4)
    calls, kept = [], []

    def compute(number):
        calls.append(number)
        kept.append(len(view.loaded) + 1)
        return logits[number]

    view = LogitRows(compute, rows, columns, (0, 0, 0, 0), flip, out_size)
    expected = at_own_size(mean_of_windows(rows, columns, logits), (0, 0, 0, 0), flip, out_size).argmax(0)
    assert torch.equal(class_map([view]), expected)
    assert calls == sorted(range(len(logits)), reverse=flip == 'vertical')
    assert len(logits) == 12 and max(kept) <= 4  # two windows over a row, and those over a chunk of rows


# -- several views ----------------------------------------------------------------------------------------------------
def test_views_are_merged_by_their_mean_probabilities(chunks):
    views, total = [], 0
    for size, flip in (((36, 44), None), ((36, 44), 'horizontal'), ((60, 72), 'vertical')):
        logits = 3 * torch.randn(CLASSES, size[0] // 4, size[1] // 4, dtype=torch.float64)
        views.append(
            LogitRows(lambda _, logits=logits: [logits], *map(Windows.whole, size), (0, 0, 0, 0), flip, (50, 61))
        )
        large = F.interpolate(logits[None], size, mode='bilinear')
        total = total + at_own_size(large, (0, 0, 0, 0), flip, (50, 61)).softmax(0)
    rows, columns, logits = sliding((64, 96), (48, 48), (32, 32), 4)
    views.append(LogitRows(logits.__getitem__, rows, columns, (0, 0, 0, 0), 'vertical', (50, 61)))
    total += at_own_size(mean_of_windows(rows, columns, logits), flip='vertical', out_size=(50, 61)).softmax(0)
    found = class_map(views)
    assert torch.equal(found, total.argmax(0))
    assert not torch.equal(found, class_map(views[:1]))


# -- numbers and memory -----------------------------------------------------------------------------------------------
def test_argmax_takes_the_first_of_equals():
    assert not labels_of(torch.full((5, 3, 4), -7.25), (12, 16)).any()
    logits = torch.zeros(5, 3, 4)
    logits[[2, 4]] = 1e-20
    assert (labels_of(logits, (12, 16)) == 2).all()


@pytest.mark.parametrize('autocast', [False, True])
def test_reduced_precision_is_computed_in_float32(autocast):
    logits = torch.randn(150, 12, 10).bfloat16()
    expected = copy.deepcopy(logits)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        found = labels_of(logits, (48, 40), (0, 0, 0, 0), None, (33, 41))
    assert (found == chain(expected, (48, 40), out_size=(33, 41))).float().mean() > 0.999


@pytest.mark.usefixtures('one_thread')
def test_memory_does_not_grow_with_the_image(monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**16)
    monkeypatch.setattr(bands, 'MIN_ROWS', 1)
    for factor in (8, 16):
        size = 16 * factor, 16 * factor
        with LargestTensor() as mine:
            labels_of(torch.randn(32, 16, 16), size, (0, 0, 0, 0), None, (15 * factor, 17 * factor))
        # Two buffers of a chunk, or the labels.
        assert mine.numel <= max(2 * 2**16 / 4, 15 * 17 * factor**2)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(upsampled, 'CPU_CHUNK_BYTES', 2**14)
    logits, before, results = torch.randn(20, 16, 12), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(labels_of(logits, (64, 48), (0, 0, 0, 0), None, (70, 40)))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
