"""Read what the objects of a data set with conflicting cues are: ``conflict.json`` and the label maps that it names.

replk_mm/data/demo_conflict.py writes such a set; one of real pictures is read alike, if its file has these keys:

- ``object_classes``: the id that each class of objects has in the label maps;
- ``conflict`` and ``agreeing``: lists of scenes, each with ``image``, ``labels`` (paths below the data root),
  ``objects``;
- of each object ``shape`` and ``texture``, both among the object classes, and ``box`` (left, top, right, bottom in
  pixels, ends excluded). Its pixels are those inside its box that have the id of its shape in the label map.
"""
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from replk_mm.data.demo_writer import LISTING
from replk_mm.data.files import UNDECODABLE
from replk_mm.errors import UserError

#: The largest id that a label map can have.
_LAST = 65535
_KEYS = {'object_classes': dict, 'conflict': list, 'agreeing': list}


@dataclass(frozen=True)
class ConflictObject:
    """An object: the classes of its shape and of its texture, and its box (left, top, right, bottom), ends excluded."""

    shape: str
    texture: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class ConflictScene:
    """An image with its name in the file, its label map, and its objects."""

    name: str
    image: Path
    labels: Path
    objects: tuple[ConflictObject, ...]


@dataclass(frozen=True)
class ConflictSet:
    """A data set with conflicting cues.

    Attributes:
        object_classes: The id of each class of objects in the label maps.
        conflict: Scenes whose objects have the shape of one class and the texture of another.
        agreeing: Scenes whose objects have both of one class.
        about: What else the file says: generator, seed, size; empty if nothing.
        sha256: Of the file.
    """

    object_classes: Mapping[str, int]
    conflict: tuple[ConflictScene, ...]
    agreeing: tuple[ConflictScene, ...]
    about: Mapping[str, Any]
    sha256: str

    def mask(self, scene: ConflictScene, item: ConflictObject, labels: np.ndarray) -> np.ndarray:
        """The pixels ``(H, W)`` of bool of an object.

        Args:
            scene: Whose object it is.
            item: The object.
            labels: The scene's label map, from :func:`read_labels`.

        Raises:
            UserError: If there are none, or the box leaves the label map.
        """
        left, top, right, bottom = item.box
        if bottom > labels.shape[0] or right > labels.shape[1]:
            raise UserError(
                f'{scene.labels}: {labels.shape[1]}x{labels.shape[0]} pixels; the box {list(item.box)} of an '
                f'object in {LISTING} leaves it\nMake the box or the label map fit the other.'
            )
        mask = np.zeros(labels.shape, bool)
        mask[top:bottom, left:right] = labels[top:bottom, left:right] == self.object_classes[item.shape]
        if not mask.any():
            raise UserError(f'{scene.labels}: no pixel of {self.object_classes[item.shape]} ({item.shape}) in the box '
                            f'{list(item.box)} of an object in {LISTING}\nMake the box or the label map fit the other.')
        return mask


def read_conflict(root: Path) -> ConflictSet:
    """The scenes of a data set with conflicting cues.

    Args:
        root: Its folder.

    Raises:
        UserError: If ``conflict.json`` is absent, damaged or contradicts itself, or names files that are absent.
    """
    path = root / LISTING
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); it says which object has whose texture\n'
                        f'Write such a data set with: python tools/make_demo_data.py DIR --scenes conflict') from error
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON ({error})\nWrite the data set anew.') from error
    for key, kind in _KEYS.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise UserError(f'{path}: {key!r} is absent or not a {kind.__name__}\nNeeded: {", ".join(_KEYS)}.')
    classes = found['object_classes']
    if wrong := [name for name, label in classes.items() if type(label) is not int or not 0 <= label <= _LAST]:
        raise UserError(f'{path}: object_classes: the id of {wrong[0]!r} is {str(classes[wrong[0]])[:40]}\n'
                        f'Ids are whole numbers from 0 to {_LAST}, as label maps have them.')
    scenes = {key: tuple(_scene(path, f'{key}[{i}]', scene, classes, agree) for i, scene in enumerate(found[key]))
              for key, agree in (('conflict', False), ('agreeing', True))}
    if not any(scene.objects for scene in scenes['conflict']):
        raise UserError(f'{path}: conflict: no object to decide about\nWrite the data set anew.')
    about = {key: found[key] for key in ('generator', 'generator_version', 'seed', 'size') if key in found}
    return ConflictSet(classes, scenes['conflict'], scenes['agreeing'], about, hashlib.sha256(content).hexdigest())


def _scene(path: Path, place: str, scene: Any, classes: Mapping[str, int], agree: bool) -> ConflictScene:
    try:
        image, labels = (_file(path.parent, scene[key]) for key in ('image', 'labels'))
        objects = tuple(ConflictObject(str(item['shape']), str(item['texture']), _box(item['box']))
                        for item in scene['objects'])
    except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        what = f'there is no {error}' if isinstance(error, KeyError) else error
        raise UserError(f'{path}: {place}: {what}\nA scene has image, labels (paths below the data root) and objects; '
                        f'an object has shape, texture and box [left, top, right, bottom] in pixels.') from error
    for item in objects:
        if stray := [name for name in (item.shape, item.texture) if name not in classes]:
            raise UserError(
                f'{path}: {place}: {stray[0]!r} is not among object_classes\nThey are: {", ".join(classes)}.'
            )
        if (item.shape == item.texture) != agree:
            raise UserError(f'{path}: {place}: shape {item.shape!r} and texture {item.texture!r} '
                            f'{"differ" if agree else "agree"}\nThey agree in "agreeing", and differ in "conflict".')
    return ConflictScene(scene['image'], image, labels, objects)


def _file(root: Path, name: str) -> Path:
    if Path(name).is_absolute() or '..' in Path(name).parts:
        raise ValueError(f'{name} leads out of the data root')
    if not (root / name).is_file():
        raise ValueError(f'{root / name} does not exist')
    return root / name


def _box(values: Any) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(value) for value in values)
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f'box {values} is empty or begins outside of the image')
    return left, top, right, bottom


def read_labels(path: Path) -> np.ndarray:
    """A label map ``(H, W)``.

    Raises:
        UserError: If it cannot be read, or has several channels.
    """
    try:
        with Image.open(path) as opened:
            labels = np.array(opened)
    except UNDECODABLE as error:
        raise UserError(f'{path}: not a readable label map ({error})\nWrite it anew.') from error
    if labels.ndim != 2:
        raise UserError(f'{path}: {labels.shape[2]} channels; a label map has one\nWrite it anew.')
    return labels
