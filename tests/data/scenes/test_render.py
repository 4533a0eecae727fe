"""Demo scenes: the same pixels everywhere, and classes that only shape and distant context reveal."""

from dataclasses import replace

import numpy as np
import pytest
from scene_cases import accuracy, digest

from replk_mm.data.scenes.render import make_scene, render_scene
from replk_mm.data.scenes.spec import CUE_DISTANCE, DEMO_CLASSES, SHAPES, TEXTURES, describe_scene

SIZE = (128, 128)


@pytest.fixture(scope='module')
def scenes():
    return [make_scene(0, 'val', index, SIZE) for index in range(100)]


def test_pixels_are_those_of_this_generator_version():
    # From the first run of version 1. If this fails, the scenes of old seeds changed: increase GENERATOR_VERSION.
    assert digest(make_scene(0, 'train', 0))[:16] == '60fcc694c2fd0d00'
    assert digest(make_scene(3, 'val', 11, (128, 192)))[:16] == '51a7b14ae0c197f0'


def test_seeds_and_splits_share_no_scene():
    keys = [(seed, split, index) for seed in (0, 1, 2**40) for split in ('train', 'val') for index in range(10)]
    assert len({digest(make_scene(*key, (64, 64))) for key in keys}) == len(keys)


@pytest.mark.parametrize('size', [(256, 256), (64, 64), (96, 192), (160, 80)])
def test_size_and_label_range(size):
    for index in range(4):
        scene = make_scene(1, 'train', index, size)
        assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
        assert scene.label.shape == size and scene.label.dtype == np.uint8
        assert scene.label.max() <= len(DEMO_CLASSES)


def test_every_class_is_in_at_least_40_percent_of_scenes(scenes):
    present = np.array([np.bincount(s.label.ravel(), minlength=len(DEMO_CLASSES) + 1) > 0 for s in scenes]).mean(0)
    assert present[1:].min() >= 0.4, dict(zip(DEMO_CLASSES, present[1:], strict=True))


def test_instances_agree_with_the_label_map(scenes):
    for scene in scenes[:50]:
        covered = np.zeros(scene.label.shape, int)
        for item in scene.instances:
            rows, columns = np.nonzero(item.mask)
            assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert (scene.label[item.mask] == item.label).all()
            assert item.mask.sum() == pytest.approx(item.spec.side**2, rel=0.1)  # whatever the shape
            covered += item.mask
        assert covered.max() <= 1
        assert ((covered == 1) == (scene.label > DEMO_CLASSES.index('water') + 1)).all()


