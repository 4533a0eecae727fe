"""Small COCO-style data sets of noise, for tests to damage."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

#: Width and height of the images, pixels.
SIZE = (80, 64)


def coco_dict(names: Sequence[str], images: int = 4, per_image: int = 3) -> dict:
    """Annotations of ``images`` images; every category occurs, the first in the first image."""
    width, height = SIZE
    objects = []
    for i in range(images):
        for k in range(per_image):
            x, y, w, h = 4 + 20 * k, 6 + 4 * i, 16, 12
            objects.append(
                dict(
                    id=len(objects) + 1,
                    image_id=i + 1,
                    category_id=10 * (len(objects) % len(names)) + 5,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )
    entries = [dict(id=i + 1, file_name=f'{i:03}.jpg', width=width, height=height) for i in range(images)]
    return dict(
        info={},
        images=entries,
        annotations=objects,
        categories=[dict(id=10 * i + 5, name=name) for i, name in enumerate(names)],
    )


def write_images(folder: Path, images: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        noise = np.random.default_rng(i).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(noise).save(folder / f'{i:03}.jpg')


def write_coco_root(root: Path, train: Sequence[str], val: Sequence[str] | None = None) -> Path:
    """A data root in COCO's layout: folders, images, annotation files with these categories."""
    (root / 'annotations').mkdir(parents=True)
    for split, names in (('train2017', train), ('val2017', val or train)):
        write_images(root / split)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco_dict(names)))
    return root


def change(path: Path, how: Callable[[dict], object]) -> None:
    """Rewrite an annotation file after ``how`` has changed its content."""
    data = json.loads(path.read_text())
    how(data)
    path.write_text(json.dumps(data))


def leaf(root: Path, split: str = 'train', masks: bool = False, **changes) -> dict:
    """Config of a data set in such a root."""
    return (
        dict(
            type='CocoDataset',
            data_root=str(root),
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'),
            filter_cfg=dict(filter_empty_gt=True),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=masks)],
        )
        | changes
    )
