"""Scenes with a distant cue for the class of each object: does a network use context that far away?

A scene is a noisy ground with lanes. Each lane has one *cue*, a red or a blue square, and one *object*, a disc of any
colour. The object belongs to class ``a`` if the cue of its lane is red, and to ``b`` if it is blue.

- Shape, size and colour of an object do not depend on its class.
- The cue is :data:`NEAREST` to :data:`FARTHEST` of the scene's width away, on either side. With a width of 96 and a
  stride of 8 pixels that is 4 to 8 radii of a 3x3 kernel. At a stride of 4 it is at most about one radius of a 31x31
  kernel.
- Cues of different lanes are independent. A network that does not see the cue is right half the time. A network that
  pools over the whole scene can guess the colour of most cues, and is right 11 of 16 times with four lanes.

Small kernels may still propagate the cue through many layers. Scene ``index`` of a split depends only on (seed, split,
index, size). All arithmetic uses integers.
"""

from dataclasses import dataclass

import numpy as np

from replk_mm.data.scenes.spec import scene_rng

#: Increases whenever a seed gives other scenes than before.
CONTEXT_VERSION = 1
#: Label 1 is the first class; label 0 does not occur.
CONTEXT_CLASSES: tuple[str, ...] = ('ground', 'cue_a', 'cue_b', 'object_a', 'object_b')
CONTEXT_PALETTE: tuple[tuple[int, int, int], ...] = (
    (125, 150, 75),
    (190, 40, 40),
    (40, 60, 190),
    (245, 130, 110),
    (120, 170, 245),
)
GROUND, CUE, OBJECT = 1, 2, 4  # labels; class b is the next one

#: Distance between the centres of neighbouring lanes, pixels.
LANE = 24
CUE_HALF, OBJECT_RADIUS = 5, 7
#: Distance between the centres of cue and object, as fractions (numerator, denominator) of the scene's width.
NEAREST, FARTHEST = (3, 8), (2, 3)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Lane:
    """A lane: centres of the lane, the cue and the object in pixels, the class of the object (0 or 1), colours."""

    y: int
    cue_x: int
    object_x: int
    kind: int
    cue_colour: Colour
    object_colour: Colour


@dataclass(frozen=True)
class ContextScene:
    """A drawn scene: ``image`` (H, W, 3) RGB and ``label`` (H, W), both uint8, and its lanes."""

    image: np.ndarray
    label: np.ndarray
    lanes: tuple[Lane, ...]


def make_context_scene(seed: int, split: str, index: int, size: tuple[int, int] = (96, 96)) -> ContextScene:
    """Describe and draw a scene; arguments are those of :func:`~replk_mm.data.scenes.spec.describe_scene`."""
    height, width = size
    rng = scene_rng(seed, split, index, 0)
    ground = _colour(rng, (70, 70, 70), (186, 186, 186))
    image = np.empty((height, width, 3), np.int16)
    image[:] = ground
    label = np.full(size, GROUND, np.uint8)
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    lanes = tuple(_lane(rng, number, width, ground) for number in range(height // LANE))
    for lane in lanes:
        square = (abs(y - lane.y) <= CUE_HALF) & (abs(x - lane.cue_x) <= CUE_HALF)
        disc = (y - lane.y) ** 2 + (x - lane.object_x) ** 2 <= OBJECT_RADIUS**2
        image[square], label[square] = lane.cue_colour, CUE + lane.kind
        image[disc], label[disc] = lane.object_colour, OBJECT + lane.kind
    grain = rng.integers(-16, 17, image.shape)
    return ContextScene(np.clip(image + grain, 0, 255).astype(np.uint8), label, lanes)


def _lane(rng: np.random.Generator, number: int, width: int, ground: Colour) -> Lane:
    middle = number * LANE + LANE // 2 + int(rng.integers(-2, 3))
    near, far = (width * part // whole for part, whole in (NEAREST, FARTHEST))
    distance = int(rng.integers(near, far + 1))
    left = int(rng.integers(10, width - 10 - distance))
    cue, thing = (left, left + distance) if rng.integers(2) else (left + distance, left)
    kind = int(rng.integers(2))
    # Red has a bright first channel, blue a bright last one. The other two are dark, unlike those of any ground.
    low, high = [0, 0, 0], [60, 60, 60]
    low[2 * kind], high[2 * kind] = 190, 256
    while True:
        colour = _colour(rng, (40, 40, 40), (216, 216, 216))
        if max(abs(a - b) for a, b in zip(colour, ground, strict=True)) > 60:
            break
    return Lane(middle, cue, thing, kind, _colour(rng, (low[0], low[1], low[2]), (high[0], high[1], high[2])), colour)


def _colour(rng: np.random.Generator, low: Colour, high: Colour) -> Colour:
    red, green, blue = rng.integers(low, high).tolist()
    return red, green, blue
