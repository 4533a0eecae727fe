"""Intervals, differences, groups and plans: against closed forms, scipy, brute force and simulation."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from replk_mm.analysis.statistics import MeanScores, best_group, holm, interval, paired_difference, plan


def names(count: int) -> tuple[str, ...]:
    return tuple(f'{i:04}.png' for i in range(count))


def seeds(*values, bounds=(-np.inf, np.inf)) -> list[MeanScores]:
    """A row: values (images,) of each seed."""
    return [MeanScores(names(len(x)), x, bounds) for x in values]


def constant(*values, images: int = 5) -> list[MeanScores]:
    """A row without any variation between images."""
    return seeds(*([x] * images for x in values))


@dataclass
class Counts:
    """Intersection and union of each image and class, with the interface of a test's statistics."""

    images: tuple[str, ...]
    counts: np.ndarray  # (images, 2, classes)

    def score(self, weights=None):
        weights = np.ones((1, len(self.images))) if weights is None else weights
        intersection, union = np.moveaxis(np.tensordot(weights, self.counts, 1), 1, 0)
        return 100 * (intersection / union).mean(-1)


def welch(parts, each) -> float:
    parts = np.asarray(parts, float)
    return parts.sum() ** 2 / (parts**2 / (np.asarray(each) + 2)).sum() - 2


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_of_a_mean_is_the_t_interval(rng):
    x = rng.normal(40, 10, 30)
    found = interval(seeds(x))
    freedom = welch((x - x.mean()) ** 2, 1)
    assert 15 < freedom < 29  # somewhat fewer than images
    expected = stats.t.interval(0.95, freedom, x.mean(), stats.sem(x))
    np.testing.assert_allclose([found.value, found.low, found.high], [x.mean(), *expected])
    assert (found.seeds, found.images, found.covers_seeds) == (1, 30, False)


def test_of_a_mean_is_close_to_bca(rng):
    x = rng.gamma(8, 5, 80)
    found = interval(seeds(x), 0.9)
    ends = stats.bootstrap((x,), np.mean, confidence_level=0.9, method='BCa', rng=rng).confidence_interval
    np.testing.assert_allclose([found.low, found.high], ends, atol=0.1 * (ends.high - ends.low))


def test_of_seeds_without_images_is_the_t_interval():
    x = [40.0, 41.5, 40.7]
    found = interval(constant(*x))
    np.testing.assert_allclose([found.low, found.high], stats.t.interval(0.95, 2, np.mean(x), stats.sem(x)))
    assert found.covers_seeds


def test_of_crossed_seeds_and_images_has_the_variance_of_anova(rng):
    s, n = 4, 12
    x = 30 + rng.normal(0, 3, (s, 1)) + rng.normal(0, 8, n) + rng.normal(0, 4, (s, n))
    by_seed, by_image = x.mean(1), x.mean(0)
    of_seeds = n * by_seed.var(ddof=1)
    of_images = s * by_image.var(ddof=1)
    rest = ((x - by_seed[:, None] - by_image + x.mean()) ** 2).sum() / ((s - 1) * (n - 1))
    assert of_images > rest
    freedom = welch((by_image - by_image.mean()) ** 2, 1)
    parts = np.array([of_seeds, of_images - rest]) / (s * n)
    satterthwaite = parts.sum() ** 2 / (parts**2 / [s - 1, freedom]).sum()
    found = interval(seeds(*x))
    np.testing.assert_allclose((found.high - found.low) / 2, stats.t.ppf(0.975, satterthwaite) * parts.sum() ** 0.5)
    # Howe's, of a difference. The pooled variance between seeds, half of the first row's, counts for the other row.
    found = paired_difference(seeds(*x), seeds(*np.full((s, n), 20.0)))
    squared = [stats.t.ppf(0.975, f) ** 2 for f in (s - 1, freedom)] @ (parts * [1.5, 1])
    np.testing.assert_allclose((found.high - found.low) / 2, squared**0.5)


def test_difference_of_crossed_rows_has_the_variance_of_anova(rng):
    s, n = 3, 12
    rows = 30 + rng.normal(0, 1, (2, s, 1)) + rng.normal(0, 8, (2, 1, n)) + rng.normal(0, 4, (2, s, n))
    by_image, by_seed = rows.mean(1), rows.mean(2)
    rest = rows - by_seed[:, :, None] - by_image[:, None] + rows.mean((1, 2), keepdims=True)
    paired = by_image[0] - by_image[1]
    of_images = paired.var(ddof=1) / n - (rest**2).sum() / ((s - 1) * (n - 1)) / (s * n)
    between = by_seed.var(1, ddof=1)
    of_seeds = np.maximum(between, between.mean()).sum() / s
    freedoms = min(2 * (s - 1), welch((s - 1) * between, s - 1)), welch((paired - paired.mean()) ** 2, 1)
    squared = [stats.t.ppf(0.975, f) ** 2 for f in freedoms] @ np.array([of_seeds, of_images])
    found = paired_difference(*(seeds(*row) for row in rows))
    np.testing.assert_allclose((found.high - found.low) / 2, squared**0.5)


