"""Shared by the tests of configs: the files, their published rows, their models."""

import copy
import functools
from functools import cache
from pathlib import Path

import mmengine.config.utils
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
# Segmentors and detectors without the configs for generated scenes; classifiers of ImageNet.
LEAVES = sorted(
    p.name
    for p in CONFIGS.glob('*.py')
    if not p.stem.endswith(('_demo', '_context', '_shapes')) and '_imagenet' not in p.stem
)
CLASSIFIERS = sorted(p.name for p in CONFIGS.glob('*_imagenet*.py'))
NANO = [name for name in LEAVES if '-nano_' in name]

# The published rows by name of their config, read without the package's reader.
PUBLISHED = yaml.safe_load((ROOT / 'replk_mm' / 'published.yaml').read_text())
ROWS = {row['config']: row for task in ('segmentation', 'detection') for row in PUBLISHED[task] if row.get('config')}

# mmengine reads all metafiles of a package for each base file of a config, which takes a second per config.
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)


@cache
def load(name: str) -> Config:
    """Load a config; do not change the result."""
    return Config.fromfile(CONFIGS / name)


def build(cfg: Config, device: str = 'meta') -> torch.nn.Module:
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry, torch.device(device):
        return registry.build(copy.deepcopy(cfg.model))


@cache
def meta_model(name: str) -> torch.nn.Module:
    return build(load(name))


def params_m(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def dataset_of(name: str) -> str:
    """``'ade20k'``, ``'cityscapes'`` or ``'coco'``."""
    return Path(name).stem.rpartition('_')[2].partition('-')[0]


def batch(cfg, classes: int) -> dict:
    """A batch of a data loader: two images of 64x64 with labels."""
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64), scale_factor=(1.0, 1.0))
    if cfg.default_scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [
            SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, classes, (1, 64, 64))), metainfo=meta)
            for _ in images
        ]
        return dict(inputs=images, data_samples=samples)
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 62.0, 60.0]])
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 4:40, 4:30] = masks[1, 10:60, 20:62] = 1
    found = dict(bboxes=boxes, labels=torch.tensor([0, classes - 1]), masks=BitmapMasks(masks, 64, 64))
    return dict(
        inputs=images,
        data_samples=[
            DetDataSample(
                gt_instances=InstanceData(**found),
                ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)),
                metainfo=dict(meta, batch_input_shape=(64, 64)),
            )
            for _ in images
        ],
    )
