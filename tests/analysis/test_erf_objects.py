"""Objects of label maps by hand; receptive fields at their centers by gradients of the backbone."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny, trained  # noqa: F401 (fixtures)

from replk_mm.analysis import erf_objects
from replk_mm.analysis.erf_objects import find_objects, measure_objects
from replk_mm.engine.predict import load_for_prediction

# ruff: noqa: F811 (fixtures that come from another file)


def test_objects_of_a_label_map_by_hand():
    """Two squares and a ring of class 1; a prediction that touches the first, and one that joins it with the second."""
    labels = np.zeros((60, 60), np.uint8)
    labels[5:15, 5:15] = labels[5:15, 20:31] = 1
    labels[30:51, 30:51] = 2
    labels[35:46, 35:46] = 255
    labels[0:5, 0:5] = 2  # too small
    predicted = labels.copy()
    predicted[5:15, 5:10] = 0  # half of the first
    predicted[5:15, 15:20] = 1  # joins both
    predicted[55:60, 0:60] = 1  # touches neither
    predicted[36:46, 35:46] = 2  # without a label
    found = {(o['label'], o['area']): o for o in find_objects(labels, predicted)}
    assert found.keys() == {(0, 60 * 60 - 25 - 210 - 441), (1, 100), (1, 110), (2, 441 - 121)}
    # Intersection 50; union the square and the bridge, without the other square.
    assert found[1, 100]['iou'] == pytest.approx(50 / 150) and found[1, 110]['iou'] == pytest.approx(110 / 160)
    assert tuple(found[1, 110]['center']) in {(r, c) for r in (9, 10) for c in range(24, 27)}
    assert found[2, 320]['iou'] == 1
    row, column = found[2, 320]['center']
    assert labels[row, column] == 2, 'the center of a ring is in the ring'
    assert min(abs(row - 40), abs(column - 40)) <= 10 and max(abs(row - 40), abs(column - 40)) == 8


def test_receptive_fields_at_objects(tiny, trained, tmp_path):
    rows = measure_objects(tiny.cfg(), str(trained), tiny.options(tmp_path), 2, tmp_path)
    assert rows == json.loads((tmp_path / 'objects.json').read_text())['rows']
    sizes = [row for row in rows if row['name'].endswith(' objects')]
    classes = [row for row in rows if row not in sizes]
    assert sum(row['objects'] for row in classes) == sum(row['objects'] for row in sizes) > 2
    assert all(0 <= row['iou'] <= 100 and row['side'] > 0 for row in rows)


def test_side_is_measured_around_the_object(tiny, trained, tmp_path, monkeypatch):
    """With one object, its side is that of the gradient of its position of the map, by brute force."""
    place = np.array([10, 50])
    only = [dict(label=0, area=1000, center=place, iou=0.5)]
    monkeypatch.setattr(erf_objects, 'find_objects', lambda labels, predicted: only)
    inputs = []
    monkeypatch.setattr(
        erf_objects,
        'contributions',
        lambda network, image, *rest: inputs.append(image) or contributions(network, image, *rest),
    )
    row, size = measure_objects(tiny.cfg(), str(trained), tiny.options(tmp_path), 1, tmp_path)
    assert (row['objects'], row['images'], row['low'], size['name'], size['iou']) == (1, 1, None, 'small objects', 50)
    backbone = load_for_prediction(tiny.cfg(), str(trained), 'cpu').backbone
    image = inputs[0].clone().requires_grad_()
    feature = backbone(image)[-1]
    side = feature.shape[2]
    at = (place + 0.5) * side / 64
    gradient = (
        torch.autograd.grad(feature[0, :, int(at[0]), int(at[1])].relu().sum(), image)[0].double().relu()[0].sum(0)
    )
    total = gradient.sum()
    held = [(gradient[max(0, 10 - r) : 11 + r, max(0, 50 - r) : 51 + r].sum() / total).item() for r in range(64)]
    ring = next(r for r, share in enumerate(held) if share >= 0.5)
    assert 2 * ring - 1 <= row['side'] <= 2 * ring + 1


contributions = erf_objects.contributions
