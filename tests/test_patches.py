"""scripts/patches.py: reproducible, balanced, with the whole object of the class that they name."""

import hashlib
from collections import Counter

import numpy as np
import patches
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from patches import PATCH_CLASSES, PatchDataset, make_patch


def test_pixels_are_those_of_this_generator_version():
    """A change here needs another PATCH_VERSION."""
    assert patches.PATCH_VERSION == 1
    pixels = b''.join(make_patch(3, 'train', index, 48)[0].tobytes() for index in range(4))
    assert hashlib.sha256(pixels).hexdigest().startswith('3e444c7e3e5b')


def test_every_class_is_equally_frequent_and_splits_differ():
    labels = Counter(make_patch(0, 'train', index, 32)[1] for index in range(32))
    assert labels == dict.fromkeys(range(16), 2) and len(set(PATCH_CLASSES)) == 16
    assert not np.array_equal(make_patch(0, 'train', 0, 32)[0], make_patch(0, 'val', 0, 32)[0])
    assert not np.array_equal(make_patch(0, 'train', 0, 32)[0], make_patch(1, 'train', 0, 32)[0])


@pytest.mark.parametrize('side', [32, 33])
def test_a_patch_has_one_whole_object_with_shape_and_texture_of_its_class(monkeypatch, side):
    scenes, draw = [], patches.render_scene
    monkeypatch.setattr(patches, 'render_scene', lambda spec: scenes.append(draw(spec)) or scenes[-1])
    for index in range(16):
        image, label = make_patch(0, 'val', index, side)
        (item,) = scenes[-1].instances
        assert image.shape == (side, side, 3) and PATCH_CLASSES[label] == f'{item.spec.shape}_{item.spec.texture}'
        windows = sliding_window_view(scenes[-1].image, (side, side, 3))[:, :, 0]
        (y, x), *others = np.argwhere((windows == image).all((2, 3, 4))).tolist()
        left, top, right, bottom = item.box
        assert not others and x <= left and right <= x + side and y <= top and bottom <= y + side


def test_the_data_set_normalizes_all_patches_and_flips_those_for_training():
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    images, labels = zip(*(make_patch(0, 'val', index, 32) for index in range(3)), strict=True)
    expected = torch.tensor((np.stack(images) - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    val = PatchDataset(0, 'val', 3, 32)
    assert [label for _, label in (val[i] for i in range(len(val)))] == list(labels)
    torch.testing.assert_close(torch.stack([val[i][0] for i in range(3)]), expected)
    train = PatchDataset(0, 'train', 1, 32)
    seen = {tuple(train[0][0].flatten().tolist()) for _ in range(30)}
    assert len(seen) == 2 and tuple(train[0][0].flip(-1).flatten().tolist()) in seen
