"""The published data sets: how many images they have, and the release of ADE20K that is not the benchmark's."""
from collections.abc import Mapping
from pathlib import Path

from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import dataset_class
from replk_mm.data.problems import Problem

#: Images of the splits by package and type (Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017; Cordts et al., The
#: Cityscapes Dataset, CVPR 2016; COCO 2017, https://cocodataset.org). What configs test on is one of several: not compared.
COUNTS = {('mmseg', 'ADE20KDataset'): dict(train=20_210, val=2_000),
          ('mmseg', 'CityscapesDataset'): dict(train=2_975, val=500),
          ('mmdet', 'CocoDataset'): dict(train=118_287, val=5_000),
          ('replk_mm', 'CocoDataset'): dict(train=118_287, val=5_000)}
_ADE = 'ADE20KDataset'
# What the full release has and the benchmark has not.
_INDEXES = ('index_ade20k.mat', 'index_ade20k.pkl')
_FOLDERS = ('images/ADE', 'ADE20K_*/images/ADE', 'ADE20K_*/images/training')
_LABELS = ('ADE_*_seg.png', 'ADE_*_parts_1.png', 'ADE_*_atr.txt')
# Of its folders of scenes enough to find a label map: the first letter, the scene, the file.
_DEPTHS = ('', '*/', '*/*/')


def count_differs(dataset: dict, scope: str, split: str, images: int) -> list[Problem]:
    """A note if a published data set has not the number of images it is published with.

    Args:
        dataset: Config of a data set. Classes other than its type's mean data of one's own.
        scope: Default scope of the config.
        split: ``'train'``, ``'val'`` or ``'test'``.
        images: How many it has.
    """
    builder = dataset_class(dataset, scope)
    wanted = COUNTS.get((builder.__module__.partition('.')[0], builder.__name__), {}).get(split)
    own = getattr(builder, 'METAINFO', {}).get('classes')
    if wanted in (None, images) or list(classes_of(dataset, scope) or ()) != list(own or ()):
        return []
    return [Problem('count-differs', str(dataset.get('data_root')), f'{images:,} images of the {split} data set',
                    f'{wanted:,}, as {dataset["type"]} is published')]


def wrong_ade(root: Path, prefix: Mapping[str, str], kind: str) -> list[Problem]:
    """Whether a data root holds ADE20K's full release, in which no label map of the benchmark is.

    Args:
        root: The data root.
        prefix: Folders of images and label maps in it.
        kind: Type of the data set. Others than ADE20K's may have folders of such names too.
    """
    if prefix.get('seg_map_path') is None or (root / prefix['seg_map_path']).is_dir():
        return []
    found = [root / name for name in _INDEXES if (root / name).is_file()]
    if kind.endswith(_ADE):
        found += sorted(p for place in _FOLDERS for p in root.glob(place))
    folder = root / (prefix.get('img_path') or 'images')
    for depth in _DEPTHS:
        for pattern in _LABELS:
            found += [] if found else [p for _, p in zip(range(1), folder.glob(depth + pattern), strict=False)]
    return [Problem('ade-full-release', str(root), f'the full release of ADE20K, not the benchmark: it has {found[0]}')
            ] if found else []
