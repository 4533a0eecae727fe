"""Write a data set of many small, all different images with label maps, in ADE20K's layout: ``many_pairs.py DIR [COUNT]``."""
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

#: Height and width, pixels.
SIZE = (64, 64)


def write(root: Path, split: str, count: int, classes: int = 8, size: tuple[int, int] = SIZE) -> None:
    """Write ``count`` pairs: an image of few colours, a label map of blocks; both are noise, and never the same twice."""
    images, labels = root / 'images' / split, root / 'annotations' / split
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(split))
    side = 8
    for i in range(count):
        coarse = rng.integers(0, 256, (size[0] // side, size[1] // side, 3), np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR).save(images / f'{split}_{i:06d}.jpg')
        ids = rng.integers(0, classes + 1, coarse.shape[:2], np.uint8)
        Image.fromarray(ids.repeat(side, 0).repeat(side, 1)).save(labels / f'{split}_{i:06d}.png')


@pytest.fixture
def data(tmp_path) -> Path:
    """Six pairs to train with, three to validate on."""
    write(tmp_path / 'data', 'training', 6)
    write(tmp_path / 'data', 'validation', 3)
    return tmp_path / 'data'


if __name__ == '__main__':
    target, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    shape = (int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 4 else SIZE
    write(target, 'training', number, size=shape)
    write(target, 'validation', max(1, number // 10), size=shape)
