"""The published data sets: how many images they have, and the release of ADE20K that is not the benchmark's."""
from collections.abc import Mapping
from pathlib import Path

from replk_mm.data.problems import Problem

#: Images of training and validation (Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017; Cordts et al., The
#: Cityscapes Dataset, CVPR 2016; COCO 2017, https://cocodataset.org).
COUNTS = {'ADE20KDataset': (20_210, 2_000), 'CityscapesDataset': (2_975, 500), 'CocoDataset': (118_287, 5_000)}
# What the full release has and the benchmark has not.
_INDEXES = ('index_ade20k.mat', 'index_ade20k.pkl')
_LABELS = ('*_seg.png', '*_parts_1.png', '*_atr.txt')
# Of its folders of scenes enough to find a label map: the first letter, the scene, the file.
_DEPTHS = ('', '*/', '*/*/')


def count_differs(dataset: dict, names: tuple[str, ...] | None, own: tuple[str, ...] | None, split: str,
                  images: int) -> list[Problem]:
    """A note if a published data set has not the number of images it is published with.

    Args:
        dataset: Config of a data set.
        names: Its classes; others than the type's mean data of one's own.
        own: The classes of its type.
        split: ``'train'``, ``'val'`` or ``'test'``; the published ones are tested on their validation images.
        images: How many it has.
    """
    counts = COUNTS.get(str(dataset['type']).rpartition('.')[2])
    if not counts or not own or list(names or ()) != list(own):
        return []
    wanted = counts[split != 'train']
    return [] if images == wanted else [Problem(
        'count-differs', str(dataset.get('data_root')), f'{images:,} images of the {split} data set', f'{wanted:,}, as '
        f'{dataset["type"]} is published')]


def wrong_ade(root: Path, prefix: Mapping[str, str]) -> list[Problem]:
    """Whether a data root holds ADE20K's full release, in which no label map of the benchmark is."""
    if 'seg_map_path' not in prefix or (root / prefix['seg_map_path']).is_dir():
        return []
    found = [root / name for name in _INDEXES if (root / name).is_file()]
    found += sorted(p for place in ('images/ADE', 'ADE20K_*/images/ADE', 'ADE20K_*/images/training') for p in root.glob(place))
    folder = root / prefix.get('img_path', 'images')
    for depth in _DEPTHS:
        for pattern in _LABELS:
            found += [] if found else [p for _, p in zip(range(1), folder.glob(depth + pattern), strict=False)]
    return [Problem('ade-full-release', str(root), f'the full release of ADE20K, not the benchmark: it has {found[0]}')
            ] if found else []
