"""Scenes with a cue conflict between shape and texture, after Geirhos et al., ICLR 2019, arXiv:1811.12231.

A scene has one bright object on a dark ground. Either cue alone reveals its class:

- Shape: a large disc, square or star. A threshold at :data:`THRESHOLD` separates object and ground, so that a network
  can recognize silhouettes without any texture.
- Texture: rows, columns or both (:data:`TEXTURE_OF`), of random period and phase. It fills the object, but it is faint
  (:data:`AMPLITUDE`) and noisy (:data:`GRAIN`). A small patch of it suffices.

In the splits 'train' and 'val', shape and texture of an object belong to the same class. Scenes ``2 i`` and ``2 i + 1``
of the split 'conflict' are scene ``i`` of 'val' with other textures, in the two ways that leave no texture in place.
Nothing else differs. The label is the class of the shape. Successive validation scenes take turns at the shapes. So the
conflict scenes contain every ordered pair (class of the shape, class of the texture) equally often.

Shapes of training scenes are independent. Colour, depth and period of the texture, area, angle and position do not
depend on the class. All arithmetic uses integers. Sizes are in pixels of a scene whose shorter side is 256.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, StrictInt, ValidationError
from pydantic.dataclasses import dataclass

from replk_mm.data.scenes.layouts import LAYOUTS, LISTING, Meta, scene_stem
from replk_mm.data.scenes.render import Instance, shape_mask, soften
from replk_mm.data.scenes.spec import CIRCUMRADIUS, DEMO_CLASSES, SHAPES, THING_CLASSES, ObjectSpec, scaled, scene_rng
from replk_mm.errors import UserError, command_line
from replk_mm.files import sha256

#: Increases whenever a seed gives other scenes than before.
CUE_CONFLICT_VERSION = 2
#: The texture of each class. They have the same periods, so that only the direction of the changes differs.
TEXTURE_OF: dict[str, str] = {'disc': 'rows', 'square': 'columns', 'star': 'check'}
#: Smallest and largest depth of the textures, grey levels.
AMPLITUDE = (20, 32)
#: Largest noise of a pixel, grey levels.
GRAIN = 12
#: Grey level between those of any ground and any object, in each channel.
THRESHOLD = 128
_GROUND, _OBJECT = (30, 90), (176, 212)  # colours, each channel
_SIDE, _ANGLE = (132, 148), (-15, 15)  # square root of the area of an object; degrees
_CELL = (8, 12)  # width of a row or column


class CueConflictImage(NamedTuple):
    """A drawn scene: ``image`` (H, W, 3) RGB and ``label`` (H, W), both uint8, and its objects."""

    image: np.ndarray
    label: np.ndarray
    instances: tuple[Instance, ...]


def make_cue_conflict_scene(seed: int, split: str, index: int, size: tuple[int, int] = (96, 96)) -> CueConflictImage:
    """Describe and draw a scene of split 'train', 'val' or 'conflict'; other arguments as of :func:`describe_scene`."""
    step = 1 + index % 2 if split == 'conflict' else 0
    source = ('val', index // 2) if split == 'conflict' else (split, index)
    image = np.empty((*size, 3), np.int16)
    image[:], item = _describe(seed, *source, size)
    label = np.full(size, DEMO_CLASSES.index('ground') + 1, np.uint8)
    texture = TEXTURE_OF[SHAPES[(SHAPES.index(item.shape) + step) % len(SHAPES)]]
    item = replace(item, texture=texture)
    mask = shape_mask(item, 0, 0, size)
    brightness = _draw_texture(scene_rng(seed, *source, 1), item, size)
    image[mask] = (np.array(item.colour) + brightness[:, :, None])[mask]
    label[mask] = DEMO_CLASSES.index(item.shape) + 1
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    grain = scene_rng(seed, *source, 2).integers(-GRAIN, GRAIN + 1, image.shape)
    instance = Instance(int(label[mask][0]), mask, box, item)
    return CueConflictImage((soften(image) + grain).astype(np.uint8), label, (instance,))


def shape_of(seed: int, split: str, index: int, size: tuple[int, int]) -> str:
    """The class of the shape in a scene of split 'train' or 'val'."""
    return _describe(seed, split, index, size)[1].shape


def texture_class(item: ObjectSpec) -> str:
    """The class of an object's texture."""
    return next(name for name, texture in TEXTURE_OF.items() if texture == item.texture)


