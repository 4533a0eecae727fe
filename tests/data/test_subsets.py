"""Nested, stratified fractions of training images, and hold-outs, against brute force and label files read by hand."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_data, tiny  # noqa: F401
from tiny_detector import CLASSES, COCO_CLASSES, detector, write_coco  # noqa: F401

from replk_mm.data.subsets import FRACTIONS, class_presence, nested_subsets, use_subset
from replk_mm.engine.config import set_data_root
from replk_mm.errors import UserError


def images(count: int, rates, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, len(rates))) < np.array(rates)


def imbalance(presence: np.ndarray, chosen) -> float:
    """Sum over the classes of how far their images are from their share."""
    share = len(chosen) / len(presence)
    return float(np.abs(presence[list(chosen)].sum(0) - share * presence.sum(0)).sum())


@pytest.mark.parametrize('rates', [(0.9, 0.5, 0.2, 0.02, 0.004), (0.01,) * 30, (1.0, 1.0), ()])
@pytest.mark.parametrize('count', [1, 7, 400])
@pytest.mark.parametrize('seed', [0, 1])
def test_subsets_are_nested_of_exact_size_and_have_every_class(rates, count, seed):
    presence = images(count, rates, seed)
    subsets = [set(map(int, part)) for part in nested_subsets(presence, FRACTIONS, seed)]
    assert all(small <= large for small, large in itertools.pairwise(subsets))
    assert subsets[-1] == set(range(count))
    for part, percent in zip(subsets, FRACTIONS, strict=True):
        assert len(part) >= math.ceil(count * percent / 100)
        assert (presence[list(part)].any(0) == presence.any(0)).all()
    least = len(subsets[0])  # more than 1 % only where the classes need more images
    assert least == math.ceil(count / 100) or least <= presence.any(0).sum()
    assert [len(part) for part in subsets[1:]] == [max(least, math.ceil(count * p / 100)) for p in FRACTIONS[1:]]


def test_classes_keep_their_share():
    """Better than five in six of all possible subsets, and nine in ten random ones of a larger set."""
    for seed in range(5):
        presence = images(16, (0.7, 0.5, 0.4, 0.3), seed)
        [part, _] = nested_subsets(presence, (25, 100), seed)
        assert len(part) == 4 and presence.any(0).all()
        possible = sorted(imbalance(presence, p) for p in itertools.combinations(range(16), 4))
        assert imbalance(presence, part) <= possible[len(possible) // 6]
        presence = images(300, (0.9, 0.5, 0.3, 0.1, 0.05, 0.05), seed)
        rng = np.random.default_rng(seed)
        for part in nested_subsets(presence, FRACTIONS, seed)[2:4]:
            random = [imbalance(presence, rng.choice(300, len(part), replace=False)) for _ in range(300)]
            assert imbalance(presence, part) < np.quantile(random, 0.1)


def test_the_seed_chooses():
    presence = images(200, (0.5, 0.3))
    first, again, other = (nested_subsets(presence, FRACTIONS, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again != other


def labels_of(root: Path, name: str) -> set[int]:
    """Classes in a label file, which holds class i as i + 1."""
    label = Path(root, 'annotations', 'training', Path(name).with_suffix('.png').name)
    return {int(i) - 1 for i in np.unique(np.array(Image.open(label))) if i}


def test_label_maps_and_annotations_are_read(tiny, detector, tmp_path):  # noqa: F811
    cfg = tiny.cfg()
    set_data_root(cfg, str(tiny.data))
    presence, names = class_presence(cfg.train_dataloader.dataset, 'mmseg')
    assert len(names) == 4 and all(
        set(np.flatnonzero(p)) == labels_of(tiny.data, n) for p, n in zip(presence, names, strict=True)
    )

    cfg = detector.cfg()
    set_data_root(cfg, str(write_coco(tmp_path / 'coco', train=6)))
    presence, names = class_presence(cfg.train_dataloader.dataset, 'mmdet')
    for found, name in zip(presence, names, strict=True):  # class k is drawn in channel k
        picture = np.array(Image.open(tmp_path / 'coco' / name)).reshape(-1, 3)
        drawn = [one for k, one in enumerate(CLASSES) if (picture[:, k] == 220).any()]
        assert {COCO_CLASSES[i] for i in np.flatnonzero(found)} == set(drawn)


def test_a_fraction_and_a_hold_out_of_a_config(tiny, tmp_path):  # noqa: F811
    def config():
        cfg = tiny.cfg()
        set_data_root(cfg, str(make_data(tmp_path / 'data', train=20) if not (tmp_path / 'data').exists() else data))
        return cfg

    data = tmp_path / 'data'
    cfg, held = config(), config()
    assert 'training images: 5 of 20 (25 %, seed 1)' in use_subset(cfg, 25, 1)[0]
    use_subset(held, 25, 1, hold_out=True)
    chosen = cfg.train_dataloader.dataset.indices
    train, val = held.train_dataloader.dataset, held.val_dataloader.dataset
    assert sorted([*train.indices, *val.indices]) == chosen and (len(train.indices), len(val.indices)) == (4, 1)
    assert val.data_prefix == train.data_prefix != config().val_dataloader.dataset.data_prefix
    assert val.pipeline == config().val_dataloader.dataset.pipeline
    assert held.test_dataloader == config().test_dataloader and cfg.val_dataloader == config().val_dataloader
    whole = config()
    use_subset(whole, 100, 5)
    kinds = [c.training_images.datasets[0] for c in (cfg, held, whole)]
    assert len({kind.names_sha256 for kind in kinds}) == 3 and [kind.images for kind in kinds] == [5, 4, 20]
    with pytest.raises(UserError, match='train_dataloader.dataset.indices: selects images already'):
        use_subset(cfg, 25, 1)


def test_an_unreadable_label_map_is_named(tiny, tmp_path):  # noqa: F811
    cfg = tiny.cfg()
    set_data_root(cfg, str(make_data(tmp_path / 'data')))
    next((tmp_path / 'data/annotations/training').iterdir()).write_bytes(b'')
    with pytest.raises(UserError, match=r'annotations/training/.*\.png: '):
        use_subset(cfg, 25, 0)
