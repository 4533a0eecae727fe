"""Simulate the statistics of replk_mm/analysis/statistics.py and write the tables of docs/statistics.md.

It takes about five minutes on one core; ``--only`` repeats one table. Images have a difficulty that all networks share,
classes from common to rare, and the networks' own effects: of the training seed, of the image, and of both.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from replk_mm.analysis.statistics import best_group, holm, interval, plan
from replk_mm.text import update_page

CLASSES = 12
DRAWS = 1000


@dataclass
class Counts:
    """Intersections, predicted and labelled pixels of the classes in each image; a constant raises the metric."""

    images: tuple[str, ...]
    counts: NDArray  # (images, 3 * classes)
    raised: float = 0.0

    def score(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        weights = np.ones((1, len(self.images))) if weights is None else weights
        return miou(weights @ self.counts) + self.raised


def miou(sums: NDArray) -> NDArray[np.float64]:
    """``(draws, 3 * classes)`` to percent, over the classes that occur."""
    hits, predicted, labelled = np.split(sums, 3, axis=-1)
    union = predicted + labelled - hits
    there = union > 0
    return 100 * (hits / np.where(there, union, 1)).sum(-1) / there.sum(-1)


def simulate(
    rng: np.random.Generator,
    images: int,
    rarest: float,
    shape: tuple[int, int] = (1, 1),
    seed_effect: NDArray | float = 0.0,
) -> NDArray:
    """Counts ``(rows, seeds, images, 3 * classes)`` of ``shape`` networks that are equal but for chance.

    ``rarest`` is the share of the images that have the rarest class. ``seed_effect`` is the standard deviation between
    trainings, in logits: a number or ``(rows, 1, 1, 1)``.
    """
    size = images, CLASSES
    area = (rng.random(size) < np.geomspace(1, rarest, CLASSES)) * rng.lognormal(size=size)
    logits = np.linspace(2, 0, CLASSES) + 0.8 * rng.normal(size=(images, 1)) + 0.6 * rng.normal(size=size)
    logits = logits + 0.2 * rng.normal(size=(shape[0], 1, *size)) + 0.2 * rng.normal(size=(*shape, *size))
    logits = logits + seed_effect * (rng.normal(size=(*shape, 1, 1)) + rng.normal(size=(*shape, 1, CLASSES)))
    hits = area / (1 + np.exp(-logits))
    confused = rng.gamma(0.15, size=size) * (np.geomspace(1, rarest, CLASSES) + 0.05) + 0.3 * np.eye(1, CLASSES)
    lost = (area - hits).sum(-1, keepdims=True) * confused / confused.sum(-1, keepdims=True)
    return np.concatenate([hits, hits + lost, np.broadcast_to(area, hits.shape)], axis=-1)


def as_rows(counts: NDArray) -> dict[str, list[Counts]]:
    names = tuple(f'{i:04}' for i in range(counts.shape[2]))
    return {str(row): [Counts(names, part) for part in seeds] for row, seeds in enumerate(counts)}


@cache
def truth(rarest: float, seed_effect: float) -> float:
    """The expected metric on all images: of 400,000 images, or of 1,000 trainings on 2,000 images each."""
    rng = np.random.default_rng(0)
    if not seed_effect:
        return float(miou(sum(simulate(rng, 20000, rarest).sum((0, 1, 2)) for _ in range(20))))
    return float(np.mean([miou(simulate(rng, 2000, rarest, (1, 40), seed_effect).sum(2)).mean() for _ in range(25)]))


def share(successes: int, trials: int) -> str:
    """A percentage and its Monte Carlo standard error."""
    p = successes / trials
    return f'{100 * p:.1f} ± {100 * math.sqrt(max(p * (1 - p), 1 / trials**2) / trials):.1f}'


def bootstrap_ends(rng: np.random.Generator, counts: NDArray) -> dict[str, NDArray]:
    """The hierarchical percentile bootstrap, and BCa for one seed. ``counts`` is (seeds, images, 3 * classes)."""
    seeds, images = counts.shape[:2]
    drawn = rng.integers(images, size=(DRAWS, images)) + images * np.arange(DRAWS)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=DRAWS * images).reshape(DRAWS, images).astype(float)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    drawn = (miou(weights @ counts) * of_seeds.T).sum(0)
    found = {'percentile': np.quantile(drawn, [0.025, 0.975])}
    if seeds == 1:
        total = counts[0].sum(0)
        left = miou(total - counts[0])
        skew = ((left.mean() - left) ** 3).sum() / (6 * ((left.mean() - left) ** 2).sum() ** 1.5)
        shift = stats.norm.ppf(np.clip((drawn < miou(total)).mean(), 1 / DRAWS, 1 - 1 / DRAWS))
        ends = shift + np.array([-1.96, 1.96])
        found['BCa'] = np.quantile(drawn, stats.norm.cdf(shift + ends / (1 - skew * ends)))
    return found


def coverage(case: tuple, sets: int) -> list:
    images, rarest, seeds = case
    rng, effect = np.random.default_rng([1, images, seeds]), 0.05 * (seeds > 1)
    expected, hits, widths = truth(rarest, effect), dict.fromkeys(('percentile', 'BCa', 'here'), 0), []
    for _ in range(sets):
        counts = simulate(rng, images, rarest, (1, seeds), effect)
        found = interval(as_rows(counts)['0'])
        for name, (low, high) in (bootstrap_ends(rng, counts[0]) | dict(here=(found.low, found.high))).items():
            hits[name] += low <= expected <= high
        widths.append(found.high - found.low)
    cells = ['' if name == 'BCa' and seeds > 1 else share(hits[name], sets) for name in hits]
    return [images, f'{100 * rarest:g} %', seeds, *cells, f'{np.mean(widths):.1f}']


def false_claims(case: tuple, sets: int) -> list:
    count, noisy, seeds = case  # noisy: how much larger the seed effect of two rows is
    rng, counted = np.random.default_rng([2, noisy, seeds]), np.zeros(4, int)
    effect = 0.03 * np.array([1] * (count - 2) + [noisy] * 2)[:, None, None, None]
    for _ in range(sets):
        counts = simulate(rng, 50, 0.1, (count, seeds), effect)
        found = best_group(as_rows(counts))
        scores = miou(counts.sum(2))
        mean, deviation = scores.mean(1), scores.std(1, ddof=1) if seeds > 1 else math.inf
        leads = (mean - deviation)[mean.argmax()] > np.delete(mean + deviation, mean.argmax()).max()
        p = [d.p for d in found.differences]
        counted += [leads, min(p) <= 0.05, min(holm(p)) <= 0.05, len(found.members) < 8]
    return [count, 'equal' if noisy == 1 else f'two rows {noisy} times', seeds, *(share(c, sets) for c in counted)]


def power(case: tuple, sets: int) -> list:
    seeds, images, points = case
    rng = np.random.default_rng([3, seeds, images])
    pilots = [plan(as_rows(simulate(rng, images, 0.1, (8, seeds), 0.03)), 1.0) for _ in range(30)]
    planned, found = float(np.median([pilot.detectable for pilot in pilots])), 0
    for _ in range(sets):
        rows = as_rows(simulate(rng, images, 0.1, (8, seeds), 0.03))
        for scores in rows['0']:
            scores.raised = points or planned
        group = best_group(rows)
        found += group.leader == '0' and '1' not in group.members
    return [seeds, images, f'{points:.1f}' if points else f'{planned:.1f}: the plan for 80 %', share(found, sets)]


#: What gives a line for a case and a number of simulations, that number, the cases, and the words around the table.
STUDIES = {
    'coverage': (
        coverage,
        1000,
        [
            (50, 0.1, 1),
            (500, 0.1, 1),
            (50, 0.04, 1),
            (500, 0.04, 1),
            (50, 0.1, 2),
            (50, 0.1, 3),
            (500, 0.1, 3),
            (50, 0.1, 5),
            (500, 0.1, 5),
        ],
        'Coverage of 95 % intervals of mIoU; {} data sets a line.',
        'Images | Rarest class on | Seeds | Percentile bootstrap, % | BCa, % | Here, % | Mean width, points',
    ),
    'false-claims': (
        false_claims,
        800,
        [(8, 1, 1), (8, 1, 2), (8, 1, 3), (8, 1, 5), (8, 3, 2), (8, 3, 3), (8, 3, 5)],
        'Tables of equal rows with a false claim, 50 images; {} tables a line.',
        'Rows | Seeds vary | Seeds | Mean ± deviation, % | Any p, % | Holm, leader, % | Here: Holm, all pairs, %',
    ),
    'power': (
        power,
        200,
        [(s, n, points) for s, n in ((2, 50), (3, 50), (5, 50), (3, 200), (5, 200)) for points in (2.0, 0.0)],
        'One row of eight is better; {} tables a line.',
        'Seeds | Images | True difference, points | Distinguished from a given row, %',
    ),
}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', choices=STUDIES, help='one table')
    parser.add_argument('--divide', type=int, default=1, help='do a fraction of the simulations, and only print')
    parser.add_argument('--resume', type=Path, help='JSON file of finished lines, to continue')
    args = parser.parse_args()
    for name in [args.only] if args.only else STUDIES:
        line, sets, cases, title, head = STUDIES[name]
        sets = max(2, sets // args.divide)
        lines = json.loads(args.resume.read_text()) if args.resume and args.resume.exists() else {}
        for case in cases:
            if f'{name} {case} {sets}' not in lines:
                lines[f'{name} {case} {sets}'] = line(case, sets)
                if args.resume:
                    args.resume.write_text(json.dumps(lines))
        cells = [
            head.split(' | '),
            ['---'] * (head.count(' | ') + 1),
            *(lines[f'{name} {case} {sets}'] for case in cases),
        ]
        text = title.format(f'{sets:,}') + '\n\n' + ''.join(f'| {" | ".join(map(str, row))} |\n' for row in cells)
        print(text)
        if args.divide == 1:
            update_page(Path('docs/statistics.md'), name, text)
