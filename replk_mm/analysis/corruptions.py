"""The 15 common corruptions of photographs at five severities, with the published parameters.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019
(arXiv:1903.12261), in the form for images of any size of Michaelis et al., "Benchmarking Robustness in Object
Detection", 2019 (arXiv:1907.07484). One differs: ``generated_frost`` overlays a generated texture, where the published
``frost`` overlays photographs.
"""

import hashlib
import io
from collections.abc import Callable
from typing import Annotated

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator
from scipy import ndimage

from replk_mm.errors import did_you_mean

#: Published severities, mild to strong, and the smallest side of an image in pixels.
SEVERITIES, LEAST_SIDE = (1, 2, 3, 4, 5), 32


def corrupt(image: NDArray[np.uint8], name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    """Corrupt an image. The result depends on these arguments alone, not on the state of a random generator.

    Args:
        image: RGB, ``(H, W, 3)``, at least 32 x 32 pixels; left unchanged.
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the random numbers. Images of other pixels have others.

    Returns:
        The same shape and type.

    Raises:
        ValueError: If the image has another shape or type, or is too small.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < LEAST_SIDE:
        raise ValueError(
            f'corruptions need RGB images of 8 bits and at least {LEAST_SIDE} x {LEAST_SIDE} pixels; this one is '
            f'{image.shape}, {image.dtype}'
        )
    function, parameters = CORRUPTIONS[name]
    key = hashlib.sha256(f'{seed} {name} {severity} {image.shape} '.encode() + image.tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(key[:16], 'little'))
    found = function(image / np.float32(255), rng, *np.atleast_1d(parameters[severity - 1]).tolist())
    return (np.clip(found, 0, 1) * 255).astype(np.uint8)  # truncated, as published


def _impulse_noise(image: NDArray, rng: Generator, share: float) -> NDArray:
    return np.where(rng.random(image.shape) < share, rng.random(image.shape) < 0.5, image)


def _defocus_blur(image: NDArray, rng: Generator, radius: float, smoothing: float) -> NDArray:
    reach = np.arange(-max(8, int(radius)), max(8, int(radius)) + 1)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    return cv2.filter2D(image, -1, cv2.GaussianBlur(disk / disk.sum(), (side, side), smoothing))


def _glass_blur(image: NDArray, rng: Generator, sigma: float, most: float, rounds: float) -> NDArray:
    (height, width), most = image.shape[:2], int(most)
    source = list(range(height * width))
    places = (np.arange(height - most, most, -1)[:, None] * width + np.arange(width - most, most, -1)).ravel()
    for _ in range(int(rounds)):
        right, down = rng.integers(-most, most, (2, len(places)))  # excludes +most, as published
        # The published code means to swap, but copies: both sides of its assignment are views of one array.
        for place, other in zip(places.tolist(), (places + down * width + right).tolist(), strict=True):
            source[place] = source[other]
    blurred = np.floor(255 * ndimage.gaussian_filter(image, (sigma, sigma, 0), mode='nearest')) / np.float32(255)
    moved = blurred.reshape(-1, 3)[source].reshape(image.shape)
    return ndimage.gaussian_filter(moved, (sigma, sigma, 0), mode='nearest')


def _move(image: NDArray, radius: float, sigma: float, angle: float) -> NDArray:
    """The mean of an image shifted along a line, with half a Gaussian as weights; edges are repeated."""
    steps = np.arange(2 * int(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down, right = (np.ceil(steps * f(np.deg2rad(angle)) - 0.5).astype(int) for f in (np.sin, np.cos))
    kernel = np.zeros((2 * len(steps) + 1,) * 2, np.float32)
    np.add.at(kernel, (len(steps) + down, len(steps) + right), weights / weights.sum())
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def _zoom(image: NDArray, factor: float) -> NDArray:
    """Enlarge the middle of an image; the size stays."""
    kept = [int(np.ceil(side / factor)) for side in image.shape[:2]]
    top, left = ((side - part) // 2 for side, part in zip(image.shape, kept, strict=False))
    middle = image[top : top + kept[0], left : left + kept[1]]
    return ndimage.zoom(middle, (factor, factor, 1)[: image.ndim], order=1)[: image.shape[0], : image.shape[1]]


def _zoom_blur(image: NDArray, rng: Generator, end: float, step: float) -> NDArray:
    factors = np.arange(1, end, step)
    return (image + sum(_zoom(image, factor) for factor in factors)) / (len(factors) + 1)


def _snow(image: NDArray, rng: Generator, *parameters: float) -> NDArray:
    mean, deviation, size, least, radius, sigma, kept = parameters
    flakes = _zoom(rng.normal(mean, deviation, image.shape[:2]).astype(np.float32), size)
    flakes = _move(np.clip(np.where(flakes < least, 0, flakes), 0, 1), radius, sigma, rng.uniform(-135, -45))
    flakes = (np.round(flakes * 255) / 255)[..., None]
    gray = (image @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return kept * image + (1 - kept) * np.maximum(image, 1.5 * gray + 0.5) + flakes + np.rot90(flakes, 2)


def _frost(image: NDArray, rng: Generator, kept: float, added: float) -> NDArray:
    """Needles on a fractal, as bright as the published photographs."""
    seeds = (rng.random(image.shape[:2]) < 0.02).astype(np.float32)
    needles = np.max([_move(seeds, 20, 12, angle) for angle in rng.uniform(0, 360, 8)], axis=0)
    texture = (0.3 + 0.4 * _fractal(image.shape, 1.6, rng) + 2.5 * needles)[..., None] * np.array([0.9, 1.0, 1.1])
    return kept * image + added * np.clip(texture, 0, 1)


def _fog(image: NDArray, rng: Generator, thickness: float, decay: float) -> NDArray:
    brightest = image.max()
    return (image + thickness * _fractal(image.shape, decay, rng)[..., None]) * brightest / (brightest + thickness)


def _fractal(shape: tuple[int, ...], decay: float, rng: Generator) -> NDArray:
    """A diamond-square fractal from 0 to 1; the amplitude falls by ``decay`` squared from one scale to the next."""
    step = 1 << (max(shape) - 1).bit_length()
    field, amplitude = np.zeros((step, step)), 1.0
    while step > 1:
        half, corners = step // 2, field[::step, ::step]
        rows, columns = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
        noise = lambda: amplitude * rng.uniform(-1, 1, corners.shape)  # noqa: B023, E731
        centers = (corners + rows + columns + np.roll(rows, -1, 1)) / 4 + noise()
        field[half::step, half::step] = centers
        field[::step, half::step] = (corners + columns + centers + np.roll(centers, 1, 0)) / 4 + noise()
        field[half::step, ::step] = (corners + rows + centers + np.roll(centers, 1, 1)) / 4 + noise()
        step, amplitude = half, amplitude / decay**2
    return ((field - field.min()) / np.ptp(field))[: shape[0], : shape[1]]


def _brightness(image: NDArray, rng: Generator, added: float) -> NDArray:
    value = image.max(axis=2, keepdims=True)  # of HSV, whose hue and saturation stay
    return np.where(value > 0, image / np.maximum(value, 1e-6), 1) * np.minimum(value + added, 1)


def _elastic_transform(image: NDArray, rng: Generator, strength: float) -> NDArray:
    (height, width), most = image.shape[:2], 0.005 * image.shape[0]
    smoothing = (0.01 * height, 0.01 * width)
    noise = (rng.uniform(-most, most, (height, width)) for _ in range(2))
    x, y = (strength * ndimage.gaussian_filter(one, smoothing, mode='reflect', truncate=3) for one in noise)
    places = [y + np.arange(height)[:, None], x + np.arange(width)]
    return np.stack([ndimage.map_coordinates(image[..., c], places, order=1, mode='reflect') for c in range(3)], axis=2)


def _pixelate(image: NDArray, rng: Generator, share: float) -> NDArray:
    height, width = image.shape[:2]
    small = _to_pillow(image).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST)) / np.float32(255)


def _jpeg_compression(image: NDArray, rng: Generator, quality: float) -> NDArray:
    _to_pillow(image).save(memory := io.BytesIO(), 'JPEG', quality=int(quality))
    return np.asarray(Image.open(memory)) / np.float32(255)


def _to_pillow(image: NDArray) -> Image.Image:
    return Image.fromarray(np.round(image * 255).astype(np.uint8))


#: In the published order: functions of RGB from 0 to 1, ``(H, W, 3)``, and their parameters at each severity.
CORRUPTIONS: dict[str, tuple[Callable[..., NDArray], tuple]] = {
    'gaussian_noise': (lambda x, rng, c: x + rng.normal(scale=c, size=x.shape), (0.08, 0.12, 0.18, 0.26, 0.38)),
    'shot_noise': (lambda x, rng, c: rng.poisson(x * c) / c, (60, 25, 12, 5, 3)),
    'impulse_noise': (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    'defocus_blur': (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    'glass_blur': (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    'motion_blur': (
        lambda x, rng, length, sigma: _move(x, length, sigma, rng.uniform(-45, 45)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    'zoom_blur': (_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    'snow': (
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    'generated_frost': (_frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    'fog': (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    'brightness': (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    'contrast': (lambda x, rng, c: c * x + (1 - c) * x.mean((0, 1), np.float64), (0.4, 0.3, 0.2, 0.1, 0.05)),
    'elastic_transform': (_elastic_transform, (12.5, 16.25, 21.25, 25, 30)),
    'pixelate': (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    'jpeg_compression': (_jpeg_compression, (25, 18, 15, 10, 7)),
}


class RobustnessSettings(BaseModel):
    """What a measurement of robustness covers; ``robustness`` of a suite's row. See docs/robustness.md."""

    model_config = ConfigDict(strict=True, extra='forbid', frozen=True)

    images: PositiveInt = 50
    corruptions: list[str] = list(CORRUPTIONS)
    severities: list[Annotated[int, Field(ge=1, le=5)]] = list(SEVERITIES)
    scales: list[PositiveFloat] = [0.5, 0.75, 1.0, 1.5, 2.0]
    shifted_root: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator('corruptions')
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in CORRUPTIONS:
                raise ValueError(f'unknown: {name}\n{did_you_mean(name, CORRUPTIONS)}Known: {", ".join(CORRUPTIONS)}.')
        return names
