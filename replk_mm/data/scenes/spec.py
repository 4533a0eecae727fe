"""The description of a procedural demo scene, drawn from a seed; ``render.py`` turns it into pixels.

A scene is a sky over a ground, usually with a river, and a few objects. Shortcuts do not help:

- Colour, texture and area of an object do not depend on its class. Only the shape distinguishes ``disc``, ``square``
  and ``star``.
- ``triangle_h`` and ``triangle_v`` look alike. The class of a triangle depends on the stripes (horizontal or vertical)
  of a beacon at the top of the scene, at least :data:`CUE_DISTANCE` of the scene's height away.

Scene ``index`` of a split depends only on (seed, split, index, size). All sizes below are in pixels of a scene whose
shorter side is 256 and scale with it.
"""

import math
from dataclasses import dataclass

import numpy as np

#: Increases whenever a seed gives other scenes than before.
GENERATOR_VERSION = 1

#: Label 1 is the first class. Label 0 is "other" (the beacon), which is not scored.
DEMO_CLASSES: tuple[str, ...] = ('sky', 'ground', 'water', 'disc', 'square', 'star', 'triangle_h', 'triangle_v')
DEMO_PALETTE: tuple[tuple[int, int, int], ...] = (
    (135, 190, 235),
    (125, 150, 75),
    (40, 85, 165),
    (230, 80, 60),
    (245, 190, 50),
    (170, 75, 190),
    (30, 170, 150),
    (250, 130, 190),
)

#: The classes of countable objects; the others are regions.
THING_CLASSES: tuple[str, ...] = DEMO_CLASSES[3:]

SPLITS: tuple[str, ...] = ('train', 'val')
SHAPES: tuple[str, ...] = ('disc', 'square', 'star')
TEXTURES: tuple[str, ...] = ('plain', 'speckle', 'blotch', 'check')
ORIENTATIONS: tuple[str, ...] = ('h', 'v')

#: Minimum vertical gap between the beacon and any triangle, as a fraction of the scene's height.
CUE_DISTANCE = 0.4

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
#: Centre and radius in pixels.
Circle = tuple[int, int, int]

#: Circumradius of each shape of unit area; a star's inner vertices lie at half its radius.
CIRCUMRADIUS = {
    'disc': 1 / math.sqrt(math.pi),
    'square': 1 / math.sqrt(2),
    'star': 1 / math.sqrt(2.5 * math.sin(math.pi / 5)),
    'triangle': 2 / math.sqrt(3 * math.sqrt(3)),
}


@dataclass(frozen=True)
class ObjectSpec:
    """One object: its shape about (``x``, ``y``), of area ``side`` squared, ``angle`` degrees from upright.

    ``texture`` is one of :data:`TEXTURES`, ``amplitude`` its depth in grey levels.
    """

    shape: str
    x: int
    y: int
    side: int
    angle: int
    texture: str
    amplitude: int
    colour: Colour

    @property
    def radius(self) -> int:
        """Circumradius in pixels, rounded up."""
        return math.ceil(self.side * CIRCUMRADIUS[self.shape])

    @property
    def circle(self) -> Circle:
        """The circumcircle."""
        return self.x, self.y, self.radius


@dataclass(frozen=True)
class Cue:
    """The beacon: a square with stripes along ``orientation``, which decides the class of every triangle."""

    orientation: str
    box: Box
    stripe: int
    colours: tuple[Colour, Colour]

    @property
    def circle(self) -> Circle:
        """A circle around the beacon."""
        half = (self.box[2] - self.box[0]) // 2
        return self.box[0] + half, self.box[1] + half, round(1.42 * half)


@dataclass(frozen=True)
class Backdrop:
    """Everything behind the objects."""

    colours: tuple[Colour, Colour, Colour]  #: colours of sky, ground and water
    horizon: tuple[int, int]  #: y of the horizon at the left and at the right edge
    #: x of the centre of the river at the horizon, half-way and at the bottom; None without a river
    river: tuple[int, int, int] | None
    river_width: tuple[int, int]  #: width of the river at the horizon and at the bottom
    #: small marks (x, y, half side, colour), which have the label of the region they lie on
    clutter: tuple[tuple[int, int, int, Colour], ...]
    light: tuple[int, int]  #: increase in brightness from left to right and from top to bottom, grey levels
    noise: int  #: maximum pixel noise, grey levels


@dataclass(frozen=True)
class SceneSpec:
    """A scene before it is drawn. Replace a field, such as an object's texture, to draw a variant."""

    seed: int
    split: str
    index: int
    size: tuple[int, int]
    backdrop: Backdrop
    objects: tuple[ObjectSpec, ...]
    cue: Cue

    def class_of(self, item: ObjectSpec) -> str:
        """The class of an object: its shape, and for a triangle the orientation of the cue."""
        return f'triangle_{self.cue.orientation}' if item.shape == 'triangle' else item.shape


