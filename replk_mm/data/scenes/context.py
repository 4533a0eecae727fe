"""Scenes in which the class of an object is decided far away: does a network see that far?

A scene is a noisy ground with lanes across it. Each lane holds one *cue*, a red or a blue square, and one *object*, a
disc of any colour; the object belongs to class ``a`` or ``b`` as the cue of its own lane is red or blue. By
construction

- the two classes of objects look alike: shape, size and colour are drawn without regard to the class;
- the cue is :data:`NEAREST` to :data:`FARTHEST` of the scene's width away, on either side, which at a stride of 8
  pixels and 96 of width is 4 to 8 radii of a 3x3 kernel, and about one radius of a 31x31 kernel at a stride of 4 at
  most;
- every lane draws its cue by itself, so that no other lane tells the class: a network that does not see the cue is
  right half the time. One that pools over the whole scene without regard to place, the cue among the rest, can still
  guess that all objects are of the colour that most cues have: with four lanes it is right 69 % of the time, 11 of 16.

Whether a small kernel can carry the cue that far depends on how many layers it has and how they learn; nothing here
excludes it. Scene ``index`` of a split depends only on (seed, split, index, size); everything is integer arithmetic.
"""

from dataclasses import dataclass

import numpy as np

from replk_mm.data.scenes.layouts import SceneKind
from replk_mm.data.scenes.spec import scene_rng

#: Changes whenever the same seed gives other scenes than before.
CONTEXT_VERSION = 1
#: Label 1 is the first class; nothing is labelled 0.
CONTEXT_CLASSES: tuple[str, ...] = ('ground', 'cue_a', 'cue_b', 'object_a', 'object_b')
CONTEXT_PALETTE: tuple[tuple[int, int, int], ...] = (
    (125, 150, 75),
    (190, 40, 40),
    (40, 60, 190),
    (245, 130, 110),
    (120, 170, 245),
)
GROUND, CUE, OBJECT = 1, 2, 4  # labels; class b is the next one

#: Pixels from the middle of a lane to that of the next one.
LANE = 24
CUE_HALF, OBJECT_RADIUS = 5, 7
#: Distance between the middles of cue and object, as fractions of the scene's width (numerator, denominator).
NEAREST, FARTHEST = (3, 8), (2, 3)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Lane:
    """A lane: middles of the lane, the cue and the object in pixels; the class of the object (0 or 1); colours."""

    y: int
    cue_x: int
    object_x: int
    kind: int
    cue_colour: Colour
    object_colour: Colour


@dataclass(frozen=True)
class ContextScene:
    """A drawn scene: ``image`` (H, W, 3) RGB and ``label`` (H, W), both uint8, and what is in it."""

    image: np.ndarray
    label: np.ndarray
    lanes: tuple[Lane, ...]


def make_context_scene(seed: int, split: str, index: int, size: tuple[int, int] = (96, 96)) -> ContextScene:
    """Describe and draw a scene.

    Args:
        seed: Names the data set, 0 or more.
        split: 'train' or 'val': two streams that share no scene.
        index: Which scene of the split.
        size: Height and width in pixels. Defaults to (96, 96).
    """
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
    # Red has its first channel bright, blue its last; the other two are dark, as no ground's are and few discs'.
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


CONTEXT = SceneKind(
    'context',
    CONTEXT_VERSION,
    make_context_scene,
    layouts=('ade20k',),
    meta=dict(classes=list(CONTEXT_CLASSES), palette=[list(colour) for colour in CONTEXT_PALETTE]),
)
