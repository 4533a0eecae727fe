"""Small data sets in ADE20K's layout, their config, and the findings of the checks."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from replk_mm.data.checks.audit import Audit, audit

PREFIX = {
    'train': dict(img_path='images/training', seg_map_path='annotations/training'),
    'val': dict(img_path='images/validation', seg_map_path='annotations/validation'),
}
NAMES = tuple('abcdefgh')


def write_pairs(root: Path, split: str, count: int, size: tuple[int, int] = (64, 64)) -> None:
    """Write ``count`` images of noise with label maps of all ids 0..8, no two the same; ``size`` is (height, width)."""
    rng = np.random.default_rng(len(split))
    for folder in PREFIX[split].values():
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR).save(image(root, i, split))
        ids = rng.permutation(np.resize(np.arange(9, dtype=np.uint8), coarse[..., 0].size)).reshape(coarse.shape[:2])
        Image.fromarray(ids.repeat(8, 0).repeat(8, 1)).save(label(root, i, split))


def image(root: Path, i: int, split: str = 'train') -> Path:
    return root / PREFIX[split]['img_path'] / f'{split}_{i:06d}.jpg'


def label(root: Path, i: int, split: str = 'train') -> Path:
    return root / PREFIX[split]['seg_map_path'] / f'{split}_{i:06d}.png'


@pytest.fixture
def data(tmp_path) -> Path:
    """Six pairs to train on, three to validate on."""
    write_pairs(tmp_path / 'data', 'train', 6)
    write_pairs(tmp_path / 'data', 'val', 3)
    return tmp_path / 'data'


def seg_config(root: Path, classes: int = 8, splits: tuple[str, ...] = ('train', 'val'), **changes) -> Config:
    """A segmentor's config with the data sets of a root in ADE20K's layout."""
    loaders = {}
    for split in splits:
        dataset = (
            dict(
                type='BaseSegDataset',
                reduce_zero_label=True,
                data_root=str(root),
                data_prefix=dict(PREFIX[split]),
                metainfo=dict(classes=NAMES[:classes]),
                pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
            )
            | changes
        )
        loaders[f'{split}_dataloader'] = dict(dataset={k: v for k, v in dataset.items() if v is not None})
    model = dict(decode_head=dict(type='FCNHead', num_classes=classes))
    return Config(dict(default_scope='mmseg', model=model, **loaders), cfg_text=' ', filename='own.py')


def full(cfg: Config, jobs: int = 1) -> Audit:
    return audit(cfg, full=True, jobs=jobs)


def found(result: Audit) -> set[tuple[str, str]]:
    """The code, and the entry or else the file, of every occurrence."""
    return {(finding.code, o.entry or o.path) for _, finding in result.findings() for o in finding.occurrences}


def codes(result: Audit, *severities: str) -> set[str]:
    return {finding.code for _, finding in result.findings() if not severities or finding.severity in severities}
