"""Draw a demo scene: from its description to an image, a label map and one mask per object.

All arithmetic uses integers, or is exact in double precision, so that the pixels are the same on every machine.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from replk_mm.data.scenes.spec import (
    CIRCUMRADIUS,
    DEMO_CLASSES,
    Box,
    Cue,
    ObjectSpec,
    SceneSpec,
    describe_scene,
    scaled,
    scene_rng,
)

SKY, GROUND, WATER = 0, 1, 2
# Outlines are in sixteenths of a pixel: fine enough to look smooth, and exact to compare.
SUBPIXEL = 16


@dataclass(frozen=True)
class Instance:
    """A drawn object: its label (1..K), the bool mask (H, W) of its visible pixels, their tight box, ends excluded."""

    label: int
    mask: np.ndarray
    box: Box
    spec: ObjectSpec


@dataclass(frozen=True)
class Scene:
    """A drawn scene: ``image`` (H, W, 3) RGB and ``label`` (H, W), both uint8; label 0 is "other"."""

    image: np.ndarray
    label: np.ndarray
    instances: tuple[Instance, ...]
    spec: SceneSpec


def make_scene(seed: int, split: str, index: int, size: tuple[int, int] = (256, 256)) -> Scene:
    """Describe and draw scene ``index`` of a split ('train' or 'val')."""
    return render_scene(describe_scene(seed, split, index, size))


def render_scene(spec: SceneSpec) -> Scene:
    """Draw a scene. Descriptions that differ in one part give images that differ in that part only."""
    # Each part has its own generator: changing one part does not change the noise of the others.
    backdrop_rng = scene_rng(spec.seed, spec.split, spec.index, 2)
    regions = _regions(spec)
    image = _draw_backdrop(backdrop_rng, spec, regions)
    label = (regions + 1).astype(np.uint8)
    masks = []
    for number, item in enumerate(spec.objects):
        rng = scene_rng(spec.seed, spec.split, spec.index, 4 + number)
        masks.append(_draw_object(rng, spec, item, image, label))
    _draw_cue(spec.cue, image, label)
    instances = _instances(spec, masks, label)
    image = soften(image)
    noise = spec.backdrop.noise
    grain = scene_rng(spec.seed, spec.split, spec.index, 3).integers(-noise, noise + 1, image.shape, dtype=np.int8)
    return Scene(np.clip(image + grain, 0, 255).astype(np.uint8), label, instances, spec)


@lru_cache(maxsize=64)
def _interpolation(length: int, cell: int) -> np.ndarray:
    """Integer interpolation weights (length, nodes) between nodes ``cell`` pixels apart; rows add up to ``cell``."""
    position = np.arange(length)
    node, offset = position // cell, position % cell
    weights = np.zeros((length, length // cell + 2))
    weights[position, node] = cell - offset
    weights[position, node + 1] = offset
    return weights


def _value_noise(rng: np.random.Generator, shape: tuple[int, int], cell: tuple[int, int], amplitude: int) -> np.ndarray:
    """Noise (H, W) in [-amplitude, amplitude], linear between random nodes ``cell`` pixels apart."""
    rows, columns = _interpolation(shape[0], cell[0]), _interpolation(shape[1], cell[1])
    nodes = rng.integers(-amplitude, amplitude + 1, (rows.shape[1], columns.shape[1])).astype(float)
    # Sums of products of small integers are exact in double precision, in any order.
    return np.floor(rows @ nodes @ columns.T / (cell[0] * cell[1])).astype(np.int16)


def _regions(spec: SceneSpec) -> np.ndarray:
    """The region, SKY, GROUND or WATER, of each pixel (H, W)."""
    height, width = spec.size
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    left, right = spec.backdrop.horizon
    horizon = left + (right - left) * x // width
    regions = np.where(y < horizon, SKY, GROUND)
    if spec.backdrop.river is not None:
        start = min(left, right)
        top_width, bottom_width = spec.backdrop.river_width
        widths = (top_width, (top_width + bottom_width) // 2, bottom_width)
        middle = _interpolate(spec.backdrop.river, y - start, height - start)
        half = _interpolate(widths, y - start, height - start) // 2
        regions[(regions == GROUND) & (abs(x - middle) <= half)] = WATER
    return regions


def _interpolate(values: tuple[int, int, int], position: np.ndarray, length: int) -> np.ndarray:
    """Interpolate linearly from the first value to the second, half-way along ``length``, and to the third."""
    first, second, third = values
    doubled = 2 * position
    return np.where(
        doubled < length,
        first + (second - first) * doubled // length,
        second + (third - second) * (doubled - length) // length,
    )


def _draw_backdrop(rng: np.random.Generator, spec: SceneSpec, regions: np.ndarray) -> np.ndarray:
    """Sky, ground, water and clutter as an image (H, W, 3) of int16."""
    height, width = spec.size

    def cell(rows: int, columns: int) -> tuple[int, int]:
        return scaled(rows, spec.size), scaled(columns, spec.size)

    y = np.arange(height)[:, None]
    clouds = _value_noise(rng, spec.size, cell(14, 56), 30)
    grass = _value_noise(rng, spec.size, cell(4, 4), 42) + _value_noise(rng, spec.size, cell(24, 24), 14)
    period = scaled(10, spec.size)
    phase = (y * 64 + _value_noise(rng, spec.size, cell(14, 30), 400) * period // 10) % (period * 64)
    ripples = abs(phase * 2 - period * 64) * 64 // (period * 64) - 32
    image = np.array(spec.backdrop.colours, np.int16)[regions]
    image += np.choose(regions, (clouds, grass, ripples)).astype(np.int16)[:, :, None]
    for x, mark_y, half, colour in spec.backdrop.clutter:
        image[max(0, mark_y - half) : mark_y + half, max(0, x - half) : x + half] = colour
    light_x, light_y = spec.backdrop.light
    light = light_x * np.arange(width)[None, :] // width + light_y * y // height
    image += light.astype(np.int16)[:, :, None]
    return image


def _draw_object(
    rng: np.random.Generator, spec: SceneSpec, item: ObjectSpec, image: np.ndarray, label: np.ndarray
) -> np.ndarray:
    """Draw ``item`` into ``image`` and ``label``, in place. Return its mask (H, W)."""
    x0, y0 = max(0, item.x - item.radius - 1), max(0, item.y - item.radius - 1)
    window = np.s_[y0 : item.y + item.radius + 2, x0 : item.x + item.radius + 2]
    patch = shape_mask(item, x0, y0, label[window].shape)
    colours = np.array(item.colour, np.int16) + _texture(rng, item, patch.shape, spec.size)[:, :, None]
    image[window][patch] = colours[patch]
    label[window][patch] = _label_of(spec, item)
    mask = np.zeros(spec.size, bool)
    mask[window] = patch
    return mask


def _label_of(spec: SceneSpec, item: ObjectSpec) -> int:
    return DEMO_CLASSES.index(spec.class_of(item)) + 1


def _instances(spec: SceneSpec, masks: list[np.ndarray], label: np.ndarray) -> tuple[Instance, ...]:
    """The visible objects of a scene, without the pixels that later objects or the beacon cover."""
    covered = label == 0
    found = []
    for item, mask in zip(reversed(spec.objects), reversed(masks), strict=True):
        visible = mask & ~covered
        covered = covered | mask
        if visible.any():
            rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            found.append(Instance(_label_of(spec, item), visible, box, item))
    return tuple(reversed(found))


def _outline(item: ObjectSpec) -> list[tuple[int, int]]:
    """The corners of a square, star or triangle about the origin, in sub-pixels."""
    corners, upright = {'square': (4, 45), 'star': (10, -90), 'triangle': (3, -90)}[item.shape]
    radius = item.side * CIRCUMRADIUS[item.shape] * SUBPIXEL
    points = []
    for k in range(corners):
        turn = math.radians(upright + item.angle + 360 * k / corners)
        reach = radius / 2 if item.shape == 'star' and k % 2 else radius
        points.append((round(reach * math.cos(turn)), round(reach * math.sin(turn))))
    return points


def shape_mask(item: ObjectSpec, x0: int, y0: int, shape: tuple[int, ...]) -> np.ndarray:
    """The mask of an object in a window of ``shape`` with the corner (x0, y0)."""
    x = (np.arange(shape[1])[None, :] + x0 - item.x) * SUBPIXEL
    y = (np.arange(shape[0])[:, None] + y0 - item.y) * SUBPIXEL
    if item.shape == 'disc':
        return x * x + y * y <= round(item.side * CIRCUMRADIUS['disc'] * SUBPIXEL) ** 2
    # Even-odd rule: a point is inside if a ray to its right crosses the outline an odd number of times.
    points = _outline(item)
    inside = np.zeros(shape, bool)
    for (u0, v0), (u1, v1) in zip(points, points[1:] + points[:1], strict=True):
        spans = (v0 <= y) != (v1 <= y)
        inside ^= spans & (((u1 - u0) * (y - v0) > (x - u0) * (v1 - v0)) == (v1 > v0))
    return inside


def _texture(rng: np.random.Generator, item: ObjectSpec, shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Brightness (h, w) to add to the colour of an object, from -amplitude to amplitude."""
    height, width = shape
    if item.texture == 'plain':
        return np.zeros((height, width), np.int16)
    if item.texture == 'check':
        square = scaled(8, size)
        bright = (np.arange(height)[:, None] // square + np.arange(width)[None, :] // square) % 2 == 0
        return np.where(bright, item.amplitude, -item.amplitude).astype(np.int16)
    cell = scaled({'speckle': 3, 'blotch': 10}[item.texture], size)
    bright = _value_noise(rng, (height, width), (cell, cell), 64) > 0
    return np.where(bright, item.amplitude, -item.amplitude).astype(np.int16)


def _draw_cue(cue: Cue, image: np.ndarray, label: np.ndarray) -> None:
    """Draw the beacon, in place: stripes in a frame as wide as a stripe, with label 0."""
    x0, y0, x1, y1 = cue.box
    inner = np.s_[y0 + cue.stripe : y1 - cue.stripe, x0 + cue.stripe : x1 - cue.stripe]
    rows, columns = np.indices(label[inner].shape)
    stripes = (rows if cue.orientation == 'h' else columns) // cue.stripe % 2
    image[y0:y1, x0:x1] = cue.colours[0]
    image[inner] = np.array(cue.colours, np.int16)[1 - stripes]
    label[y0:y1, x0:x1] = 0


def soften(image: np.ndarray) -> np.ndarray:
    """Blur (H, W, 3) with weights 1-2-1 along both axes, as a lens does."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode='edge')
        before, after = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
        image = (before + 2 * image + after + 2) >> 2
    return image
