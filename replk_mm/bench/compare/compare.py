"""Compare two results: folders that ``tools/test.py --out DIR`` wrote.

What is found is plain data, which :mod:`replk_mm.bench.compare.compare` lays out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm.bench.compare import results
from replk_mm.bench.compare.results import Result, Source
from replk_mm.engine.record import write_record
from replk_mm.errors import UserError, printable
from replk_mm.files import write_atomic

#: Resamplings of the images.
DRAWS = 1000


def compare(
    path_a: str,
    path_b: str,
    source: Source | None = None,
    *,
    images: int | None = 8,
    kind: str = 'bbox',
    score: float = 0.3,
    seed: int = 0,
    out: Path | None = None,
) -> dict:
    """Compare two results.

    Args:
        path_a: See :func:`replk_mm.bench.compare.results.read_result`.
        path_b: The other.
        source: Where data, config and classes are, if not where the results say.
        images: How many of the most changed images are listed and shown; None looks at no image.
        kind: Of detections: what IoU is taken of, and which AP classes are compared by, ``'bbox'`` or ``'segm'``.
        score: Detections less sure are left out when images are compared.
        seed: Of the resampling, 0 or more.
        out: Folder for pictures of the most changed images.

    Returns:
        Plain data for JSON; see docs/report.md.

    Raises:
        UserError: If the results cannot be compared, or data or predictions are missing.
    """
    a, b = results.read_result(path_a, 'A'), results.read_result(path_b, 'B')
    results.check_comparable(a, b)
    source = source or Source()
    figure = 'IoU' if a.task == 'segmentation' else f'{kind}_mAP'
    found: dict[str, Any] = dict(
        version=1,
        task=a.task,
        a=a.facts(),
        b=b.facts(),
        differences=results.differences(a, b),
        metrics=results.metrics(a, b),
        per_class=dict(figure=figure, size=results.SIZE[a.task], rows=results.per_class(a, b, figure)),
    )
    if images is None:
        return found
    root = results.data_root(a, b, source)
    if a.task == 'segmentation':
        return found | _segmentation((a, b), source, root, images, seed, out)
    return found | _detection((a, b), source, root, images, seed, out, kind, score)


def _segmentation(
    pair: tuple[Result, Result], source: Source, root: str | None, images: int, seed: int, out: Path | None
) -> dict:
    from replk_mm.bench.compare import segmentation

    labels = segmentation.open_labels(pair, source, root)
    counts = segmentation.count(labels, pair)
    for which, result in enumerate(pair):
        segmentation.check_reproduced(result, labels, counts, which)
    miou, accuracy = segmentation.scores(counts)
    scores = [
        dict(
            image=labels.names[i],
            index=int(i),
            a=float(miou[0, i]),
            b=float(miou[1, i]),
            difference=float(miou[1, i] - miou[0, i]),
            accuracy_a=float(accuracy[0, i]),
            accuracy_b=float(accuracy[1, i]),
        )
        for i in np.flatnonzero(~np.isnan(miou[0]))
    ]
    interval = paired_bootstrap(segmentation.miou_difference(counts), len(labels.names), DRAWS, seed)
    labelled, predicted = counts.labelled.sum(0), counts.predicted.sum(1)
    found = _found(
        'mIoU', 'mIoU', '%', segmentation.DEFINITION, scores, _most_changed(scores, images), len(labels.names), interval
    )
    # mIoU counts a class that is in no label as 0 for the result that predicts it.
    found['only_predicted'] = [
        dict(name=name, a=int(predicted[0, c]), b=int(predicted[1, c]))
        for c, name in enumerate(labels.classes)
        if not labelled[c] and predicted[:, c].any()
    ]
    if out:
        from replk_mm.bench.compare.pictures import label_rows, write_sheets

        found['pictures'] = write_sheets(out, label_rows(labels, pair, found['images']['changed']), _titles(pair))
    return found


def _detection(
    pair: tuple[Result, Result],
    source: Source,
    root: str | None,
    images: int,
    seed: int,
    out: Path | None,
    kind: str,
    score: float,
) -> dict:
    from replk_mm.bench.compare import detection

    objects = detection.open_objects(pair[0], source, root, kind)
    detections = tuple(detection.open_detections(result, objects, kind, score) for result in pair)
    matches = [detection.match(objects, part, list(objects.images), kind) for part in detections]
    of = np.array([[(len(m.found), len(m.missed), len(m.false)) for m in part.values()] for part in matches])
    f1 = detection.f1(of)
    scores = [
        dict(
            image=image['file_name'],
            id=key,
            a=float(f1[0, n]),
            b=float(f1[1, n]),
            difference=float(f1[1, n] - f1[0, n]),
            **{
                f'{what}_{letter}': int(of[j, n, k])
                for j, letter in enumerate('ab')
                for k, what in enumerate(('found', 'missed', 'false'))
            },
        )
        for n, (key, image) in enumerate(objects.images.items())
    ]
    # Equal F1 may still hide a change: then by objects found less false detections.
    changed = _most_changed(scores, images, lambda s: s['found_b'] - s['false_b'] - s['found_a'] + s['false_a'])
    interval = paired_bootstrap(mean_difference(*f1), len(scores), DRAWS, seed)
    definition = f'{detection.DEFINITION}; score threshold {score:g}, IoU of {"boxes" if kind == "bbox" else "masks"}'
    found = _found('F1', 'mean F1 of the images', '', definition, scores, changed, len(scores), interval)
    found['totals'] = {
        letter: dict(
            zip(('found', 'missed', 'false'), map(int, of[j].sum(0)), strict=True), mean_f1=float(f1[j].mean())
        )
        for j, letter in enumerate('ab')
    }
    if out:
        from replk_mm.bench.compare.pictures import object_rows, write_sheets

        found['pictures'] = write_sheets(out, object_rows(objects, detections, matches, changed, kind), _titles(pair))
    return found


def _most_changed(scores: list[dict], images: int, also: Callable[[dict], float] = lambda score: 0) -> list[dict]:
    changed = [score for score in scores if score['difference'] or also(score)]
    return sorted(changed, key=lambda s: (-abs(s['difference']), -abs(also(s)), s['image']))[:images]


def _found(
    figure: str,
    overall: str,
    unit: str,
    definition: str,
    scores: list[dict],
    changed: list[dict],
    images: int,
    interval: 'Interval',
) -> dict[str, Any]:
    signs = [np.sign(score['difference']) for score in scores]
    summary = dict(
        figure=figure,
        unit=unit,
        definition=definition,
        count=images,
        scored=len(scores),
        higher_in_b=signs.count(1),
        higher_in_a=signs.count(-1),
        equal=signs.count(0),
        median_difference=float(np.median([score['difference'] for score in scores])),
    )
    return dict(
        images=summary | dict(changed=changed, scores=scores),
        statistics=dict(figure=overall, unit=unit, **asdict(interval), beyond_luck=interval.is_beyond_luck),
    )


def _titles(pair: tuple[Result, Result]) -> list[str]:
    return ['image', 'ground truth', *(f'{result.letter}: {result.name}' for result in pair), 'where they differ']


@dataclass(frozen=True)
class Interval:
    """A difference, B less A, and where it falls in 95 % of the resamplings of the images.

    Attributes:
        difference: On the images as they are.
        low: The 2.5th percentile.
        high: The 97.5th percentile.
        b_higher: Share of the resamplings in which B is higher.
        draws: Resamplings.
        seed: Of the random numbers.
        images: Images.
    """

    difference: float
    low: float
    high: float
    b_higher: float
    draws: int
    seed: int
    images: int

    @property
    def is_beyond_luck(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    difference: Callable[[np.ndarray], np.ndarray], images: int, draws: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a difference between two results on the same images.

    Each draw takes as many images as there are, with replacement; both results are scored on the same ones. The
    interval covers the choice of test images, not other training seeds. Counting how often each image is drawn makes
    mIoU one product of matrices for many draws, which scipy.stats.bootstrap has no way to express.

    Args:
        difference: From how often each image was drawn, ``(draws, images)`` float64, the difference B less A of each
            draw, ``(draws,)``.
        images: Images, at least 1.
        draws: Resamplings.
        seed: Of the random numbers.

    Raises:
        UserError: If no draw has a score.
    """
    rng = np.random.default_rng(seed)
    found = np.concatenate(
        [
            difference(rng.multinomial(images, np.full(images, 1 / images), size=50).astype(float))
            for _ in range(0, draws, 50)
        ]
    )[:draws]  # 50 at a time bound the memory
    found = found[~np.isnan(found)]  # an image without labels, drawn again and again, has no score
    if not len(found):
        raise UserError('no image has a labelled pixel\nName data with labels: --data-root DIR.')
    as_is = float(difference(np.ones((1, images)))[0])
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(as_is, float(low), float(high), float((found > 0).mean()), draws, seed, images)