@pytest.mark.parametrize('count', [40, 400])
def test_of_a_ratio_by_brute_force(rng, count):
    counts = rng.gamma(0.5, 1, (count, 1, 3)) * np.array([[0.6], [1.0]]) + rng.random((count, 2, 3)) * [[0], [1]]
    counts *= rng.random((count, 1, 3)) < [1, 0.9, 0.3]
    order = rng.permutation(count)
    found = interval([Counts(tuple(names(count)[i] for i in order), counts[order])])

    def miou(chosen):
        return 100 * np.mean([counts[chosen, 0, c].sum() / counts[chosen, 1, c].sum() for c in range(3)])

    each = count // min(count, 200)  # neighbours are left out together
    every, groups = np.arange(count), count // each
    left = np.array([miou(np.delete(every, range(i, i + each))) for i in range(0, count, each)])
    centre = groups * miou(every) - (groups - 1) * left.mean()
    squares = (groups - 1) / groups * (left - left.mean()) ** 2
    margin = stats.t.ppf(0.975, welch(squares, 1)) * squares.sum() ** 0.5
    np.testing.assert_allclose([found.value, found.low, found.high], [miou(every), centre - margin, centre + margin])


def test_unequal_groups_of_a_mean_have_its_variance(rng):
    x = rng.normal(50, 5, 350)
    found = interval(seeds(x))
    assert found.high - found.low == pytest.approx(2 * 1.97 * stats.sem(x), rel=0.15)
    assert (found.high + found.low) / 2 == pytest.approx(x.mean())


def test_difference_is_the_paired_t_test(rng):
    a = rng.normal(40, 10, 25)
    b = a - 1 + rng.normal(0, 2, 25)
    found = paired_difference(seeds(a), seeds(b))
    paired = stats.ttest_rel(a, b)
    freedom = welch((a - b - (a - b).mean()) ** 2, 1)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(paired.statistic), freedom))
    assert (found.low > 0) == (found.p < 0.05)
    assert (found.first, found.second, found.value) == ('A', 'B', pytest.approx((a - b).mean()))
    mirrored = paired_difference(seeds(b), seeds(a))
    assert (mirrored.low, mirrored.high, mirrored.p) == pytest.approx((-found.high, -found.low, found.p))


def test_a_p_value_is_that_of_the_interval_that_ends_at_zero(rng):
    """Also of a metric whose bias moves the interval."""
    counts = rng.gamma(0.5, 1, (2, 9, 2, 3))
    counts[:, :, 1] += counts[:, :, 0]
    a, b = ([Counts(names(9), x)] for x in counts)
    found = paired_difference(a, b)
    assert abs((found.low + found.high) / 2 - found.value) > 0.05
    ends = paired_difference(a, b, 1 - found.p)
    assert min(abs(ends.low), abs(ends.high)) < 1e-6


def test_difference_without_images_is_the_t_test():
    a, b = [40.0, 41.0, 42.0], [37.5, 38.5, 39.5]  # equal deviations: nothing to choose between own and pooled
    found = paired_difference(constant(*a), constant(*b))
    expected = stats.ttest_ind(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    np.testing.assert_allclose([found.low, found.high], expected.confidence_interval())


def test_seeds_that_agree_by_luck_take_the_pooled_variance():
    rows = dict(a=constant(50, 50.001, 50.002), b=constant(49, 49.5, 50), c=constant(40, 40.4), d=constant(30))
    found = best_group(rows)
    squares = np.array([2 * 0.001**2, 2 * 0.5**2, 0.08])  # sums of them; a row with one seed has none
    pooled = squares.sum() / 5
    width = stats.t.ppf(0.975, min(5, welch(squares, [2, 2, 1]))) * (pooled / 3) ** 0.5
    assert found.intervals['d'].high - 30 == pytest.approx(width * 3**0.5)
    assert found.intervals['a'].high - 50.001 == pytest.approx(width)
    assert found.intervals['b'].high - 49.5 == pytest.approx(width * (0.25 / pooled) ** 0.5)  # its own is larger


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005, 0.9]), [0.04, 0.09, 0.09, 0.025, 0.9])
    assert holm([]).size == 0


def test_group_of_the_best():
    rows = dict(b=constant(49.8, 50.3, 50.1), c=constant(40, 40.2, 40.5), a=constant(50.2, 50.6, 50))
    found = best_group(rows)
    assert (found.leader, found.members) == ('a', ('a', 'b'))
    assert [(d.first, d.second) for d in found.differences] == [('a', 'b'), ('a', 'c')]
    assert found.differences[0].p_adjusted == pytest.approx(found.differences[0].p)  # the largest of three
    assert found.differences[1].p_adjusted >= 2 * found.differences[1].p * (1 - 1e-9)  # all pairs count
    assert list(found.intervals) == ['a', 'b', 'c']


