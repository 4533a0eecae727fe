"""Scenes with a cue conflict between shape and texture, after Geirhos et al., ICLR 2019, arXiv:1811.12231.

The texture of the demo scenes (``spec.py``) does not depend on the class. Here each of three classes has its own
texture besides its shape (:data:`TEXTURE_OF`):

- In the splits 'train' and 'val', shape and texture of an object belong to the same class.
- Scenes ``2 i`` and ``2 i + 1`` of the split 'conflict' are scene ``i`` of 'val' with exchanged textures, in the two
  ways that leave no texture in place. Nothing else differs. The label is the class of the shape.

A validation scene has one object of each class. So the conflict scenes contain every ordered pair (class of the shape,
class of the texture) equally often. A training scene has three objects with independent shapes. Colour, depth of the
texture, area, angle and position do not depend on the class.

All textures have two brightness levels of equal area, in different arrangements. They are deeper than in the demo
scenes, to survive downsampling. The beacon of the demo scenes has no meaning here, and no score.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, StrictInt, ValidationError
from pydantic.dataclasses import dataclass

from replk_mm.data.scenes.layouts import LAYOUTS, LISTING, Meta, scene_stem
from replk_mm.data.scenes.render import Scene, render_scene
from replk_mm.data.scenes.spec import (
    DEMO_CLASSES,
    SHAPES,
    THING_CLASSES,
    ObjectSpec,
    SceneSpec,
    describe_scene,
    place_object,
    scene_rng,
)
from replk_mm.errors import UserError, command_line
from replk_mm.files import sha256

#: Increases whenever a seed gives other scenes than before.
CUE_CONFLICT_VERSION = 1
#: The texture of each class.
TEXTURE_OF: dict[str, str] = {'disc': 'speckle', 'square': 'blotch', 'star': 'check'}
#: Smallest and largest depth of the textures, grey levels.
AMPLITUDE = (40, 56)
# The random stream of the objects; demo scenes do not use it.
_OBJECTS = 100


def make_cue_conflict_scene(seed: int, split: str, index: int, size: tuple[int, int] = (256, 256)) -> Scene:
    """Describe and draw a scene of split 'train', 'val' or 'conflict'; other arguments as of :func:`describe_scene`."""
    if split != 'conflict':
        return render_scene(_describe(seed, split, index, size))
    spec = _describe(seed, 'val', index // 2, size)
    step = 1 + index % 2
    textures = {shape: TEXTURE_OF[SHAPES[(k + step) % len(SHAPES)]] for k, shape in enumerate(SHAPES)}
    return render_scene(replace(spec, objects=tuple(replace(o, texture=textures[o.shape]) for o in spec.objects)))


def texture_class(item: ObjectSpec) -> str:
    """The class of an object's texture."""
    return next(name for name, texture in TEXTURE_OF.items() if texture == item.texture)


def _describe(seed: int, split: str, index: int, size: tuple[int, int]) -> SceneSpec:
    """A scene whose objects have shape and texture of one class."""
    spec = describe_scene(seed, split, index, size)
    rng = scene_rng(seed, split, index, _OBJECTS)
    shapes = rng.permutation(len(SHAPES)) if split == 'val' else rng.integers(len(SHAPES), size=len(SHAPES))
    while True:  # until there is room for all, nearly always at once
        occupied, objects = [spec.cue.circle], []
        for shape in (SHAPES[k] for k in shapes.tolist()):
            # Depth first: the depth of an object must not depend on how often the one before was placed.
            depth = int(rng.integers(AMPLITUDE[0], AMPLITUDE[1] + 1))
            item = place_object(rng, size, shape, 0, occupied, spec.backdrop)
            if item is not None:
                objects.append(replace(item, texture=TEXTURE_OF[shape], amplitude=depth))
                occupied.append(item.circle)
        if len(objects) == len(shapes):
            return replace(spec, objects=tuple(objects))


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
