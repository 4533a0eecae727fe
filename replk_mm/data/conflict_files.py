"""The objects of a data set with conflicting cues: ``conflict.json`` and the label maps that it names.

replk_mm/data/demo_conflict.py writes such a set. One of real pictures is read too, if its file has these keys:

- ``object_classes``: the id that each class of objects has in the label maps;
- ``conflict`` and ``agreeing``: lists of scenes, each with ``image``, ``labels`` (paths below the data root),
  ``objects``;
- of each object ``shape`` and ``texture``, both among the object classes, and ``box`` (left, top, right, bottom in
  pixels, ends excluded). Its pixels are those inside its box that have the id of its shape in the label map.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, StrictInt, ValidationError
from pydantic.dataclasses import dataclass

from replk_mm.data.demo_layouts import LISTING
from replk_mm.data.files import UNDECODABLE
from replk_mm.errors import UserError
from replk_mm.files import sha256


@dataclass(frozen=True)
class ConflictObject:
    """An object of a scene."""

    shape: str  #: class of its shape
    texture: str  #: class of its texture
    #: left, top, right, bottom in pixels; ends excluded
    box: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]


@dataclass(frozen=True)
class ConflictScene:
    """An image with its name in the file, its label map, and its objects."""

    name: str
    image: Path
    labels: Path
    objects: tuple[ConflictObject, ...]


@dataclass(frozen=True)
class ConflictSet:
    """A data set with conflicting cues."""

    object_classes: Mapping[str, int]  #: the id of each class of objects in the label maps
    conflict: tuple[ConflictScene, ...]  #: scenes whose objects have the shape of one class, the texture of another
    agreeing: tuple[ConflictScene, ...]  #: scenes whose objects have both of one class
    about: Mapping[str, Any]  #: what else the file says: generator, seed, size; empty if nothing
    sha256: str  #: of the file

    def mask(self, scene: ConflictScene, item: ConflictObject, labels: np.ndarray) -> np.ndarray:
        """The pixels ``(H, W)`` of bool of an object.

        Args:
            scene: Its scene.
            item: The object.
            labels: The scene's label map, from :func:`read_labels`.

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
    objects: list[ConflictObject]


class _Listing(BaseModel):
    generator: Any = None
    generator_version: Any = None
    seed: Any = None
    size: Any = None
    object_classes: dict[str, Annotated[StrictInt, Field(ge=0, le=65535)]]
    conflict: Annotated[list[_Scene], Field(min_length=1)]
    agreeing: list[_Scene]


def read_conflict(root: Path) -> ConflictSet:
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
            f'Write such a data set with: python tools/make_demo_data.py DIR --scenes conflict'
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = '.'.join(map(str, first['loc'])) or 'the file'
        raise UserError(
            f'{path}: {place}: {first["msg"]}\n'
            f'Write the data set again; replk_mm/data/conflict_files.py describes the file.'
        ) from error
    about = found.model_dump(include={'generator', 'generator_version', 'seed', 'size'}, exclude_none=True)
    return ConflictSet(
        found.object_classes, _scenes(path, found, 'conflict'), _scenes(path, found, 'agreeing'), about, sha256(path)
    )


def _scenes(path: Path, found: _Listing, key: str) -> tuple[ConflictScene, ...]:
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
            ConflictScene(scene.image, path.parent / scene.image, path.parent / scene.labels, tuple(scene.objects))
        )
    return tuple(scenes)


def read_labels(path: Path) -> np.ndarray:
    """A label map ``(H, W)``.

    Raises:
        UserError: If it cannot be read, or has several channels.
    """
    try:
        with Image.open(path) as opened:
            labels = np.array(opened)
    except UNDECODABLE as error:
        raise UserError(f'{path}: not a readable label map ({error})\nWrite the data set again.') from error
    if labels.ndim != 2:
        raise UserError(f'{path}: {labels.shape[2]} channels; a label map has one\nWrite the data set again.')
    return labels
