"""Intervals, paired differences and groups of metrics, over test images and training seeds; see docs/statistics.md.

Every interval, p-value and group that a page or a command shows comes from here. A row of a table is a sequence of
scores on the same images, one for each training seed; :class:`Scores` is what a score has to provide.

- Images: the delete-one jackknife. An image's influence is what the metric loses without it (Tukey 1958); more than 200
  images are left out in groups (Busing et al. 1999). The degrees of freedom follow from the influences (Welch 1947;
  Johnson and Rust 1992), so that few images with a rare class widen the interval. Its centre is corrected for bias.
- Seeds: the variance between trainings. A row's is the larger of its own and the one pooled over all rows. It contains
  that trainings differ on the chosen images, which therefore is left out of the images' part (Cameron et al. 2011).
- Both parts make a t interval of a row, with degrees of freedom by Satterthwaite (1946). Differences take the wider
  interval of Howe (1974), the half-widths of two t intervals in quadrature, since Holm's correction needs its tails.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

#: Most groups of images of the jackknife.
_GROUPS = 200
#: Most seeds, and images as a multiple of the present number, that a plan considers.
_MOST_SEEDS, _MOST_TIMES = 100, 1000


class Scores(Protocol):
    """A metric of one checkpoint that can be computed for any weights of the test images."""

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the images."""

    def score(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        """The metric, ``(draws,)``, of data sets in which image ``i`` occurs ``weights[draw, i]`` times."""


@dataclass(frozen=True)
class MeanScores:
    """A value per image, whose mean is the metric."""

    images: tuple[str, ...]  #: names of the images, or of other independent units
    values: Sequence[float] | NDArray  #: ``(images,)``
    bounds: tuple[float, float] = (-math.inf, math.inf)  #: least and largest possible mean

    def score(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        weights = np.ones((1, len(self.images))) if weights is None else weights
        return weights @ np.asarray(self.values, float) / weights.sum(1)


@dataclass(frozen=True)
class Interval:
    """A metric and its confidence interval."""

    value: float  #: mean over the seeds of the metric on all images
    #: lower end; None if a single image, or a metric that is undefined without some image, allows no interval
    low: float | None
    high: float | None  #: upper end
    seeds: int  #: number of trainings
    images: int  #: number of test images
    covers_seeds: bool  #: whether the interval covers other training seeds. If not, it is about these checkpoints only


@dataclass(frozen=True)
class Difference(Interval):
    """The difference of two rows on the same images; ``seeds`` is the smaller number of the two."""

    first: str  #: name of the row with the minuend
    second: str  #: name of the other row
    p: float | None  #: two-sided p-value of no difference; None where there is no interval
    p_adjusted: float | None  #: ``p`` after Holm's correction over all pairs of the table


@dataclass(frozen=True, kw_only=True)
class BestGroup:
    """The rows of a table that are not distinguishable from the best."""

    leader: str  #: the row with the highest value
    #: the leader, and every row whose difference from it is not significant after Holm's correction; the highest value
    #: first. All rows, if no row has two seeds: that says nothing about other trainings
    members: tuple[str, ...]
    intervals: dict[str, Interval]  #: of each row
    differences: tuple[Difference, ...]  #: of the leader from each other row, the smallest first


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What it takes to distinguish two rows of a table after Holm's correction."""

    #: seeds of each row that suffice on as many images; None if more than 100, or if no row has two seeds
    seeds: int | None
    images: int | None  #: images that suffice with as many seeds; None if more than 1000 times as many
    detectable: float  #: the difference, in points, that the present seeds and images distinguish with the same power


@dataclass(frozen=True)
class _Error:
    """The two parts of the variance of an estimate, with their degrees of freedom; arrays for several of them."""

    image: float
    image_freedom: float
    seed: Any
    seed_freedom: Any

    def row_margin(self, alpha: float) -> float:
        """Half the width of the ``1 - alpha`` interval of a row (Satterthwaite 1946)."""
        parts = np.array([self.image, self.seed])
        freedom = np.array([self.image_freedom, max(self.seed_freedom, 1)])
        squares = (parts**2 / freedom).sum()
        return float(stats.t.isf(alpha / 2, parts.sum() ** 2 / squares) * np.sqrt(parts.sum())) if squares else 0.0

    def margin(self, alpha: float) -> NDArray[np.float64]:
        """Half the width of the ``1 - alpha`` interval of a difference (Howe 1974)."""
        with np.errstate(over='ignore', invalid='ignore'):
            seed = special.stdtrit(np.maximum(self.seed_freedom, 1), alpha / 2) ** 2 * self.seed
            return np.sqrt(special.stdtrit(self.image_freedom, alpha / 2) ** 2 * self.image + seed)

    def p_value(self, estimate: float) -> float:
        """The ``alpha`` whose interval ends at 0."""
        if self.image + self.seed == 0 or estimate == 0:
            return float(estimate == 0)
        return math.exp(_bisect(lambda log: bool(self.margin(math.exp(log)) <= abs(estimate)), -600.0, 0.0))


@dataclass(frozen=True)
class _Estimate:
    """The metric of a row, or a difference of two."""

    value: float
    bias: float
    #: ``(groups,)``, scaled so that its squares add up to the variance from the choice of images
    influence: NDArray[np.float64]
    seeds: int
    images: list[str]
    bounds: tuple[float, float]
    between: float = 0.0  #: variance between trainings on these images
    #: the part of the squares of ``influence`` that ``seed_variance`` has too: trainings that differ on the chosen
    #: images
    interaction: float = 0.0
    seed_variance: float = 0.0  #: of ``value``, from the choice of seeds
    seed_freedom: float = 0.0  #: its degrees of freedom; 0 if it is unknown

    def __sub__(self, other: '_Estimate') -> '_Estimate':
        return replace(
            self,
            value=self.value - other.value,
            bias=self.bias - other.bias,
            influence=self.influence - other.influence,
            seeds=min(self.seeds, other.seeds),
            bounds=(self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0]),
            interaction=self.interaction + other.interaction,
            seed_variance=self.seed_variance + other.seed_variance,
        )

    @property
    def error(self) -> _Error:
        squares = self.influence**2
        freedom = _degrees_of_freedom(squares, 1, len(squares) - 1)
        image = float(np.maximum(squares.sum() - self.interaction, 0))
        return _Error(image, freedom, self.seed_variance, self.seed_freedom)

    def interval(self, level: float, margin: float | None = None) -> Interval:
        margin, ends = self.error.row_margin(1 - level) if margin is None else margin, (None, None)
        if math.isfinite(self.value + margin):
            ends = np.clip([self.value - self.bias - margin, self.value - self.bias + margin], *self.bounds).tolist()
        return Interval(self.value, *ends, self.seeds, len(self.images), bool(self.seed_freedom > 0))

    def difference(self, level: float, first: str, second: str) -> Difference:
        found = self.interval(level, float(self.error.margin(1 - level)))
        p = None if found.low is None else self.error.p_value(self.value - self.bias)
        return Difference(**vars(found), first=first, second=second, p=p, p_adjusted=p)


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least number from which on a condition holds, which does at ``high``."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _degrees_of_freedom(parts: NDArray, each: ArrayLike, most: float) -> float:
    """Of a sum of independent estimates of variance with degrees of freedom ``each``; Welch (1947)."""
    squares = (parts**2 / (np.asarray(each) + 2)).sum()
    return min(max(parts.sum() ** 2 / squares - 2, 1.0), most) if squares > 0 else most


def _jackknife(row: Sequence[Scores]) -> _Estimate:
    images = sorted(row[0].images) if row else []
    if not images:
        raise ValueError('a row has no scores, or they have no images')
    count, groups = len(images), min(len(images), _GROUPS)
    group = np.arange(count) * groups // count  # neighbours in the order of names, such as frames of a video
    share = count / np.bincount(group)
    values, influences, biases = np.zeros(len(row)), np.zeros((len(row), groups)), np.zeros(len(row))
    for i, scores in enumerate(row):
        if sorted(scores.images) != images:
            raise ValueError('the scores of a row are of different images')
        place = np.argsort(np.argsort(scores.images, kind='stable'))
        values[i] = scores.score()[0]
        left = scores.score((np.arange(groups)[:, None] != group[place]).astype(float)) if groups > 1 else math.nan
        centre = groups * values[i] - ((1 - 1 / share) * left).sum()
        with np.errstate(invalid='ignore', divide='ignore'):
            influences[i] = (share * values[i] - (share - 1) * left - centre) / np.sqrt((share - 1) * groups)
        biases[i] = values[i] - centre
    influence, between, interaction = influences.mean(0), 0.0, 0.0
    if len(row) > 1:
        interaction = float(((influences - influence) ** 2).sum() / (len(row) - 1)) / len(row)
        between = float(values.var(ddof=1))
    bounds = getattr(row[0], 'bounds', (0.0, 100.0))  # metrics of a test are in percent
    value, bias = float(values.mean()), float(biases.mean())
    return _Estimate(value, bias, influence, len(row), images, bounds, between, interaction)


def _estimate(rows: Mapping[str, Sequence[Scores]]) -> dict[str, _Estimate]:
    """Rows of a table with the larger of their own and the pooled variance between seeds, as few may agree by luck."""
    found = {name: _jackknife(row) for name, row in rows.items()}
    freedom = np.array([row.seeds - 1 for row in found.values()])
    if not freedom.any():
        return found
    between = np.array([row.between for row in found.values()])
    seed_freedom = _degrees_of_freedom(freedom * between, freedom, float(freedom.sum()))
    variances = np.maximum(between, np.average(between, weights=freedom))
    return {
        name: replace(row, seed_variance=float(variance) / row.seeds, seed_freedom=seed_freedom)
        for (name, row), variance in zip(found.items(), variances, strict=True)
    }


def _differences(rows: Mapping[str, _Estimate], level: float) -> list[Difference]:
    """Of all pairs, with adjusted p-values."""
    if any(row.images != first.images for first, row in pairwise(rows.values())):
        raise ValueError(f'{", ".join(rows)}: tested on different images')
    found = [(rows[a] - rows[b]).difference(level, a, b) for a, b in combinations(rows, 2)]
    adjusted = holm([1.0 if d.p is None else d.p for d in found]).tolist()
    return [replace(d, p_adjusted=None if d.p is None else p) for d, p in zip(found, adjusted, strict=True)]


def interval(row: Sequence[Scores], level: float = 0.95) -> Interval:
    """The confidence interval of a metric.

    Args:
        row: One for each training seed, on the same images.
        level: Confidence level.

    Raises:
        ValueError: If the scores are of different images, or there are none.
    """
    return _estimate({'': row})[''].interval(level)


def paired_difference(a: Sequence[Scores], b: Sequence[Scores], level: float = 0.95) -> Difference:
    """The difference of two rows, ``a`` minus ``b``, on the same images.

    Trainings count as independent. This is conservative if equal seeds share more than the images, such as a subset of
    the training set.

    Raises:
        ValueError: If the scores are of different images, or there are none.
    """
    return _differences(_estimate(dict(A=a, B=b)), level)[0]


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjusted p-values (Holm 1979): to call those up to ``alpha`` significant has that family-wise error."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def best_group(rows: Mapping[str, Sequence[Scores]], level: float = 0.95) -> BestGroup:
    """The rows of a table that are not distinguishable from the best.

    Args:
        rows: By name, each with one score for each training seed; all on the same images.
        level: Confidence level; ``1 - level`` is the family-wise error.

    Raises:
        ValueError: If the scores are of different images, or there are none.
    """
    ranked = dict(sorted(_estimate(rows).items(), key=lambda row: -np.nan_to_num(row[1].value, nan=-math.inf)))
    differences = _differences(ranked, level)[: max(0, len(ranked) - 1)]  # the leader's pairs are the first
    tested = [d for d in differences if d.covers_seeds and d.p_adjusted is not None]
    beaten = [d.second for d in tested if (d.p_adjusted or 0.0) <= 1 - level]
    return BestGroup(
        leader=next(iter(ranked)),
        members=tuple(name for name in ranked if name not in beaten),
        intervals={name: row.interval(level) for name, row in ranked.items()},
        differences=tuple(differences),
    )


def plan(rows: Mapping[str, Sequence[Scores]], difference: float, power: float = 0.8, level: float = 0.95) -> Plan:
    """How many seeds or images distinguish two rows of a table, from the variances that its rows have shown.

    Args:
        rows: Two or more; see :func:`best_group`.
        difference: To distinguish, in points.
        power: Probability of distinguishing it.
        level: Confidence level of the table.

    Raises:
        ValueError: If there are not two rows, or they are of different images.
    """
    found = list(_estimate(rows).values())
    if len(found) < 2 or any(row.images != found[0].images for row in found):
        raise ValueError('a plan needs two rows or more on the same images')
    freedom = [row.seeds - 1 for row in found]
    weights = freedom if any(freedom) else None
    between = float(np.average([row.between for row in found], weights=weights))
    interaction = float(np.average([row.interaction * row.seeds for row in found], weights=weights))
    errors = [(a - b).error for a, b in combinations(found, 2)]
    image, image_freedom = np.mean([(error.image, error.image_freedom) for error in errors], axis=0).tolist()

    @cache
    def estimates(each: float) -> tuple[NDArray, NDArray]:
        """Of the seed variance of two rows, relative to it, as often simulated; with the degrees of freedom."""
        own = np.random.default_rng(0).chisquare(each, (1000, len(found))) / each
        freedoms = own.sum(1) ** 2 * (each + 2) / (own**2).sum(1) - 2
        return np.maximum(own, own.mean(1, keepdims=True))[:, :2].mean(1), np.clip(freedoms, 1, len(found) * each)

    def distinguishes(points: float, seeds: int, times: float = 1.0) -> bool:
        seed = 2 * (max(0.0, between - interaction) + interaction / times) / seeds
        ratio, freedoms = estimates(max(seeds - 1.0, sum(freedom) / len(found), 1.0))
        error = _Error(image / times, max(1.0, image_freedom * times), seed * ratio, freedoms)
        excess = points - error.margin((1 - level) / len(errors))  # Holm's first step
        return float(special.ndtr(excess / max(math.sqrt(image / times + seed), 1e-300)).mean()) >= power

    present, images = min(row.seeds for row in found), len(found[0].images)
    seeds = range(2, _MOST_SEEDS + 1 if weights else 0)
    times = math.inf
    if distinguishes(difference, present, _MOST_TIMES):
        times = _bisect(lambda x: distinguishes(difference, present, x), 2 / images, _MOST_TIMES)
    return Plan(
        seeds=next((n for n in seeds if distinguishes(difference, n)), None),
        images=math.ceil(times * images) if times < math.inf else None,
        detectable=_bisect(lambda points: distinguishes(points, present), 0.0, 1e6),
    )
