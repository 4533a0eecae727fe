"""Scenes in which only a distant cue reveals the class of an object."""

import hashlib

import numpy as np
import pytest

from replk_mm.data.scenes.context import CONTEXT_CLASSES, CUE, FARTHEST, LANE, NEAREST, OBJECT, make_context_scene

SIZE = (96, 96)


@pytest.fixture(scope='module')
def scenes():
    return [make_context_scene(0, 'train', i) for i in range(150)]


def test_pixels_are_the_same_everywhere():
    """Integers only: the same bytes on every machine. If this fails, increase CONTEXT_VERSION."""
    digest = hashlib.sha256()
    for split in ('train', 'val'):
        for index in range(3):
            scene = make_context_scene(3, split, index)
            digest.update(scene.image.tobytes() + scene.label.tobytes())
    assert digest.hexdigest() == 'ab62aa9b5f82bfd0754b08ef1ea365acc032ef328a7c066e7bfc533ae36bfe0d'


def test_seeds_splits_and_indices_give_different_scenes():
    first = make_context_scene(0, 'train', 0).image
    for other in ((1, 'train', 0), (0, 'val', 0), (0, 'train', 1)):
        assert not np.array_equal(first, make_context_scene(*other).image)
    assert np.array_equal(first, make_context_scene(0, 'train', 0).image)


@pytest.mark.parametrize('size', [(96, 96), (64, 128), (192, 96)])
def test_size_and_lanes(size):
    scene = make_context_scene(0, 'val', 5, size)
    assert scene.image.shape == (*size, 3) and scene.label.shape == size
    assert len(scene.lanes) == size[0] // LANE
    assert set(np.unique(scene.label)) <= set(range(1, len(CONTEXT_CLASSES) + 1))


def test_cue_of_the_lane_decides_the_class(scenes):
    """From the pixels alone: the colour of the square in the rows of a disc."""
    for scene in scenes:
        for number in range(SIZE[0] // LANE):
            rows = slice(number * LANE, (number + 1) * LANE)
            label, image = scene.label[rows], scene.image[rows].astype(int)
            disc, square = label >= OBJECT, (label >= CUE) & (label < OBJECT)
            red = image[square][:, 0].mean() > image[square][:, 2].mean()
            assert set(np.unique(label[disc])) == {OBJECT + (0 if red else 1)}


def test_cue_is_distant(scenes):
    """The centres of disc and cue are as far apart as documented."""
    least, most = (SIZE[1] * part // whole for part, whole in (NEAREST, FARTHEST))
    for scene in scenes:
        for number in range(SIZE[0] // LANE):
            label = scene.label[number * LANE : (number + 1) * LANE]
            at = [np.flatnonzero(((label >= low) & (label < low + 2)).any(0)).mean() for low in (OBJECT, CUE)]
            assert least <= abs(at[0] - at[1]) <= most


def test_nothing_else_reveals_the_class(scenes):
    """Both classes have the same frequency, area and brightness; neighbouring lanes are independent."""
    lanes = [lane for scene in scenes for lane in scene.lanes]
    kinds = np.array([lane.kind for lane in lanes])
    assert abs(kinds.mean() - 0.5) < 4 * 0.5 / len(kinds) ** 0.5
    colours = np.array([lane.object_colour for lane in lanes])
    error = colours.std(0) * (4 / len(kinds)) ** 0.5
    assert (abs(colours[kinds == 0].mean(0) - colours[kinds == 1].mean(0)) < 4 * error).all()
    areas = [sum((scene.label == OBJECT + kind).sum() for scene in scenes) / (kinds == kind).sum() for kind in (0, 1)]
    assert areas[0] == areas[1]
    majority = [max(k := sum(lane.kind for lane in scene.lanes), 4 - k) / 4 for scene in scenes]
    # The accuracy of a guess from the most frequent cue of the scene.
    assert abs(np.mean(majority) - 11 / 16) < 4 * np.std(majority) / len(scenes) ** 0.5
    pairs = np.array([[scene.lanes[0].kind, scene.lanes[1].kind] for scene in scenes])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / len(pairs) ** 0.5