def mean_difference(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """For :func:`paired_bootstrap`: of the mean of a score of every image, ``(images,)`` each."""
    return lambda times: times @ (b - a) / times.sum(1)


#: Below so many images an interval is called rough.
FEW_IMAGES = 30


def _number(value: float | None, unit: str, signed: bool = False) -> str:
    return '-' if value is None else f'{value:{"+" if signed else ""}.{2 if unit == "%" else 4}f}'


def _pair(row: dict, unit: str) -> list[str]:
    return [_number(row['a'], unit), _number(row['b'], unit), _number(row['difference'], unit, True)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns, those after the first to the right."""
    cells = [[cell.replace('|', r'\|') for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ['-' * widths[0], *(f'{"-" * (width - 1)}:' for width in widths[1:])])
    return [
        '| '
        + ' | '.join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + ' |'
        for row in cells
    ]


def lines(found: dict) -> list[str]:
    """All that was found, the conditions before the figures."""
    unit, classes = '%' if found['task'] == 'segmentation' else '', found['per_class']
    out = ['# Two results compared', '']
    for letter in 'ab':
        facts = found[letter]
        iteration = '' if facts['iteration'] is None else f', iteration {facts["iteration"]}'
        out.append(
            f'- {letter.upper()}: {facts["path"]} ({facts["config"]}, {facts["checkpoint"]}{iteration}, '
            f'{facts["images"]} images)'
        )
    if found['a']['sha256'] and found['a']['sha256'] == found['b']['sha256']:
        out.append('- A and B are the same checkpoint.')
    out += _conditions(found['differences'])
    out += [
        '',
        '## Figures',
        '',
        *_table(['metric', 'A', 'B', 'B - A'], [[row['name'], *_pair(row, unit)] for row in found['metrics']]),
    ]
    rows = [
        [row['name'], *_pair(row, unit), '-' if row['size'] is None else f'{row["size"]:,}'] for row in classes['rows']
    ]
    out += [
        '',
        f'## {classes["figure"]} of the classes, what differs most first',
        '',
        *_table(['class', 'A', 'B', 'B - A', classes['size']], rows),
        '',
    ]
    for row in classes['rows']:
        if (row['a'] is None) != (row['b'] is None):
            out.append(f'- {row["name"]}: only {"B" if row["a"] is None else "A"} has a figure')
    for row in found.get('only_predicted', ()):
        who = ' and '.join(f'{letter.upper()} predicts it on {row[letter]:,} pixels' for letter in 'ab' if row[letter])
        out.append(f'- {row["name"]}: in no label; {who}, which counts as IoU 0 in the mIoU')
    if 'images' in found:
        out += ['', '## Images', '', *_images(found)]
        out += ['', '## More than the luck of the images?', '', *_statistics(found['statistics'])]
    return [printable(line).replace('\n', ' ') for line in out]  # names of classes are those of a file


def _conditions(differences: Sequence[dict]) -> list[str]:
    if not differences:
        return ['', 'Measured alike: the same test protocol, iterations, data and environment.']
    title = (
        'NOT MEASURED ALIKE: the figures below differ for these reasons too'
        if any(row['what'] != 'environment' for row in differences)
        else 'Measured in different environments'
    )
    rows = [[row['what'], row['key'], row['a'], row['b']] for row in differences]
    return ['', f'## {title}', '', *_table(['what', 'key', 'A', 'B'], rows)]


def _images(found: dict) -> list[str]:
    images, unit = found['images'], found['images']['unit']
    out = [f'{images["definition"][0].upper()}{images["definition"][1:]}.']
    left_out = images['count'] - images['scored']
    out.append(
        f'{images["scored"]} images: {images["figure"]} is higher in B in {images["higher_in_b"]}, higher in A '
        f'in {images["higher_in_a"]}, equal in {images["equal"]}; median difference '
        f'{_number(images["median_difference"], unit, True)}'
        + (f'; {left_out} without a labelled pixel left out' if left_out else '')
        + '.'
    )
    if 'totals' in found:
        out.append(
            'In all: '
            + '; '.join(
                f'{letter.upper()} {total["found"]:,} found, {total["missed"]:,} missed, {total["false"]:,} false, '
                f'mean F1 '
                f'{total["mean_f1"]:.4f}'
                for letter, total in found['totals'].items()
            )
            + '.'
        )
    if not images['changed']:
        return [*out, 'No image changed.']
    kept = [key for key in ('accuracy', 'found', 'missed', 'false') if f'{key}_a' in images['changed'][0]]
    head = ['image that changed most', f'{images["figure"]} A', 'B', 'B - A', *(f'{key} A, B' for key in kept)]
    digits = '.2f' if 'accuracy' in kept else 'd'
    rows = [
        [row['image'], *_pair(row, unit), *(f'{row[f"{key}_a"]:{digits}}, {row[f"{key}_b"]:{digits}}' for key in kept)]
        for row in images['changed']
    ]
    return [*out, '', *_table(head, rows)]


def _statistics(found: dict) -> list[str]:
    unit = found['unit']
    low, high = (_number(found[key], unit, True) for key in ('low', 'high'))
    verdict = (
        'The interval does not contain 0: more than the luck of which images are in the data.'
        if found['beyond_luck']
        else 'The interval contains 0: other images of the same kind might well turn it round.'
    )
    if found['low'] == found['high'] == 0:
        verdict = 'There is no difference in any resampling.'
    out = [
        f'{found["figure"]}, B - A: {_number(found["difference"], unit, True)}; 95 % of {found["draws"]:,} '
        f'resamplings of the {found["images"]} images (paired bootstrap, seed {found["seed"]}) are between {low} '
        f'and {high}, {100 * found["b_higher"]:.1f} % have B higher. {verdict}',
        'This is over images, not over training seeds, for which several trainings are needed.',
    ]
    if found['images'] < FEW_IMAGES:
        out.append(f'With {found["images"]} images only, the interval is rough, rather too narrow.')
    return out


def write(found: dict, out: Path) -> list[Path]:
    """Write ``compare.json`` and ``compare.md``.

    Args:
        found: What was found.
        out: Folder, which is there; pictures lie in it.

    Returns:
        All files of the comparison.

    Raises:
        UserError: If a file cannot be written.
    """
    pictures = found.get('pictures', [])
    files = [out / 'compare.json', out / 'compare.md']
    write_record(found, files[0])
    try:
        shown = [f'\n![Images that changed most]({name})' for name in pictures]
        write_atomic(files[1], '\n'.join([*lines(found), *shown, '']))
    except OSError as error:
        raise UserError(f'{files[1]}: cannot be written ({error.strerror})\nChoose another --out DIR.') from error
    return files + [out / name for name in pictures]
