"""Effective receptive field: the contribution of each pixel of an image to a position of a feature map.

Measures any ``nn.Module``, and needs torch and numpy only.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", 2016, take the gradient
of the center with respect to the image, and find a Gaussian in theory. This module follows Ding et al., "Scaling Up
Your Kernels to 31x31" (arXiv 2203.06717; the folder erf/ of their repository):

- The center is position ``[H // 2, W // 2]`` of the map, after ReLU, summed over the channels.
- The *contribution score* of a pixel is the positive part of the gradient, summed over the channels of the image and
  averaged over images.
- The *paper's scale* is log10(score + 1) divided by its largest value. Heat maps show it, and the published areas use
  it.
- The *area* for a share t is that of the smallest square around pixel ``[size // 2, size // 2]`` that holds t of the
  sum.

Where gradients are small, log10(score + 1) is proportional to the score; where they are large it is flat. Gradients
ten times as large therefore give other areas in that scale, and areas of the scores themselves are reported too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.errors import UserError

#: Shares of the contribution whose areas are reported, as in the paper's table.
SHARES = (0.2, 0.3, 0.5, 0.99)
#: The middle of a map, as fractions of its height and width.
CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class GaussianFit:
    """A 2-D Gaussian fitted to contribution scores; lengths are in pixels."""

    center: tuple[float, float]  #: row and column of the peak
    widths: tuple[float, float]  #: standard deviations along the long and the short axis
    angle: float  #: of the long axis, degrees from the horizontal, counterclockwise in the image, in (-90, 90]
    residual: float  #: norm of (scores - fit) over norm of scores: 0 for a Gaussian, at most 1


@dataclass(frozen=True)
class ImageShares:
    """The side of the square that holds a share of the contribution, for :mod:`replk_mm.analysis.statistics`."""

    images: tuple[str, ...]  #: names
    profiles: np.ndarray  #: contribution of each image in the rings around a pixel, ``(images, rings)``
    share: float = 0.5
    bounds = (0.0, float('inf'))

    def score(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Sides ``(draws,)`` in pixels, interpolated, for images that occur ``weights`` ``(draws, images)`` times."""
        weights = np.ones((1, len(self.images))) if weights is None else weights
        cumulative = np.pad(np.cumsum(weights @ self.profiles, 1), ((0, 0), (1, 0)))
        # Half a pixel is within radius 0.5; a share of 0 in a ring would make the inverse ambiguous.
        radii = np.maximum(np.arange(cumulative.shape[1]) - 0.5, 0)
        return np.array(
            [2 * np.interp(self.share, row / row[-1], radii) if row[-1] > 0 else np.nan for row in cumulative]
        )


@dataclass(frozen=True)
class ReceptiveField:
    """The effective receptive field of a position of a map, averaged over images."""

    scores: np.ndarray  #: contribution scores ``(H, W)`` in float64
    profiles: np.ndarray  #: of each image, see :func:`ring_profile`, ``(images, rings)``
    stage: int  #: index of the map among the outputs
    map_shape: tuple[int, ...]  #: shape ``(1, C, H, W)`` of the map
    silent: int  #: number of images without any gradient


def effective_receptive_field(
    network: nn.Module, images: Iterable[Tensor], stage: int | None = None, position: tuple[float, float] = CENTER
) -> ReceptiveField:
    """Measure any network that returns a feature map ``(N, C, H, W)`` or several.

    Args:
        network: In evaluation mode. Of a classifier, take the part before its pooling.
        images: Normalized images ``(1, C, H, W)`` of one size, on the network's device.
        stage: Index of the map among the network's outputs. Defaults to the last.
        position: Fractions of the map's height and width, from 0 to below 1. Defaults to the center.

    Raises:
        FloatingPointError: If a gradient is not finite.
        UserError: If the network is in training mode, or has no such map.
    """
    if any(module.training for module in network.modules()):
        raise UserError(f'{type(network).__name__}: in training mode, dropout and BatchNorm change it\nCall eval().')
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    total: Any = 0.0
    profiles: list[np.ndarray] = []
    shape: tuple[int, ...] = ()
    silent = index = 0
    try:
        network.requires_grad_(False)
        for number, image in enumerate(images):
            found, index, shape = contributions(network, image, stage, [position])
            scores = found[0].cpu().numpy()
            if not np.isfinite(scores).all():
                raise FloatingPointError(f'image {number}: the gradient of {type(network).__name__} is not finite')
            total = total + scores
            silent += not scores.any()
            profiles.append(ring_profile(scores, pixel_at(position, scores.shape)))
    finally:
        for parameter in trainable:
            parameter.requires_grad_()
    if not profiles:
        raise UserError('effective_receptive_field: no images\nGive at least one tensor (1, C, H, W).')
    return ReceptiveField(total / len(profiles), np.stack(profiles), index, shape, silent)


