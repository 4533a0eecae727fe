"""Corruptions against an independent implementation of them, the published parameters, and themselves repeated."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from replk_mm.analysis.corruptions import CORRUPTIONS, SEVERITIES, _fractal, corrupt

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / 'data/golden/corruptions.json').read_text())['corruptions']
#: Those that draw no random numbers.
FIXED = {name for name, found in GOLDEN.items() if isinstance(found[0], list)}
RUNS = 12


def picture() -> NDArray[np.uint8]:
    """The image that the independent implementation corrupted: stripes and fine texture."""
    i, j, c = np.indices((64, 96, 3))
    return (np.abs((5 * i + 2 * j + 40 * c) % 256 - 128) + (13 * i + 29 * j) % 32 * 3).astype(np.uint8)


def test_the_fifteen_are_those_of_the_paper_and_frost_has_another_name():
    assert [name.replace('generated_frost', 'frost') for name in CORRUPTIONS] == list(GOLDEN)
    assert {'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression'} == FIXED


@pytest.mark.parametrize('name', sorted(FIXED))
def test_without_random_numbers_the_pixels_agree(name):
    for severity in SEVERITIES:
        found = corrupt(picture(), name, severity)[5::13, 7::17].ravel()
        # JPEG decoders differ by a few values; the others by how they round before truncation.
        assert np.abs(found - np.array(GOLDEN[name][severity - 1], float)).max() <= (4 if 'jpeg' in name else 1)


@pytest.mark.parametrize('name', [name for name in GOLDEN if name not in FIXED | {'frost'}])
def test_with_random_numbers_the_statistics_agree(name):
    image = picture()
    for severity in SEVERITIES:
        found = [corrupt(image, name, severity, seed) for seed in range(RUNS)]
        ours = np.array([[one.mean(), one.std(), np.abs(one - image.astype(float)).mean()] for one in found])
        theirs = {key: np.array(value) for key, value in GOLDEN[name][severity - 1].items()}
        # Standard error of the difference of two means of 24 and RUNS runs; 5 of them are exceeded once in 10^6.
        assert (np.abs(ours.mean(0) - theirs['mean']) <= 5 * theirs['deviation'] * (1 / 24 + 1 / RUNS) ** 0.5).all()


@pytest.mark.parametrize(('name', 'angles'), [('motion_blur', (-45, 45)), ('snow', (-135, -45))])
def test_directions_are_drawn_from_the_published_ranges(name, angles):
    drawn = []

    class Recording(np.random.Generator):
        def uniform(self, *ends):
            drawn.append(ends)
            return super().uniform(*ends)

    function, parameters = CORRUPTIONS[name]
    function(picture() / np.float32(255), Recording(np.random.PCG64(0)), *parameters[0])
    assert drawn == [angles]


@pytest.mark.parametrize('decay', [1.4, 2.0])
def test_the_noise_of_fog_falls_by_the_square_of_the_decay(decay):
    """From one scale to the next: what the center of a square differs from the mean of its corners by."""
    field = _fractal((256, 256), decay, np.random.default_rng(0))

    def noise(step: int) -> float:
        corners = field[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        return float(np.std(field[step // 2 :: step, step // 2 :: step] - (rows + np.roll(rows, -1, 1)) / 4))

    assert noise(4) / noise(2) == pytest.approx(decay**2, rel=0.05)
    assert noise(8) / noise(4) == pytest.approx(decay**2, rel=0.1)


@pytest.mark.parametrize(('severity', 'kept', 'added'), [(1, 1, 0.4), (2, 0.8, 0.6), (3, 0.7, 0.7), (5, 0.6, 0.75)])
def test_frost_has_the_published_weights_on_a_texture_as_bright_as_the_photographs(severity, kept, added):
    function, parameters = CORRUPTIONS['generated_frost']
    black, gray = (
        function(np.full((64, 64, 3), value, np.float32), np.random.default_rng(0), *parameters[severity - 1])
        for value in (0, 0.5)
    )
    assert gray - black == pytest.approx(0.5 * kept, abs=1e-6)
    assert 130 < 255 * black.mean() / added < 190  # the six photographs: 90 to 207, on average 152


def test_results_repeat_whatever_the_global_generators_are_and_leave_them_alone():
    image = picture()
    before = image.copy()
    np.random.seed(1)  # noqa: NPY002
    first = {name: corrupt(image, name, 3, seed=7) for name in CORRUPTIONS}
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    again = {name: corrupt(image.copy(), name, 3, seed=7) for name in reversed(CORRUPTIONS)}
    assert all(np.array_equal(first[name], again[name]) for name in CORRUPTIONS)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert np.array_equal(image, before)
    assert all(found.dtype == np.uint8 and found.shape == image.shape for found in first.values())


def test_other_seeds_severities_and_images_have_other_noise():
    gray = np.full((64, 64, 3), 128, np.uint8)
    other = gray.copy()
    other[0, 0, 0] = 129
    noise = [corrupt(gray, 'gaussian_noise', 1, seed=s) for s in (0, 1)] + [corrupt(other, 'gaussian_noise', 1)]
    correlations = np.corrcoef([one.ravel() for one in noise] + [corrupt(gray, 'gaussian_noise', 2).ravel()])
    assert np.abs(correlations - np.eye(4)).max() < 0.05  # of 12,288 values: standard error 0.009


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((31, 64, 3), np.uint8),
    ],
)
def test_other_images_are_rejected(image):
    with pytest.raises(ValueError, match='RGB images of 8 bits'):
        corrupt(image, 'fog', 1)