def scene_rng(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """An independent generator for each (seed, split, index, purpose)."""
    key = (SPLITS.index(split), index, purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def scaled(pixels: float, size: tuple[int, int]) -> int:
    """Scale a length of a 256-pixel scene to a scene of ``size`` (H, W)."""
    return max(1, round(pixels * min(size) / 256))


def describe_scene(seed: int, split: str, index: int, size: tuple[int, int] = (256, 256)) -> SceneSpec:
    """Draw the description of one scene.

    Args:
        seed: Seed of the data set, 0 or more.
        split: 'train' or 'val', which share no scene.
        index: Index of the scene in the split.
        size: Height and width in pixels. Defaults to (256, 256).
    """
    # Integers only: other compilers may round random floats differently.
    rng = scene_rng(seed, split, index, 0)
    backdrop = _draw_backdrop(rng, size)
    # Neighbouring scenes have different orientations, so that short splits are balanced too.
    first = int(scene_rng(seed, split, index // 2, 1).integers(2))
    cue = _draw_cue(rng, size, ORIENTATIONS[(first + index) % 2])
    return SceneSpec(seed, split, index, size, backdrop, _draw_objects(rng, size, backdrop, cue), cue)


def _between(rng: np.random.Generator, low: float, high: float) -> int:
    """An integer from ``low`` to ``high``, both included."""
    return int(rng.integers(round(low), max(round(low), round(high)) + 1))


def _draw_colour(rng: np.random.Generator, others: tuple[Colour, ...], distance: int) -> Colour:
    """A colour that differs from each of up to 7 ``others`` by ``distance`` (up to 87) in at least one channel."""
    while True:
        red, green, blue = rng.integers(40, 216, 3).tolist()
        if all(max(abs(red - r), abs(green - g), abs(blue - b)) >= distance for r, g, b in others):
            return red, green, blue


def _draw_backdrop(rng: np.random.Generator, size: tuple[int, int]) -> Backdrop:
    height, width = size
    sky = _draw_colour(rng, (), 0)
    ground = _draw_colour(rng, (sky,), 60)
    water = _draw_colour(rng, (sky, ground), 60)
    level = _between(rng, 0.34 * height, 0.46 * height)
    tilt = _between(rng, -0.06 * height, 0.06 * height)
    middle = [_between(rng, 0.15 * width, 0.85 * width) for _ in range(3)]
    has_river = _between(rng, 1, 100) <= 80
    clutter = tuple(
        (
            _between(rng, 0, width - 1),
            _between(rng, 0, height - 1),
            scaled(_between(rng, 2, 5), size),
            _draw_colour(rng, (), 0),
        )
        for _ in range(_between(rng, 6, 12))
    )
    return Backdrop(
        colours=(sky, ground, water),
        horizon=(level + tilt, level - tilt),
        river=(middle[0], middle[1], middle[2]) if has_river else None,
        river_width=(scaled(_between(rng, 30, 50), size), scaled(_between(rng, 60, 100), size)),
        clutter=clutter,
        light=(_between(rng, -24, 24), _between(rng, -24, 24)),
        noise=_between(rng, 4, 10),
    )


def _draw_cue(rng: np.random.Generator, size: tuple[int, int], orientation: str) -> Cue:
    side = scaled(_between(rng, 42, 48), size)
    x, y = _between(rng, scaled(4, size), size[1] - side - scaled(4, size)), _between(rng, 3, scaled(8, size))
    # Any hue, but one dark and one bright colour: the cue is distant, not faint.
    dark, bright = ((red, green, blue) for red, green, blue in rng.integers((15, 160), (90, 241), (3, 2)).T.tolist())
    colours = (dark, bright) if _between(rng, 0, 1) else (bright, dark)
    return Cue(orientation, (x, y, x + side, y + side), scaled(_between(rng, 5, 6), size), colours)


def _draw_objects(
    rng: np.random.Generator, size: tuple[int, int], backdrop: Backdrop, cue: Cue
) -> tuple[ObjectSpec, ...]:
    """One or two triangles far from the cue, then three other shapes anywhere."""
    lowest = cue.box[3] + math.ceil(CUE_DISTANCE * size[0])
    occupied = [cue.circle]
    objects: list[ObjectSpec] = []
    wanted = ['triangle'] * _between(rng, 1, 2) + [SHAPES[k] for k in rng.integers(len(SHAPES), size=3).tolist()]
    for shape in wanted:
        item = place_object(rng, size, shape, lowest if shape == 'triangle' else 0, occupied, backdrop)
        if item is not None:
            objects.append(item)
            occupied.append(item.circle)
    return tuple(objects)


def place_object(
    rng: np.random.Generator, size: tuple[int, int], shape: str, top: int, occupied: list[Circle], backdrop: Backdrop
) -> ObjectSpec | None:
    """An object inside the scene, below ``top`` and outside of the circles ``occupied``; None if there is no room."""
    height, width = size
    side = _between(rng, scaled(42, size), scaled(54, size))
    angle = _between(rng, -15, 15)
    texture = TEXTURES[_between(rng, 0, len(TEXTURES) - 1)]
    amplitude = _between(rng, 10, 24)
    colour = _draw_colour(rng, backdrop.colours, 70)
    radius = math.ceil(side * CIRCUMRADIUS[shape])
    gap = scaled(2, size)
    for _ in range(60):
        x, y = _between(rng, radius, width - 1 - radius), _between(rng, top + radius, height - 1 - radius)
        if all((x - u) ** 2 + (y - v) ** 2 >= (radius + r + gap) ** 2 for u, v, r in occupied):
            return ObjectSpec(shape, x, y, side, angle, texture, amplitude, colour)
    return None
