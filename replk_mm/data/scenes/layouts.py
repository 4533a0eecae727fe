"""Layouts of procedural scenes on disk: those of ADE20K, COCO, Cityscapes and ImageNet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from replk_mm.data.files import IGNORE_INDEX
from replk_mm.data.scenes.render import Scene
from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE, GENERATOR_VERSION, SPLITS, THING_CLASSES

#: Content of ``meta.json``: classes, palette, seed, size, number of scenes, version of the generator.
Meta = dict[str, Any]
JPEG_QUALITY = 95
MAX_SCENES = 999_999
#: File in the data root that lists the objects, for kinds of scenes that have it.
LISTING = 'conflict.json'
#: trainIds of Cityscapes that stand for :data:`DEMO_CLASSES`: sky, terrain, road; car, person, bicycle, bus, truck.
CITYSCAPES_IDS: tuple[int, ...] = (10, 9, 0, 13, 11, 18, 15, 14)


@dataclass(frozen=True)
class Layout:
    """A layout of the files of a data set."""

    folders: Mapping[str, str]  #: folder of each split
    #: path of an image below the data root, with ``{folder}``, ``{name}`` (the class) and ``{stem}``. The suffix sets
    #: the format
    image: str
    label: str | None  #: path of a label map; None if the layout has none
    annotations: str | None  #: path of the COCO annotation file of a split; None if the layout has none
    values: tuple[int, ...]  #: pixel values of the label maps for the labels of a scene, 0 ("other") first
    meta: Mapping[str, Any]  #: entries of ``meta.json`` about the classes
    config: str  #: a config for this layout

    def files(self, split: str, stem: str, name: str = '') -> list[str]:
        """The files of one scene of class ``name``: its image and, if the layout has them, its label map."""
        paths = [self.image, *([self.label] if self.label else [])]
        return [path.format(folder=self.folders[split], stem=stem, name=name) for path in paths]

    def annotation_file(self, split: str) -> str | None:
        """The annotation file of a split; None if the layout has none."""
        return self.annotations and self.annotations.format(folder=self.folders[split])

    def pixels(self, scene: Scene) -> list[np.ndarray]:
        """Content of the files of a scene: RGB (H, W, 3) and, if the layout has them, labels (H, W), both uint8."""
        return [scene.image, *([np.array(self.values, np.uint8)[scene.label]] if self.label else [])]


class CocoAnnotations:
    """Collect the annotation file of a split, scene by scene. Masks are compressed RLE of the visible pixels.

    Args:
        split: 'train' or 'val', which share no image ids.
        seed: Seed of the scenes.
    """

    def __init__(self, split: str, seed: int) -> None:
        self._first = SPLITS.index(split) * (MAX_SCENES + 1) + 1
        self._info = dict(
            description='procedural scenes of replk_mm', version=str(GENERATOR_VERSION), seed=seed, split=split
        )
        self._images: list[dict] = []
        self._objects: list[dict] = []

    def add(self, index: int, name: str, scene: Scene) -> None:
        """Add scene ``index`` with the image file ``name``."""
        from pycocotools import mask  # other layouts do not need the COCO API

        height, width = scene.label.shape
        image = dict(id=self._first + index, file_name=name, height=height, width=width)
        self._images.append(image)
        for instance in scene.instances:
            x0, y0, x1, y1 = instance.box
            runs = mask.encode(np.asfortranarray(instance.mask, np.uint8))
            self._objects.append(
                dict(
                    id=len(self._objects) + 1,  # the COCO API reads 0 as unmatched
                    image_id=image['id'],
                    category_id=THING_CLASSES.index(DEMO_CLASSES[instance.label - 1]) + 1,
                    iscrowd=0,
                    area=int(instance.mask.sum()),
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    segmentation=dict(size=[height, width], counts=runs['counts'].decode('ascii')),
                )
            )

    def content(self) -> bytes:
        """The content of the file."""
        categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(THING_CLASSES, 1)]
        content = dict(info=self._info, licenses=[], images=self._images, annotations=self._objects)
        return (json.dumps(dict(**content, categories=categories)) + '\n').encode()


_classes = dict(classes=list(DEMO_CLASSES), palette=[list(colour) for colour in DEMO_PALETTE])
_things = [DEMO_CLASSES.index(name) for name in THING_CLASSES]

LAYOUTS: dict[str, Layout] = {
    'ade20k': Layout(
        folders=dict(train='training', val='validation', conflict='conflict'),
        image='images/{folder}/{stem}.jpg',
        label='annotations/{folder}/{stem}.png',
        annotations=None,
        values=tuple(range(len(DEMO_CLASSES) + 1)),
        meta=dict(**_classes, reduce_zero_label=True, jpeg_quality=JPEG_QUALITY),
        config='upernet_replk-nano_demo.py',
    ),
    'coco': Layout(
        folders=dict(train='train2017', val='val2017'),
        image='{folder}/{stem}.jpg',
        label=None,
        annotations='annotations/instances_{folder}.json',
        values=(),
        meta=dict(
            classes=list(THING_CLASSES), palette=[list(DEMO_PALETTE[i]) for i in _things], jpeg_quality=JPEG_QUALITY
        ),
        config='cascade-mask-rcnn_replk-nano_demo.py',
    ),
    # One city; the stem replaces city, sequence and frame.
    'cityscapes': Layout(
        folders=dict(train='train', val='val'),
        image='leftImg8bit/{folder}/demo/{stem}_leftImg8bit.png',
        label='gtFine/{folder}/demo/{stem}_gtFine_labelTrainIds.png',
        annotations=None,
        values=(IGNORE_INDEX, *CITYSCAPES_IDS),
        meta=dict(**_classes, train_ids=dict(zip(DEMO_CLASSES, CITYSCAPES_IDS, strict=True)), reduce_zero_label=False),
        config='upernet_replk-nano_cityscapes.py',
    ),
    'imagenet': Layout(
        folders=dict(train='train', val='val'),
        image='{folder}/{name}/{stem}.jpg',
        label=None,
        annotations=None,
        values=(),
        meta=dict(jpeg_quality=JPEG_QUALITY),
        config='replk-nano_shapes.py',
    ),
}


def scene_stem(split: str, index: int) -> str:
    """The file name of a scene, without suffix."""
    return f'demo_{split}_{index:06d}'
