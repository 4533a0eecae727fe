"""Scenes that tell what a network goes by: objects whose shape and texture agree, and the same ones with a foreign
texture.

In the demo scenes (replk_mm/data/scenes/spec.py) texture does not depend on the class, and a network can only go by
shape. Here each of three classes has a texture of its own besides its shape (:data:`TEXTURE_OF`):

- in the splits 'train' and 'val' every object has shape and texture of one class: a network may go by either or both;
- scenes ``2 i`` and ``2 i + 1`` of the split 'conflict' are scene ``i`` of 'val' with the textures exchanged in the two
  ways that leave none in its place. Nothing else differs, and the label is that of the shape.

A validation scene holds one object of each class, so that the conflict scenes hold every ordered pair (class of the
shape, class of the texture) equally often. A training scene holds three objects whose shapes are drawn independently of
each other, so that none tells what another is. Colour, depth of the texture, area, angle and place do not depend on the
class.

The textures have two levels of brightness that take half of the object each; they differ in how these are arranged, and
are deeper than those of the demo scenes, so that they survive being made smaller. The beacon of the demo scenes stays;
it names nothing here, and is not scored.
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

from replk_mm.data.scenes.layouts import LAYOUTS, LISTING, SceneKind, stem_of
from replk_mm.data.scenes.render import Scene, render_scene
from replk_mm.data.scenes.spec import (
    DEMO_CLASSES,
    SHAPES,
    THING_CLASSES,
    ObjectSpec,
    SceneSpec,
    describe_scene,
    place,
    scene_rng,
)
from replk_mm.errors import UserError, command_line
from replk_mm.files import sha256

#: Changes whenever the same seed gives other scenes than before.
CUE_CONFLICT_VERSION = 1
#: The texture that an object of each class has where the cues agree.
TEXTURE_OF: dict[str, str] = {'disc': 'speckle', 'square': 'blotch', 'star': 'check'}
#: Depth of the textures in grey levels, the least and the largest.
AMPLITUDE = (40, 56)
# Which stream of random numbers of a scene the objects come from: none of those that demo scenes use.
_OBJECTS = 100


def make_cue_conflict_scene(seed: int, split: str, index: int, size: tuple[int, int] = (256, 256)) -> Scene:
    """Describe and draw one scene.

    Args:
        seed: Names the data set, 0 or more.
        split: 'train', 'val' or 'conflict'.
        index: Which scene of the split.
        size: Height and width in pixels. Defaults to (256, 256).
    """
    if split != 'conflict':
        return render_scene(_agreeing(seed, split, index, size))
    spec = _agreeing(seed, 'val', index // 2, size)
    step = 1 + index % 2
    foreign = {shape: TEXTURE_OF[SHAPES[(k + step) % len(SHAPES)]] for k, shape in enumerate(SHAPES)}
    return render_scene(
        replace(spec, objects=tuple(replace(item, texture=foreign[item.shape]) for item in spec.objects))
    )


def texture_class(item: ObjectSpec) -> str:
    """The class that an object's texture is of."""
    return next(name for name, texture in TEXTURE_OF.items() if texture == item.texture)


def _agreeing(seed: int, split: str, index: int, size: tuple[int, int]) -> SceneSpec:
    spec = describe_scene(seed, split, index, size)
    rng = scene_rng(seed, split, index, _OBJECTS)
    shapes = rng.permutation(len(SHAPES)) if split == 'val' else rng.integers(len(SHAPES), size=len(SHAPES))
    left, top, right, bottom = spec.cue.box
    half = (right - left) // 2
    beacon = (left + half, top + half, round(1.42 * half))
    while True:  # until all have found room, which they nearly always do at once
        taken, objects = [beacon], []
        for shape in (SHAPES[k] for k in shapes.tolist()):
            # Depth first: however many places are tried, the next object's depth must not follow from them.
            depth = int(rng.integers(AMPLITUDE[0], AMPLITUDE[1] + 1))
            item = place(rng, size, shape, 0, taken, spec.backdrop)
            if item is not None:
                objects.append(replace(item, texture=TEXTURE_OF[shape], amplitude=depth))
                taken.append((item.x, item.y, item.radius))
        if len(objects) == len(shapes):
            return replace(spec, objects=tuple(objects))


