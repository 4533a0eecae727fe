"""Pictures of label maps."""

import numpy as np
import pytest

from replk_mm.visualize import class_legend, colorize, image_grid, overlay

PALETTE = [[255, 0, 0], [0, 255, 0], [10, 20, 30]]


def test_colours_are_the_palette_in_opencv_order():
    found = colorize(np.array([[0, 1], [2, 255]]), PALETTE)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[0, 0, 255], [0, 255, 0]], [[30, 20, 10], [0, 0, 0]]]


def test_overlay_mixes_classes_and_leaves_ignored_pixels():
    image = np.full((1, 3, 3), 100, np.uint8)
    found = overlay(image, np.array([[0, 255, 2]]), PALETTE, 0.5)
    assert found[0, 0].tolist() == [50, 50, 178]
    assert found[0, 1].tolist() == [100, 100, 100]
    assert found[0, 2].tolist() == [65, 60, 55]
    assert image.min() == image.max() == 100


@pytest.mark.parametrize('height', [12, 64, 300])
def test_legend_shows_the_present_classes(height):
    labels = np.zeros((10, 10), int)
    labels[:3] = 1
    panel = class_legend(labels, ['red', 'green', 'dark'], PALETTE, height)
    assert panel.shape == (height, 210, 3)
    colours = {tuple(c) for c in panel.reshape(-1, 3).tolist()}
    assert ((0, 0, 255) in colours) == (height > 12), 'with one row, the row counts the others'
    assert ((0, 255, 0) in colours) == (height > 12)
    assert (30, 20, 10) not in colours
    if height > 64:
        first = [np.flatnonzero((panel == colour).all(-1).any(1))[0] for colour in ((0, 0, 255), (0, 255, 0))]
        assert first[0] < first[1], 'the largest first'


def test_sheet_places_every_picture():
    pictures = [[np.full((20, 30, 3), 10 * r + c + 1, np.uint8) for c in range(3)] for r in range(2)]
    found = image_grid(pictures, ['a', 'b', 'c'], gap=4)
    for r in range(2):
        for c in range(3):
            assert (found == 10 * r + c + 1).all(-1).sum() == 600
    assert found.shape == (26 + 2 * 24, 3 * 34 + 4, 3)