def _describe(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, ObjectSpec]:
    """Colour of the ground, and an object with the texture of its shape."""
    rng = scene_rng(seed, split, index, 0)
    ground = rng.integers(*_GROUND, 3)
    shape = SHAPES[rng.integers(len(SHAPES)) if split == 'train' else index % len(SHAPES)]
    side, angle, amplitude = (int(rng.integers(low, high + 1)) for low, high in (_SIDE, _ANGLE, AMPLITUDE))
    side = scaled(side, size)
    red, green, blue = rng.integers(*_OBJECT, 3).tolist()
    # Leave room for the widest shape, so that the position does not depend on the shape.
    room = math.ceil(side * max(CIRCUMRADIUS[name] for name in SHAPES))
    y, x = (int(rng.integers(room, length - room)) for length in size)
    return ground, ObjectSpec(shape, x, y, side, angle, TEXTURE_OF[shape], amplitude, (red, green, blue))


def _draw_texture(rng: np.random.Generator, item: ObjectSpec, size: tuple[int, int]) -> np.ndarray:
    """Brightness (H, W) to add to the colour of an object: its amplitude, or that with a negative sign."""
    cell = int(rng.integers(scaled(_CELL[0], size), scaled(_CELL[1], size) + 1))
    y, x = rng.integers(2 * cell, size=2)
    rows = (np.arange(size[0])[:, None] + y) // cell % 2
    columns = (np.arange(size[1])[None, :] + x) // cell % 2
    bright = {'rows': rows, 'columns': columns, 'check': rows ^ columns}[item.texture]
    return np.broadcast_to(item.amplitude * (2 * bright - 1), size)


def list_objects(meta: Meta) -> str:
    """The content of :data:`LISTING`: classes of shape and texture, and the box, of all 'val' and 'conflict' objects.

    The pixels of an object are those inside its box that have the id of its shape in the label map.
    """
    layout = LAYOUTS[meta['layout']]

    def list_scenes(split: str) -> list[dict]:
        listed = []
        for index in range(meta['scenes'][split]):
            scene = make_cue_conflict_scene(meta['seed'], split, index, (meta['size'][0], meta['size'][1]))
            image, labels = layout.files(split, scene_stem(split, index))
            objects = [
                dict(shape=item.spec.shape, texture=texture_class(item.spec), box=list(item.box))
                for item in scene.instances
            ]
            listed.append(dict(image=image, labels=labels, objects=objects))
        return listed

    content = dict(
        **{key: meta[key] for key in ('generator', 'generator_version', 'seed', 'size')},
        textures=TEXTURE_OF,
        object_classes={name: DEMO_CLASSES.index(name) + 1 for name in THING_CLASSES},
        agreeing=list_scenes('val'),
        conflict=list_scenes('conflict'),
    )
    return json.dumps(content) + '\n'


@dataclass(frozen=True)
class CueConflictObject:
    """An object of a scene."""

    shape: str  #: class of its shape
    texture: str  #: class of its texture
    #: left, top, right, bottom in pixels, ends excluded
    box: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]


@dataclass(frozen=True)
class CueConflictScene:
    """An image, its name in the listing, its label map, and its objects."""

    name: str
    image: Path
    labels: Path
    objects: tuple[CueConflictObject, ...]