def _listing(meta: dict[str, Any]) -> str:
    """Every object of the validation and conflict scenes: class of its shape and of its texture, and its box.

    An object's pixels are those inside its box that have its shape's id in the label map.
    """
    layout = LAYOUTS[meta['layout']]

    def scenes(split: str) -> list[dict]:
        found = []
        for index in range(meta['scenes'][split]):
            scene = make_cue_conflict_scene(meta['seed'], split, index, (meta['size'][0], meta['size'][1]))
            image, labels = layout.files(split, stem_of(split, index))
            objects = [
                dict(shape=item.spec.shape, texture=texture_class(item.spec), box=list(item.box))
                for item in scene.instances
            ]
            found.append(dict(image=image, labels=labels, objects=objects))
        return found

    return (
        json.dumps(
            dict(
                generator=meta['generator'],
                generator_version=meta['generator_version'],
                seed=meta['seed'],
                size=meta['size'],
                textures=TEXTURE_OF,
                object_classes={name: DEMO_CLASSES.index(name) + 1 for name in THING_CLASSES},
                agreeing=scenes('val'),
                conflict=scenes('conflict'),
            )
        )
        + '\n'
    )


CONFLICT = SceneKind(
    'conflict',
    CUE_CONFLICT_VERSION,
    make_cue_conflict_scene,
    layouts=('ade20k',),
    more={'conflict': 2},
    listing=_listing,
)


@dataclass(frozen=True)
class CueConflictObject:
    """An object of a scene."""

    shape: str  #: class of its shape
    texture: str  #: class of its texture
    #: left, top, right, bottom in pixels; ends excluded
    box: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]


@dataclass(frozen=True)
class CueConflictScene:
    """An image with its name in the file, its label map, and its objects."""

    name: str
    image: Path
    labels: Path
    objects: tuple[CueConflictObject, ...]


@dataclass(frozen=True)
class CueConflictDataset:
    """A data set with conflicting cues."""

    object_classes: Mapping[str, int]  #: the id of each class of objects in the label maps
    conflict: tuple[CueConflictScene, ...]  #: scenes whose objects have the shape of one class, the texture of another
    agreeing: tuple[CueConflictScene, ...]  #: scenes whose objects have both of one class
    about: Mapping[str, Any]  #: what else the file says: generator, seed, size; empty if nothing
    sha256: str  #: of the file

    def mask(self, scene: CueConflictScene, item: CueConflictObject, labels: np.ndarray) -> np.ndarray:
        """The pixels ``(H, W)`` of bool of an object.

        Args:
            scene: Its scene.
            item: The object.
            labels: The scene's label map, from :func:`read_label_map`.

        Raises:
            UserError: If there are none, or the box leaves the label map.
        """
        left, top, right, bottom = item.box
        mask = np.zeros(labels.shape, bool)
        mask[top:bottom, left:right] = labels[top:bottom, left:right] == self.object_classes[item.shape]
        if bottom > labels.shape[0] or right > labels.shape[1] or not mask.any():
            raise UserError(
                f'{scene.labels}: {labels.shape[1]}x{labels.shape[0]} pixels; the box {list(item.box)} of '
                f'a {item.shape} in {LISTING} leaves them, or has no pixel of {item.shape}\n'
                f'Make the box or the label map fit the other.'
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
    """The scenes of a data set with conflicting cues.

    Args:
        root: Its folder.

    Raises:
        UserError: If ``conflict.json`` is absent, damaged or contradicts itself, or names files that are absent.
    """
    path = root / LISTING
    try:
        found = _Listing.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f'{path}: cannot be read ({error.strerror}); it lists shapes and textures of the objects\n'
            f'Write one with: {command_line("make_demo_data", "DIR", "--scenes", "conflict")}'
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = '.'.join(map(str, first['loc'])) or 'the file'
        raise UserError(
            f'{path}: {place}: {first["msg"]}\n'
            f'Write the data set again; replk_mm/data/scenes/cue_conflict.py describes the file.'
        ) from error
    about = found.model_dump(include={'generator', 'generator_version', 'seed', 'size'}, exclude_none=True)
    return CueConflictDataset(
        found.object_classes, _scenes(path, found, 'conflict'), _scenes(path, found, 'agreeing'), about, sha256(path)
    )


def _scenes(path: Path, found: _Listing, key: str) -> tuple[CueConflictScene, ...]:
    scenes = []
    for i, scene in enumerate(getattr(found, key)):
        for name in (scene.image, scene.labels):
            if not (path.parent / name).is_file():
                raise UserError(f'{path}: {key}.{i}: {path.parent / name} does not exist\nWrite the data set again.')
        for item in scene.objects:
            unknown = {item.shape, item.texture} - found.object_classes.keys()
            if unknown or (item.shape == item.texture) != (key == 'agreeing'):
                raise UserError(
                    f'{path}: {key}.{i}: an object has shape {item.shape!r} and texture {item.texture!r}\n'
                    f'Both are among {", ".join(found.object_classes)}; they are equal in "agreeing" and '
                    f'differ in "conflict".'
                )
        scenes.append(
            CueConflictScene(scene.image, path.parent / scene.image, path.parent / scene.labels, tuple(scene.objects))
        )
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
