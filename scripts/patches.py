"""Patches with one object, for image classification: the class is the combination of shape and texture.

Objects and backdrops are those of the demo scenes (``spec.py``), with deeper textures.
Colour, area, angle and depth of the texture do not depend on the class. A patch has three eighths of the side of its
scene: just room for the largest object. Patch ``index`` of a split depends only on (seed, split, index, side), and
classes take turns.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from replk_mm.backbones.catalogue import IMAGENET
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


class PatchDataset(Dataset):
    """Patches as float tensors ``(3, side, side)`` with ImageNet's normalization, and their classes.

    All patches are drawn at once and kept in memory. Those of the split 'train' are flipped at random.
    """

    def __init__(self, seed: int, split: str, count: int, side: int = 96) -> None:
        patches = [make_patch(seed, split, index, side) for index in range(count)]
        self.images = torch.from_numpy(np.stack([image for image, _ in patches])).permute(0, 3, 1, 2)
        self.labels = [label for _, label in patches]
        self.flips = split == 'train'
        self.mean, self.std = (torch.tensor(value)[:, None, None] for value in IMAGENET)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (self.images[index] - self.mean) / self.std
        return image.flip(-1) if self.flips and torch.rand(()) < 0.5 else image, self.labels[index]
