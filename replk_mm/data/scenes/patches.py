"""Patches with one object, for image classification: the class is the combination of shape and texture.

Objects and backdrops are those of the demo scenes (``spec.py``), with deeper textures.
Colour, area, angle and depth of the texture do not depend on the class. A patch has three eighths of the side of its
scene: just room for the largest object. Patch ``index`` of a split depends only on (seed, split, index, side), and
classes take turns.
"""

from dataclasses import dataclass, replace

import numpy as np

from replk_mm.data.scenes.render import render_scene
from replk_mm.data.scenes.spec import SHAPES, TEXTURES, describe_scene, place_object, scene_rng

#: Increases whenever a seed gives other patches than before.
PATCH_VERSION = 1
#: Smallest and largest depth of the textures, grey levels.
AMPLITUDE = (40, 56)
PATCH_SHAPES = (*SHAPES, 'triangle')
PATCH_CLASSES: tuple[str, ...] = tuple(f'{shape}_{texture}' for shape in PATCH_SHAPES for texture in TEXTURES)
# The random stream of the object and its patch; scenes do not use it.
_PATCH = 200


def make_patch(seed: int, split: str, index: int, side: int = 96) -> tuple[np.ndarray, int]:
    """Draw one patch.

    Returns:
        The RGB image ``(side, side, 3)``, uint8, and the index of its class in :data:`PATCH_CLASSES`.
    """
    size = (side * 8 // 3, side * 8 // 3)
    scene = describe_scene(seed, split, index, size)
    rng, label = scene_rng(seed, split, index, _PATCH), index % len(PATCH_CLASSES)
    shape, texture = PATCH_CLASSES[label].split('_')
    item = None
    while item is None:
        item = place_object(rng, size, shape, 0, [scene.cue.circle], scene.backdrop)
    item = replace(item, texture=texture, amplitude=int(rng.integers(AMPLITUDE[0], AMPLITUDE[1] + 1)))
    image = render_scene(replace(scene, objects=(item,))).image
    ends = [sorted((centre + item.radius - side, centre - item.radius)) for centre in (item.y, item.x)]
    y, x = (int(np.clip(rng.integers(low, high + 1), 0, size[0] - side)) for low, high in ends)
    return image[y : y + side, x : x + side], label


@dataclass(frozen=True)
class Patch:
    """A patch as :mod:`~replk_mm.data.scenes.writer` stores it."""

    image: np.ndarray  #: RGB ``(H, W, 3)``, uint8


def class_of_patch(index: int) -> str:
    """The class of patch ``index``, which is the name of its folder."""
    return PATCH_CLASSES[index % len(PATCH_CLASSES)]


def make_patch_scene(seed: int, split: str, index: int, size: tuple[int, int]) -> Patch:
    """Draw a patch of ``size`` (height, width), which are equal."""
    return Patch(make_patch(seed, split, index, size[0])[0])