def contributions(
    network: nn.Module, image: Tensor, stage: int | None = None, positions: Sequence[tuple[float, float]] = (CENTER,)
) -> tuple[Tensor, int, tuple[int, ...]]:
    """Contribution scores of one image.

    Args:
        network: In evaluation mode.
        image: ``(1, C, H, W)``.
        stage: Index among the network's outputs. Defaults to the last.
        positions: Fractions of the map's height and width.

    Returns:
        Scores ``(positions, H, W)`` in float64; the index of the output; the shape ``(1, C', H', W')`` of the map.

    Raises:
        UserError: If there is no such output, or it is not a feature map.
    """
    leaf = image.detach().clone().requires_grad_()
    out = network(leaf)
    outputs = [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)
    index = len(outputs) - 1 if stage is None else stage
    if not 0 <= index < len(outputs):
        raise UserError(
            f'stage {stage}: {type(network).__name__} has {len(outputs)} outputs\n'
            f'Choose one of 0..{len(outputs) - 1}; out_indices of our backbones selects them.'
        )
    feature = outputs[index]
    if not isinstance(feature, Tensor) or feature.dim() != 4:
        what = f'has shape {tuple(feature.shape)}' if isinstance(feature, Tensor) else f'is a {type(feature).__name__}'
        raise UserError(
            f'{type(network).__name__}: output {index} {what}; it is no feature map (N, C, H, W)\n'
            f'Choose another output (stage), or the part of the network before its pooling.'
        )
    scores: list[Tensor] = []
    for row, column in (pixel_at(position, feature.shape[2:]) for position in positions):
        leaf.grad = None
        # Not autograd.grad, which does not work with activation checkpointing.
        feature[:, :, row, column].relu().sum().backward(retain_graph=len(scores) + 1 < len(positions))
        assert leaf.grad is not None
        scores.append(leaf.grad.double().relu().sum((0, 1)))
    return torch.stack(scores), index, tuple(feature.shape)


def pixel_at(position: tuple[float, float], shape: Sequence[int]) -> tuple[int, int]:
    """Row and column of a position, fractions in [0, 1), in a map or image of a height and width."""
    row, column = (int(fraction * side) for fraction, side in zip(position, shape, strict=True))
    return row, column


def paper_scale(scores: np.ndarray) -> np.ndarray:
    """log10(score + 1) divided by its largest value; zeros stay zeros."""
    logs = np.log1p(scores)  # the base cancels; score + 1 itself would lose scores below 1e-16
    largest = logs.max()
    return logs / largest if largest > 0 else logs


def ring_profile(matrix: np.ndarray, center: tuple[int, int] | None = None) -> np.ndarray:
    """Sums of a matrix over the square rings around a pixel, by default ``[H // 2, W // 2]``.

    Returns ``(max(H, W),)``: one number per radius, 0 beyond the border."""
    rows, columns = (
        np.abs(np.arange(side) - middle)
        for side, middle in zip(matrix.shape, center or pixel_at(CENTER, matrix.shape), strict=True)
    )
    distance = np.maximum.outer(rows, columns).ravel()
    return np.bincount(distance, weights=matrix.ravel(), minlength=max(matrix.shape))


def areas(matrix: np.ndarray, center: tuple[int, int] | None = None) -> dict[str, dict[str, Any]]:
    """The smallest square around a pixel that holds each of :data:`SHARES` of a matrix's sum.

    Args:
        matrix: ``(H, W)``, nowhere negative.
        center: Row and column of the pixel. Defaults to ``[H // 2, W // 2]``.

    Returns:
        By share, ``side`` in pixels and ``ratio``: the part of the image that the square covers; both None if the sum
        is 0. Sides are odd, as the authors' are, unless the square covers the whole image.
    """
    center = center or pixel_at(CENTER, matrix.shape)
    cumulative = np.cumsum(ring_profile(matrix, center))
    largest = max(max(2 * at, 2 * (side - 1 - at), side) for at, side in zip(center, matrix.shape, strict=True))
    found: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        if cumulative[-1] > 0:
            radius = int(np.searchsorted(cumulative, share * cumulative[-1]))
            rows, columns = (
                min(at + radius + 1, side) - max(at - radius, 0) for at, side in zip(center, matrix.shape, strict=True)
            )
            found[str(share)] = dict(side=min(2 * radius + 1, largest), ratio=rows * columns / matrix.size)
        else:
            found[str(share)] = dict(side=None, ratio=None)
    return found


def fit_gaussian(scores: np.ndarray) -> GaussianFit | None:
    """The Gaussian of any center, widths and angle with the least squared error; None if all scores are 0.

    Moments of a receptive field that the image cuts off are too small. A fit to the pixels in the image is not.

    Args:
        scores: ``(H, W)``, nowhere negative.
    """
    if not scores.any():
        return None
    values = torch.from_numpy(scores / scores.max())
    axes = [torch.arange(side, dtype=torch.float64) for side in scores.shape]
    parts = [values.sum(1) / values.sum(), values.sum(0) / values.sum()]
    means = torch.stack([axis @ part for axis, part in zip(axes, parts, strict=True)])
    moments = [(axis - mean) ** 2 @ part for axis, mean, part in zip(axes, means, parts, strict=True)]
    spread = torch.stack(moments).sqrt().clamp(min=0.5)
    # Logarithm of the height, center, and Cholesky factor of the inverse covariance, in units of the spread.
    unknown = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([unknown], max_iter=300, tolerance_change=1e-12, line_search_fn='strong_wolfe')

    def error() -> Tensor:
        optimizer.zero_grad()
        y, x = (axis - mean for axis, mean in zip(axes, means, strict=True))
        y, x = (y / spread[0] - unknown[1])[:, None], x / spread[1] - unknown[2]
        exponent = (y * unknown[3].exp()) ** 2 + (y * unknown[4] + x * unknown[5].exp()) ** 2
        loss = ((values - (unknown[0] - exponent / 2).exp()) ** 2).sum() / (values**2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(error)
        residual = error().detach().sqrt()
    log = unknown.detach()
    factor = torch.tensor([[log[3].exp(), 0], [log[4], log[5].exp()]], dtype=torch.float64) / spread
    variances, directions = torch.linalg.eigh(torch.linalg.inv(factor.T @ factor))
    angle = torch.rad2deg(torch.atan(-directions[0, 1] / directions[1, 1]))  # rows count downwards
    row, column = (means + log[1:3] * spread).tolist()
    short, long = variances.sqrt().tolist()
    return GaussianFit((row, column), (long, short), float(angle), float(residual))