@dataclass(frozen=True)
class CueConflictDataset:
    """A data set with cue conflicts."""

    object_classes: Mapping[str, int]  #: id of each class of objects in the label maps
    conflict: tuple[CueConflictScene, ...]  #: shape and texture of each object belong to different classes
    agreeing: tuple[CueConflictScene, ...]  #: shape and texture of each object belong to the same class
    about: Mapping[str, Any]  #: generator, seed and size, if the listing has them
    sha256: str  #: of the listing

    def mask(self, scene: CueConflictScene, item: CueConflictObject, labels: np.ndarray) -> np.ndarray:
        """The pixels of an object, bool ``(H, W)``.

        Args:
            scene: Its scene.
            item: The object.
            labels: Label map of the scene, from :func:`read_label_map`.

        Raises:
            UserError: If there are none, or the box exceeds the label map.
        """
        left, top, right, bottom = item.box
        mask = np.zeros(labels.shape, bool)
        mask[top:bottom, left:right] = labels[top:bottom, left:right] == self.object_classes[item.shape]
        if bottom > labels.shape[0] or right > labels.shape[1] or not mask.any():
            raise UserError(
                f'{scene.labels}: the box {list(item.box)} of {LISTING} exceeds {labels.shape[1]}x{labels.shape[0]} '
                f'pixels or contains no {item.shape}\nCorrect the box or the label map.'
            )
        return mask


class _Scene(BaseModel):
    image: str
    labels: str
    objects: list[CueConflictObject]


class _Listing(BaseModel):
    generator: Any = None
    generator_version: Any = None
    seed: Any = None
    size: Any = None
    object_classes: dict[str, Annotated[StrictInt, Field(ge=0, le=65535)]]
    conflict: Annotated[list[_Scene], Field(min_length=1)]
    agreeing: list[_Scene]


def read_cue_conflict(root: Path) -> CueConflictDataset:
    """Read the listing of a data set with cue conflicts.

    Args:
        root: Folder of the data set.

    Raises:
        UserError: If ``conflict.json`` is missing or invalid, or names files that do not exist.
    """
    path = root / LISTING
    try:
        listing = _Listing.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f'{path}: cannot be read ({error.strerror}); it lists shapes and textures of the objects\n'
            f'Write one with: {command_line("make_demo_data", "DIR", "--scenes", "conflict")}'
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = '.'.join(map(str, first['loc'])) or 'the file'
        raise UserError(f'{path}: {field}: {first["msg"]}\nWrite the data set again.') from error
    about = listing.model_dump(include={'generator', 'generator_version', 'seed', 'size'}, exclude_none=True)
    scenes = _resolve_scenes(path, listing, 'conflict'), _resolve_scenes(path, listing, 'agreeing')
    return CueConflictDataset(listing.object_classes, *scenes, about, sha256(path))


def _resolve_scenes(path: Path, listing: _Listing, key: str) -> tuple[CueConflictScene, ...]:
    scenes = []
    for i, scene in enumerate(getattr(listing, key)):
        image, labels = path.parent / scene.image, path.parent / scene.labels
        for file in (image, labels):
            if not file.is_file():
                raise UserError(f'{path}: {key}.{i}: {file} does not exist\nWrite the data set again.')
        for item in scene.objects:
            unknown = {item.shape, item.texture} - listing.object_classes.keys()
            if unknown or (item.shape == item.texture) != (key == 'agreeing'):
                raise UserError(
                    f'{path}: {key}.{i}: an object has shape {item.shape!r} and texture {item.texture!r}\n'
                    f'Both must be among {", ".join(listing.object_classes)}; they are equal in "agreeing" and '
                    f'differ in "conflict".'
                )
        scenes.append(CueConflictScene(scene.image, image, labels, tuple(scene.objects)))
    return tuple(scenes)


def read_label_map(path: Path) -> np.ndarray:
    """A label map ``(H, W)``.

    Raises:
        UserError: If it cannot be read, or has several channels.
    """
    try:
        with Image.open(path) as opened:
            labels = np.array(opened)
    except Exception as error:  # decoders raise anything
        raise UserError(f'{path}: not a readable label map ({error})\nWrite the data set again.') from error
    if labels.ndim != 2:
        raise UserError(f'{path}: {labels.shape[2]} channels; a label map has one\nWrite the data set again.')
    return labels
