"""The layouts of demo scenes on disk (those of ADE20K, COCO and Cityscapes, for whose configs they are valid data),
and what a kind of scenes is."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from replk_mm.data.files import IGNORE_INDEX
from replk_mm.data.scenes.render import Scene
from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE, GENERATOR_VERSION, SPLITS, THING_CLASSES

JPEG_QUALITY = 95
MAX_SCENES = 999_999
#: File below the data root that lists the objects of a kind of scenes, where it has one.
LISTING = 'conflict.json'
#: Cityscapes' trainId that takes the place of each class, in the order of :data:`DEMO_CLASSES`: sky, terrain and road
#: for the regions, then objects that Cityscapes counts too: car, person, bicycle, bus and truck. What is not scored is
#: 255.
CITYSCAPES_IDS: tuple[int, ...] = (10, 9, 0, 13, 11, 18, 15, 14)


@dataclass(frozen=True)
class Layout:
    """A layout: where a scene's files lie, below the data root, and what they hold.

    Attributes:
        folders: What the layout calls the splits: 'train', 'val' and what else a kind of scenes has.
        image: Path of an image with ``{folder}`` and ``{stem}``; its suffix says whether it is JPEG or PNG.
        label: Path of a label map, likewise; None if the layout has none.
        annotations: Path of the COCO annotation file of a split with ``{folder}``; None if the layout has none.
        values: What a label map holds for the labels of a scene, 0 ("other") first.
        meta: What ``meta.json`` says of the classes.
        advice: What a config needs to train on it; ``{classes}`` stands for their number.
    """

    folders: Mapping[str, str]
    image: str
    label: str | None
    annotations: str | None
    values: tuple[int, ...]
    meta: Mapping[str, Any]
    advice: str

    def files(self, split: str, stem: str) -> list[str]:
        """The files of one scene: its image and, if the layout has them, its label map."""
        paths = [self.image, *([self.label] if self.label else [])]
        return [path.format(folder=self.folders[split], stem=stem) for path in paths]

    def annotation_file(self, split: str) -> str | None:
        """The annotation file of a split, if the layout has one."""
        return self.annotations and self.annotations.format(folder=self.folders[split])

    def pixels(self, scene: Scene) -> list[np.ndarray]:
        """What the scene's files hold: (H, W, 3) RGB and, if the layout has them, labels (H, W), both uint8."""
        return [scene.image, *([np.array(self.values, np.uint8)[scene.label]] if self.label else [])]


class CocoAnnotations:
    """The annotation file of a split in the making, scene by scene.

    The masks are exactly the label map's: run lengths of the pixels of each object that can be seen, in the compressed
    form of the COCO API.

    Args:
        split: 'train' or 'val'; image ids differ between them.
        seed: Of the scenes.
    """

    def __init__(self, split: str, seed: int) -> None:
        self._first = SPLITS.index(split) * (MAX_SCENES + 1) + 1
        self._info = dict(
            description='procedural scenes of replk_mm', version=str(GENERATOR_VERSION), seed=seed, split=split
        )
        self._images: list[dict] = []
        self._objects: list[dict] = []

    def add(self, index: int, name: str, scene: Scene) -> None:
        """Enter scene ``index``, whose image is ``name`` in the split's folder."""
        from pycocotools import mask  # the other layouts need no COCO API

        height, width = scene.label.shape
        image = dict(id=self._first + index, file_name=name, height=height, width=width)
        self._images.append(image)
        for instance in scene.instances:
            x0, y0, x1, y1 = instance.box
            runs = mask.encode(np.asfortranarray(instance.mask, np.uint8))
            self._objects.append(
                dict(
                    id=len(self._objects) + 1,  # 0 would count as unmatched in the COCO API
                    image_id=image['id'],
                    category_id=THING_CLASSES.index(DEMO_CLASSES[instance.label - 1]) + 1,
                    iscrowd=0,
                    area=int(instance.mask.sum()),
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    segmentation=dict(size=[height, width], counts=runs['counts'].decode('ascii')),
                )
            )

    def content(self) -> bytes:
        """The file."""
        categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(THING_CLASSES, 1)]
        return (
            json.dumps(
                dict(
                    info=self._info, licenses=[], images=self._images, annotations=self._objects, categories=categories
                )
            )
            + '\n'
        ).encode()


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
        advice='num_classes={classes}, and reduce_zero_label=True in a config',
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
        advice=f'num_classes={len(THING_CLASSES)}, and metainfo.classes={THING_CLASSES} in a config',
    ),
    # One city; the stem stands where Cityscapes has city, sequence and frame.
    'cityscapes': Layout(
        folders=dict(train='train', val='val'),
        image='leftImg8bit/{folder}/demo/{stem}_leftImg8bit.png',
        label='gtFine/{folder}/demo/{stem}_gtFine_labelTrainIds.png',
        annotations=None,
        values=(IGNORE_INDEX, *CITYSCAPES_IDS),
        meta=dict(**_classes, train_ids=dict(zip(DEMO_CLASSES, CITYSCAPES_IDS, strict=True)), reduce_zero_label=False),
        advice='num_classes=19 in a config; its classes stand in for 8 of the 19 of Cityscapes',
    ),
}

Meta = dict[str, Any]


@dataclass(frozen=True)
class SceneKind:
    """A kind of scenes that can be written.

    Attributes:
        name: A word; ``meta.json`` calls its generator 'replk_mm NAME scenes'.
        version: Changes whenever the same seed gives other scenes than before.
        make: Draws a scene from (seed, split, index, size): ``image``, ``label`` and, for COCO's layout,
            ``instances`` as of :class:`~replk_mm.data.scenes.render.Scene`.
        layouts: Keys of :data:`LAYOUTS` that can hold it.
        more: Further splits, with the number of their scenes for each validation scene.
        listing: Makes the content of :data:`LISTING` from that of ``meta.json``; None if there is no such file.
        meta: What ``meta.json`` says otherwise than for the demo scenes.
    """

    name: str
    version: int
    make: Callable[[int, str, int, tuple[int, int]], Any]
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    more: Mapping[str, int] = field(default_factory=dict)
    listing: Callable[[Meta], str] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def stem_of(split: str, index: int) -> str:
    """What the files of a scene are called, without suffixes."""
    return f'demo_{split}_{index:06d}'