def object_features(scene, item) -> list[np.ndarray]:
    """Colour histogram (4x4x4), mean and spread of colour, and local contrast of the object's pixels."""
    pixels = scene.image[item.mask].astype(int)
    histogram = np.bincount((pixels // 64) @ (16, 4, 1), minlength=64) / len(pixels)
    steps = np.abs(np.diff(scene.image.astype(int).sum(2), axis=1))[(item.mask[:, 1:] & item.mask[:, :-1])]
    colour = np.concatenate([pixels.mean(0), pixels.std(0)])
    return [histogram, colour, np.array([steps.mean(), steps.std()])]


def test_colour_and_texture_do_not_reveal_the_shape():
    """Classifiers on an object's pixels, without their positions, stay near the 1/3 of guessing."""
    training = [make_scene(5, 'train', index, SIZE) for index in range(400)]
    items = [(scene, item) for scene in training for item in scene.instances if item.spec.shape in SHAPES]
    target = np.array([SHAPES.index(item.spec.shape) for _, item in items])
    for features in zip(*(object_features(*pair) for pair in items), strict=True):
        # About 550 test objects: the standard deviation of guessing is 0.02.
        assert accuracy(np.array(features), target) < 1 / 3 + 0.08


def test_shape_reveals_the_class(scenes):
    """The share of the circumcircle that an object fills, which only depends on the shape, separates all four."""
    for scene in scenes[:50]:
        for item in scene.instances:
            rows, columns = np.nonzero(item.mask)
            reach = np.hypot(rows - rows.mean(), columns - columns.mean()).max()
            filled = item.mask.sum() / (np.pi * reach**2)
            expected = {'disc': 1.0, 'square': 0.64, 'star': 0.47, 'triangle': 0.41}[item.spec.shape]
            assert filled == pytest.approx(expected, abs=0.1)


def test_flipped_cue_changes_only_the_beacon_and_the_class_of_triangles(scenes):
    for scene in scenes[:20]:
        cue = scene.spec.cue
        other = render_scene(replace(scene.spec, cue=replace(cue, orientation='v' if cue.orientation == 'h' else 'h')))
        x0, y0, x1, y1 = cue.box
        outside = np.ones(scene.label.shape, bool)
        outside[y0:y1, x0:x1] = False
        assert (scene.image[outside] == other.image[outside]).all()
        assert (scene.image[~outside] != other.image[~outside]).any()
        triangles = np.any([item.mask for item in scene.instances if item.spec.shape == 'triangle'], axis=0)
        assert triangles.any() and ((scene.label != other.label) == triangles).all()
        pair = {DEMO_CLASSES.index(f'triangle_{o}') + 1 for o in 'hv'}
        assert {*scene.label[triangles], *other.label[triangles]} == pair


def test_cue_is_far_from_every_triangle(scenes):
    assert CUE_DISTANCE == 0.4
    for scene in scenes:
        for item in scene.instances:
            if item.spec.shape == 'triangle':
                assert item.box[1] - scene.spec.cue.box[3] >= 0.4 * SIZE[0] - 1


def test_exchanged_texture_changes_nothing_else():
    spec = describe_scene(0, 'train', 2, SIZE)
    first = spec.objects[0]
    scene = render_scene(spec)
    for texture in set(TEXTURES) - {first.texture}:
        variant = render_scene(replace(spec, objects=(replace(first, texture=texture), *spec.objects[1:])))
        changed = (variant.image != scene.image).any(2)
        x0, y0, x1, y1 = scene.instances[0].box
        assert (variant.label == scene.label).all() and changed.any()
        changed[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = False
        assert not changed.any()


def test_occluded_object_keeps_its_visible_pixels():
    spec = next(s for s in (describe_scene(0, 'train', i) for i in range(20)) if len(s.objects) >= 3)
    back, front = replace(spec.objects[0], shape='square', angle=0), replace(spec.objects[1], shape='disc')
    front = replace(front, x=back.x + back.side // 2, y=back.y, side=back.side)
    hidden = replace(front, shape='star', side=front.side // 3)
    scene = render_scene(replace(spec, objects=(back, hidden, front)))
    assert [DEMO_CLASSES[item.label - 1] for item in scene.instances] == ['square', 'disc']
    alone = render_scene(replace(spec, objects=(back,))).instances[0].mask
    first, last = (item.mask for item in scene.instances)
    assert not (first & last).any() and (alone & last).any()
    assert (first == (alone & ~last)).all() and first.sum() < alone.sum()
    assert (scene.label[first] == scene.instances[0].label).all()
    assert (scene.label[last] == scene.instances[1].label).all()
    rows, columns = np.nonzero(first)
    assert scene.instances[0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_beacon_occludes_objects():
    spec = describe_scene(0, 'train', 1)
    x0, y0, x1, y1 = spec.cue.box
    item = replace(spec.objects[0], shape='disc', x=x1, y=y1, side=y1 - y0)
    scene = render_scene(replace(spec, objects=(item,)))
    assert not scene.instances[0].mask[y0:y1, x0:x1].any() and scene.instances[0].mask.sum() < 0.8 * item.side**2
    assert (scene.instances[0].mask == (scene.label == scene.instances[0].label)).all()