def test_one_seed_groups_all_rows_and_says_that_it_is_about_checkpoints(rng):
    x = rng.normal(30, 10, 50)
    rows = dict(a=seeds(x + rng.normal(0, 1, 50)), b=seeds(x - 9))
    found = best_group(rows)
    assert found.members == ('a', 'b')
    assert found.differences[0].p_adjusted < 1e-6
    assert not found.differences[0].covers_seeds
    several = best_group(rows | dict(c=seeds(x - 20, x - 20.5, x - 19.5)))  # its seeds tell how much trainings differ
    assert several.members == ('a',)
    assert several.differences[0].covers_seeds


@pytest.mark.parametrize('deviation', [0.0, 3.0])
def test_two_seeds_that_agree_are_not_a_claim(rng, deviation):
    """21.11 ± 0.0032 and 20.71 ± 0.20 on 233 photographs."""
    shared = rng.normal(0, 15, 233)

    def row(mean, spread):
        found = []
        for value in (mean - spread / 2**0.5, mean + spread / 2**0.5):
            x = shared + rng.normal(0, deviation, 233)
            found.append(x - x.mean() + value)
        return seeds(*found, bounds=(0, 100))

    found = best_group(dict(a=row(21.11, 0.0032), b=row(20.71, 0.20)))
    assert found.members == ('a', 'b')
    assert found.differences[0].p > 0.1
    assert found.differences[0].low < 0 < found.differences[0].high


def test_bounds_clip_and_one_image_has_no_interval():
    few = interval(seeds([0.0, 1.0, 9.0], bounds=(0, 100)))
    assert few.low == 0
    found = paired_difference(seeds([3.0]), seeds([1.0]))
    assert (found.value, found.low, found.high, found.p, found.p_adjusted) == (2, None, None, None, None)
    same = paired_difference(constant(3.0), constant(3.0))
    assert (same.low, same.high, same.p) == (0, 0, 1)


def test_other_images_are_rejected():
    short, long = seeds([1.0, 2, 3]), seeds([1.0, 2, 3, 4])
    for call in (
        lambda: interval([*short, *long]),
        lambda: interval([]),
        lambda: paired_difference(short, long),
        lambda: best_group(dict(a=short, b=long)),
        lambda: plan(dict(a=short, b=long), 1),
        lambda: plan(dict(a=short), 1),
    ):
        with pytest.raises(ValueError, match='images|rows'):
            call()


def test_plan_of_images_is_the_normal_formula(rng):
    x = rng.normal(50, 10, 200)
    noise = rng.normal(0, 5, 200)
    found = plan(dict(a=seeds(x), b=seeds(x + noise)), 0.3, power=0.9)
    sizes = (stats.norm.ppf(0.975) + stats.norm.ppf(0.9)) * noise.std(ddof=1) / np.array([0.3, found.detectable])
    assert found.images == pytest.approx(sizes[0] ** 2, rel=0.01)
    assert sizes[1] ** 2 == pytest.approx(200, rel=0.03)
    assert found.seeds is None  # one seed does not tell how trainings differ


def test_plan_of_seeds_is_about_the_power_of_the_t_test():
    """With twenty rows, whose pooled variance is almost known, and the larger of it and the own one."""
    rows = {str(i): constant(40 + i, 41 + i, 42 + i) for i in range(20)}
    found = plan(rows, 3.0)
    freedom, alpha = 20 * (found.seeds - 1), 0.05 / 190
    least = stats.nct.sf(stats.t.ppf(1 - alpha / 2, freedom), freedom, 3.0 / (2 / found.seeds) ** 0.5)
    assert 0.8 < least < 0.99
    assert plan(rows, 4.0).seeds < found.seeds < plan(rows, 2.0).seeds
    assert found.images is None  # more images do not help


@pytest.mark.slow
def test_plan_is_the_power_in_simulations(rng):
    detectable = plan(dict(a=constant(40, 41, 42), b=constant(37, 38, 39)), 1.0).detectable
    tries = 1500
    p = [
        paired_difference(constant(*rng.normal(detectable, 1, 3)), constant(*rng.normal(0, 1, 3))).p
        for _ in range(tries)
    ]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.8, abs=0.035)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 3])
def test_claims_of_tables_without_a_difference(rng, count):
    """Seeds, shared images, and images on which rows and trainings differ; at most 5 % of tables may have a claim."""
    tables, n, claims, covered = 300, 30, 0, 0
    for _ in range(tables):
        x = rng.normal(50, 8, n) + rng.normal(0, 2, (8, 1, n)) + rng.normal(0, 2, (8, count, n))
        x += rng.normal(0, 1, (8, count, 1))
        found = best_group({str(i): seeds(*row) for i, row in enumerate(x)})
        claims += len(found.members) < 8
        covered += found.intervals['0'].low <= 50 <= found.intervals['0'].high
    assert claims <= stats.binom.ppf(0.999, tables, 0.05)
    assert covered >= stats.binom.ppf(0.001, tables, 0.95)
